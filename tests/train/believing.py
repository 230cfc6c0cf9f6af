"""One of several CPU processes where accelerate believes in GPUs: on a CPU it has no FSDP."""

import torch
import torch.distributed as dist
from accelerate import DistributedType, PartialState


def begin() -> None:
    """Change accelerate, and meet the other processes."""
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    dist.init_process_group("gloo")
