"""Which way round a weight lies: ``(out, in)`` in all that is computed; a Conv1D of transformers stores ``(in, out)``,
and so do some of its experts.

Kinds are those of :class:`loftq.planning.Role`. Both functions are their own inverses.
"""

from torch import Tensor

TRANSPOSED = ("conv1d", "experts-transposed", "experts-reversed")
SWAPPED = ("embedding", "experts-reversed")  # to whose ``(out, in)`` PEFT adds ``(B @ A).T``


def oriented(kind: str, weight: Tensor) -> Tensor:
    """A stored weight as ``(out, in)``, or back; a view."""
    return weight.T if kind in TRANSPOSED else weight


def oriented_shape(kind: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[::-1] if kind in TRANSPOSED else shape
