"""A user's script in one of several CPU processes where accelerate believes in GPUs, as in ``sharded_cli``."""

import runpy
import sys

import sharded_cli  # noqa: F401  # makes accelerate believe
import torch.distributed as dist

if __name__ == "__main__":
    dist.init_process_group("gloo")
    runpy.run_path(sys.argv[1], run_name="__main__")
