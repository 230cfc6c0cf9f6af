"""How long does a whole checkpoint take, and how much memory: Llama-2-7B's shapes, from files to files?

Peer: none; what importing the libraries takes alone, and the size of the largest matrix, are given beside.

Goal: 13 GB of random bfloat16 weights to 2 bits, rank 64, 5 steps, in 15 minutes and 3 GiB of resident memory.
The peak is the kernel's (VmHWM), of a process that runs `loftq quantize`. Needs 17 GB of disk in TMPDIR.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import LlamaConfig

from harness import Bench, save_shards

BITS, RANK, STEPS = 2, 64, 5
HIDDEN, MLP, VOCABULARY = 4096, 11008, 32000
IMPORTS = "import loftq.checkpoint.quantize, transformers, peft"
PEAK = "print(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])"


def write_checkpoint(directory: Path, layers: int, hidden: int = HIDDEN, mlp: int = MLP) -> int:
    """One shard a layer, one for the rest, an index and a config; bytes on disk."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=32,
        vocab_size=VOCABULARY,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(directory)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).bfloat16()

    def shards() -> Iterator[dict[str, torch.Tensor]]:
        tables = {f"{name}.weight": random(VOCABULARY, hidden) for name in ("model.embed_tokens", "lm_head")}
        yield {**tables, "model.norm.weight": torch.ones(hidden).bfloat16()}
        yield from (_layer(i, hidden, mlp, random) for i in range(layers))

    return save_shards(directory, shards(), layers + 1)


def _layer(i: int, hidden: int, mlp: int, random: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
    shapes = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (mlp, hidden), "mlp.up_proj": (mlp, hidden), "mlp.down_proj": (hidden, mlp)}
    shard = {f"model.layers.{i}.{name}.weight": random(*shape) for name, shape in shapes.items()}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        shard[f"model.layers.{i}.{norm}.weight"] = torch.ones(hidden).bfloat16()
    return shard


def peak_of(code: str) -> int:
    """Peak resident memory, in bytes, of a Python process that runs ``code``."""
    run = subprocess.run([sys.executable, "-c", f"{code}\n{PEAK}"], capture_output=True, text=True, check=True)
    return int(run.stdout.split()[-1]) * 1024


def main() -> None:
    bench = Bench(__file__, __doc__)
    layers, workers = 1 if bench.quick else 32, bench.threads
    with tempfile.TemporaryDirectory() as work:
        source, output = Path(work) / "source", Path(work) / "output"
        source.mkdir()
        size = write_checkpoint(source, layers)
        quantize = (
            f"import loftq; loftq.quantize({str(source)!r}, {str(output)!r}, bits={BITS}, rank={RANK}, "
            f"preset='loftq', steps={STEPS}, workers={workers})"
        )
        began = time.perf_counter()
        peak = peak_of(quantize)
        seconds = time.perf_counter() - began
        totals = json.loads((output / "loftq_manifest.json").read_text())["totals"]
        shutil.rmtree(output)
    case = f"{layers} layers of Llama-2-7B, {BITS} bits, rank {RANK}, {STEPS} steps, {workers} workers"
    bench.record(case, "wall time", [seconds / 60], "min", at_most=15)
    bench.record(case, "peak resident memory", [peak / 2**30], "GiB", at_most=3)
    bench.record(case, "of it, importing the libraries", [peak_of(IMPORTS) / 2**30], "GiB")
    bench.record(case, "largest matrix, float32", [4 * MLP * HIDDEN / 2**30], "GiB")
    bench.record(case, "checkpoint", [size], "B")
    bench.record(case, "checkpoint read in a second", [size / seconds], "B")
    bench.record(case, "stored bits per quantized weight", [totals["bits_per_weight"]], "bits")
    bench.finish()


if __name__ == "__main__":
    main()
