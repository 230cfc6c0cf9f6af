"""Processes that collect statistics together: each runs a part of the batches, and their sums are added up.

Sums are float64, of products that were rounded to float32, so that adding them is exact but for extreme ranges; those
of a diagonal differ by their order in the last of 53 bits. What is stored is rounded to 24 bits once, and so the same
for any number of processes.
"""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from loftq.errors import LoftqError

T = TypeVar("T")
MOST_AXES = 3
PATIENCE = timedelta(days=7)  # of a process for the others, whose batches may be longer


class Processes:
    """Those that torchrun began, of which this is one.

    Attributes:
        rank, count: of this process, and how many there are.
    """

    def __init__(self, device: str) -> None:
        cuda = torch.device(device).type == "cuda"
        if not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        self.device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device
        self._place = self.device if cuda else "cpu"  # of what is sent

    def share(self, batches: Sequence[T]) -> list[T]:
        """The batches of this process."""
        return list(batches[self.rank :: self.count])

    def sum(self, part: Tensor) -> Tensor:
        """The sum of a tensor over all processes. One without axes stands for zeros where others have some."""
        shape = torch.zeros(MOST_AXES, dtype=torch.int64)
        shape[: part.ndim] = torch.tensor(part.shape)
        shape = shape.to(self._place)
        dist.all_reduce(shape, dist.ReduceOp.MAX)
        wanted = [size for size in shape.tolist() if size]
        total = part if part.ndim == len(wanted) else part.new_zeros(wanted)
        total = total.to(self._place)
        dist.all_reduce(total)
        return total

    def first(self, call: Callable[[], T]) -> T:
        """What the first process gets from a call, in all of them; its error too."""
        told: list[Any] = [None]
        if self.rank == 0:
            try:
                told = [(call(), None)]
            except LoftqError as e:
                told = [(None, e)]
        dist.broadcast_object_list(told, 0)
        result, error = told[0]
        if error is not None:
            raise error
        return result


class Alone:
    """One process, which is the first."""

    rank = 0

    def first(self, call: Callable[[], T]) -> T:
        return call()


def begun(device: str) -> Processes | None:
    """The processes of which torchrun began this one; None for one that is alone."""
    return Processes(device) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
