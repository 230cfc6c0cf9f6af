"""What other software holds exactly: which code in which blocks, for every width. ``--serve`` chooses from it."""

from loftq.errors import UsageError, option, quoted
from loftq.planning.policy import Policy
from loftq.spec import QuantSpec

SCALES = {"gguf": "float16"}  # others have the policy's
# Software -> code, bits and block that it has; of two for the same width the first is the better.
CONTAINERS = {
    "gguf": (("iq4nl", 4, 32), ("int", 4, 32), ("int", 2, 64), ("int", 2, 256), ("int", 8, 32)),
    "compressed-tensors": tuple(("int", bits, size) for bits in (2, 3, 4, 8) for size in (64, 32, 128)),
}


def served(policy: Policy, bits: float) -> QuantSpec:
    """How a matrix of so many bits is stored for ``policy.serve``: in the policy's block, or the first.

    Raises: UsageError if there is nothing.
    """
    table = CONTAINERS[str(policy.serve)]
    found = [row for row in table if row[1] == bits and policy.code in ("auto", row[0])]
    if not found:
        have = ", ".join(f"{width} ({code})" for code, width, _ in table)
        code = "" if policy.code == "auto" else f" of code {quoted(policy.code)}"
        raise UsageError(f"{option('serve', policy.serve)} holds no {bits} bits{code}; it has {have}")
    code, width, size = min(found, key=lambda row: row[2] != policy.block_size)
    return QuantSpec(
        bits=width, code=code, block_size=size, scale_dtype=SCALES.get(str(policy.serve), policy.scale_dtype)
    )
