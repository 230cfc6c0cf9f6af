"""Peak memory and time of `loftq quantize` on a large synthetic checkpoint.

Writes a Llama checkpoint of the asked size with random bf16 weights, quantizes it in a process of its own, and reads
that process's peak resident memory from the kernel (VmHWM), beside what importing the libraries alone takes.

    python benchmarks/streaming.py --gigabytes 8 --bits 2 --rank 64 --json docs/data/streaming.json
"""

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

ROOT = Path(__file__).resolve().parent.parent
HIDDEN, MLP, VOCABULARY = 4096, 11008, 32000
LAYER = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (MLP, HIDDEN),
    "mlp.up_proj": (MLP, HIDDEN),
    "mlp.down_proj": (HIDDEN, MLP),
}
LAYER_BYTES = 2 * sum(m * n for m, n in LAYER.values())
IMPORTS = "import loftq.workflows.quantize, transformers, peft"
PEAK = "print(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])"


def write_checkpoint(directory: Path, layers: int) -> int:
    """One shard a layer, one for the rest, an index and a config; bytes on disk."""
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=layers,
        num_attention_heads=32,
        vocab_size=VOCABULARY,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(directory)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).bfloat16()

    shards = [
        {
            "model.embed_tokens.weight": random(VOCABULARY, HIDDEN),
            "lm_head.weight": random(VOCABULARY, HIDDEN),
            "model.norm.weight": torch.ones(HIDDEN).bfloat16(),
        }
    ]
    index, size = {}, 0
    for i in range(layers + 1):
        shard = shards.pop() if i == 0 else _layer(i - 1, random)
        name = f"model-{i + 1:05d}-of-{layers + 1:05d}.safetensors"
        save_file(shard, directory / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, name))
        size += (directory / name).stat().st_size
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return size


def _layer(i: int, random) -> dict[str, torch.Tensor]:
    shard = {f"model.layers.{i}.{name}.weight": random(*shape) for name, shape in LAYER.items()}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        shard[f"model.layers.{i}.{norm}.weight"] = torch.ones(HIDDEN).bfloat16()
    return shard


def peak_of(code: str) -> int:
    """Peak resident memory, in bytes, of a Python process that runs ``code``."""
    run = subprocess.run([sys.executable, "-c", f"{code}\n{PEAK}"], capture_output=True, text=True, check=True)
    return int(run.stdout.split()[-1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--bits", default="2")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--work", type=Path, help="directory for the checkpoints (deleted afterwards)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    fixed = 2 * 2 * VOCABULARY * HIDDEN
    layers = max(1, round((options.gigabytes * 1e9 - fixed) / LAYER_BYTES))
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        source, output = Path(work) / "source", Path(work) / "output"
        source.mkdir()
        size = write_checkpoint(source, layers)
        imports = peak_of(IMPORTS)
        quantize = (
            f"import loftq; loftq.quantize({str(source)!r}, {str(output)!r}, bits={options.bits!r}, "
            f"rank={options.rank}, steps={options.steps}, workers={options.workers})"
        )
        begun = time.perf_counter()
        peak = peak_of(quantize)
        seconds = time.perf_counter() - begun
        totals = json.loads((output / "loftq_manifest.json").read_text())["totals"]
        shutil.rmtree(output)
    row = {
        "commit": commit.stdout.strip(),
        "device": f"CPU {platform.machine()}, {options.workers} workers",
        "torch": torch.__version__,
        "layers": layers,
        "source_bytes": size,
        "largest_matrix_bytes_f32": 4 * MLP * HIDDEN,
        "bits": options.bits,
        "rank": options.rank,
        "steps": options.steps,
        "seconds": round(seconds, 1),
        "peak_bytes": peak,
        "imports_peak_bytes": imports,
        "bits_per_weight": totals["bits_per_weight"],
        "compression": totals["compression"],
    }
    print(json.dumps(row, indent=2))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(row, indent=2) + "\n")


if __name__ == "__main__":
    main()
