"""Devices, by their names in PyTorch."""

import torch

from loftq.errors import UsageError, option


def check_device(device: str) -> None:
    """Refuse a device that this machine lacks, or that holds no values, before any work is done.

    Raises: UsageError.
    """
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as e:
        raise UsageError(f"{option('device')} {device!r} cannot be used: {str(e).splitlines()[0]}") from e
