"""A model is calibrated with about a block of it in memory."""

import ctypes
import tempfile
import threading
from pathlib import Path

import pytest
import small
import torch
import transformers

from harness import Child
from loftq.calibration.blocks import load_offloaded
from loftq.calibration.collect import collect
from models import LLAMA

pytestmark = pytest.mark.slow

MB = 1 << 20
SIZES = {**LLAMA, "vocab_size": 512, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12}


def memory(field: str) -> int:
    """Bytes, from the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs the memory account of Linux")
def test_peak_of_a_model_of_twelve_blocks():
    """A quarter of the model at most: a block's weights and sums, and what lies outside of blocks."""
    with tempfile.TemporaryDirectory() as root:

        def make():
            torch.set_num_threads(1)
            transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(root)

        assert Child(make).ended().code == 0
        size = sum(file.stat().st_size for file in Path(root).glob("*.safetensors"))
        assert size > 100 * MB

        def work():
            torch.set_num_threads(1)
            ctypes.CDLL(None).mallopt(-3, MB)  # give freed tensors back at once: what is measured is what is held
            tiny = Path(root) / "tiny"
            small.tiny("llama").save_pretrained(tiny)
            list(collect(load_offloaded(tiny, tiny), small.rows(), "diagonal"))  # maps the libraries
            before, seen, stop = memory("RssAnon"), [0], threading.Event()

            def watch():
                while not stop.wait(0.001):
                    seen.append(memory("RssAnon"))

            watcher = threading.Thread(target=watch)
            watcher.start()
            for _ in collect(load_offloaded(Path(root), tiny), small.rows(), "diagonal"):
                pass
            stop.set()
            watcher.join()
            print(max(seen) - before)

        ended = Child(work).ended(120)
        assert ended.code == 0, ended.err
        growth = int(ended.out.split()[-1])
        assert growth < size / 4, f"{growth / MB:.0f} of {size / MB:.0f} MB"
