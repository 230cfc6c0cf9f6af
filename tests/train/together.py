"""Several processes of one run, forked: what a launcher starts, without the seconds of importing."""

import os
import socket
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from accelerate.state import AcceleratorState, GradientState

import loftq.cli
from harness import Child


def together(work: Callable[[], Any], environment: Mapping[str, str] | None = None, count: int = 2) -> str:
    """What the first of ``count`` processes of ``work`` prints; all have to end well."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]

    def process(rank: int) -> Child:
        def begin() -> None:
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
            os.environ.update({**(environment or {}), **{name: str(value) for name, value in own.items()}})
            AcceleratorState._reset_state(reset_partial_state=True)  # the test itself may have trained alone
            GradientState._reset_state()
            warnings.resetwarnings()
            work()

        return Child(begin)

    ended = [child.ended() for child in [process(rank) for rank in range(count)]]
    assert [one.code for one in ended] == [0] * count, "\n".join(one.err for one in ended)
    return ended[0].out


def train(recipe: object) -> None:
    """``loftq train RECIPE``, in a process of :func:`together`."""
    sys.argv = ["loftq", "train", str(recipe)]
    loftq.cli.main()


def train_sharded(recipe: object) -> None:
    """The same where accelerate believes in GPUs."""
    import believing  # in the child alone: it changes accelerate

    believing.begin()
    train(recipe)
