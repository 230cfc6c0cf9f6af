"""A run holds a few matrices at a time, however large the checkpoint is."""

import ctypes
import dataclasses
import tempfile
from pathlib import Path

import pytest
import torch
import transformers

from harness import POLICY, Child, run, tiny_source
from loftq.spec import SolveSpec
from models import LLAMA

pytestmark = pytest.mark.slow

MB = 1 << 20
SIZES = {**LLAMA, "vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6}
WORKERS = 2
LARGEST = 4096 * 1024 * 4  # bytes of the largest tensor, as float32


def memory(field: str) -> int:
    """Bytes, from the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


@pytest.fixture(scope="module")
def source():
    """A checkpoint of about 300 MB in two shards, made in a child so that this process stays small."""
    with tempfile.TemporaryDirectory() as root:

        def make():
            torch.set_num_threads(1)
            with torch.device("meta"):
                model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
            model = model.to_empty(device="cpu")
            for parameter in model.parameters():
                parameter.data.uniform_(-0.1, 0.1)
            model.save_pretrained(Path(root) / "source", max_shard_size="200MB")

        assert Child(make).ended().code == 0
        assert sum(f.stat().st_size for f in Path(root).glob("*/*.safetensors")) > 300 * MB
        yield Path(root) / "source"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs the memory account of Linux")
def test_peak_of_a_large_checkpoint(source):
    """Four copies of the largest tensor for each worker, and some, above what is there before."""

    def work():
        torch.set_num_threads(1)
        ctypes.CDLL(None).mallopt(-3, MB)  # give freed tensors back at once: what is measured is what is held
        run(tiny_source(source.parent / "tiny"), source.parent / "none")  # maps the libraries
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        policy = dataclasses.replace(POLICY, solve=SolveSpec(steps=1))
        run(source, source.parent / "out", policy=policy, max_shard_bytes=1 << 30, workers=WORKERS)
        print(memory("VmHWM") - before)

    ended = Child(work).ended(120)
    assert ended.code == 0, ended.err
    growth = int(ended.out.split()[-1])
    assert growth < 4 * WORKERS * LARGEST + 64 * MB, f"{growth / MB:.0f} MB"
