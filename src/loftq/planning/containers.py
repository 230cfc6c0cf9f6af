"""What other software holds exactly: which code in which blocks, for every width. ``--serve`` chooses from it."""

from loftq.errors import UsageError, option, quoted
from loftq.planning.policy import Policy
from loftq.spec import QuantSpec

LAYERS = ("linear", "conv1d")
# Kinds of matrices that it holds, of layers and of stacks of experts.
KINDS = {
    "gguf": (*LAYERS, "experts", "experts-transposed", "experts-reversed"),
    "compressed-tensors": ("linear", "experts", "experts-transposed", "experts-reversed"),
    "mlx": ("linear", "experts"),
    "onnx": LAYERS,
}
SCALES = {"gguf": "float16"}  # others have the policy's
# Software -> code, bits and block that it has; of two for the same width the first is the better.
CONTAINERS = {
    "gguf": (("iq4nl", 4, 32), ("int", 4, 32), ("int", 2, 64), ("int", 2, 256), ("int", 8, 32)),
    "compressed-tensors": tuple(("int", bits, size) for bits in (2, 3, 4, 8) for size in (64, 32, 128)),
    "mlx": tuple(("int", bits, size) for bits in (2, 3, 4, 8) for size in (64, 32, 128)),
    "onnx": tuple(("int", bits, size) for bits in (2, 4, 8) for size in (64, 16, 32, 128, 256)),
}


def served(policy: Policy, bits: float, block_size: int) -> QuantSpec:
    """How a matrix of so many bits is stored for ``policy.serve``: in blocks of this size, or in the first that it has.

    Raises: UsageError if there is nothing.
    """
    found = [quant for quant in choices(policy) if quant.bits == bits]
    if not found:
        have = ", ".join(dict.fromkeys(f"{width} ({code})" for code, width, _ in CONTAINERS[str(policy.serve)]))
        code = "" if policy.code == "auto" else f" of code {quoted(policy.code)}"
        raise UsageError(f"{option('serve', policy.serve)} holds no {bits} bits{code}; it has {have}")
    return min(found, key=lambda quant: quant.block_size != block_size)


def choices(policy: Policy) -> list[QuantSpec]:
    """All that ``policy.serve`` holds of the policy's code; of two codes with the same width and block the first."""
    found: dict[tuple[int, int], QuantSpec] = {}
    for code, bits, size in CONTAINERS[str(policy.serve)]:
        if policy.code in ("auto", code):
            scale = SCALES.get(str(policy.serve), policy.scale_dtype)
            found.setdefault((bits, size), QuantSpec(bits=bits, code=code, block_size=size, scale_dtype=scale))
    return list(found.values())


def why_not_served(policy: Policy, quant: QuantSpec, columns: int, kind: str) -> str:
    """Why ``policy.serve`` cannot hold a matrix of so many columns; empty if it can."""
    if kind not in KINDS[str(policy.serve)]:
        what = "a stack of experts" if kind.startswith("experts") else f"a {kind}"
        return f"{what}, which cannot be exported to {policy.serve} yet"
    if columns % quant.block_size:
        return f"rows of {columns} are no multiple of {policy.serve}'s block of {quant.block_size}"
    return ""
