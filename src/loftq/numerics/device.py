"""Devices, by their names in PyTorch."""

import contextlib
from collections.abc import Iterable, Iterator

import torch

from loftq.errors import UsageError, option
from loftq.options import check_text


def check_device(device: str) -> None:
    """Refuse a device that this machine lacks, or that holds no values, before any work is done.

    Raises: UsageError.
    """
    check_text(option("device"), device)
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as e:
        raise UsageError(f"{option('device')} {device!r} cannot be used: {str(e).splitlines()[0]}") from e


@contextlib.contextmanager
def seeded(seed: int, devices: Iterable[torch.device]) -> Iterator[None]:
    """Random numbers from ``seed`` on, on the CPU and on ``devices``; on the CPU and on CUDA, then those of before.

    ``torch.manual_seed`` would begin those of every CUDA device anew, and ``fork_rng`` puts back those that it is told.
    """
    others = {device for device in devices if device.type not in ("cpu", "meta")}
    cuda = [device for device in others if device.type == "cuda"]
    with torch.random.fork_rng(cuda):
        torch.default_generator.manual_seed(seed)
        for device in others:
            with torch.cuda.device(device) if device in cuda else contextlib.nullcontext():
                torch.get_device_module(device).manual_seed(seed)
        yield
