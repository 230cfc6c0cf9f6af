"""``loftq`` in one of several CPU processes where accelerate believes in GPUs: on a CPU it has no FSDP."""

import torch
import torch.distributed as dist
from accelerate import DistributedType, PartialState

PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


if __name__ == "__main__":
    from loftq.cli import main

    dist.init_process_group("gloo")
    main()
