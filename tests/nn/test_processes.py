"""FSDP2 and DDP over two gloo processes: the packed tensors are sharded, and nothing changes."""

import pytest
import sharded
import torch.multiprocessing

pytestmark = pytest.mark.slow


def test_two_processes_compute_what_one_does(tmp_path):
    torch.multiprocessing.spawn(sharded.work, (str(tmp_path / "rendezvous"),), nprocs=2)
