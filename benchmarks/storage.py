"""What does it cost to store in 16 bits what is not quantized, and the adapter, and what to compute in 16 bits?

Each row rounds one part of a float32 model and leaves the rest: matrices that are kept (embedding tables, heads),
vectors that are kept (norms, biases), or the adapter; these are read back to float32 and computed with in float32. The
last rows convert the whole model and compute in 16 bits, norms of embeddings and softmax included. Measured are the
perplexity of a decoder, or the cosine of an encoder's sentence embeddings with full precision's, before any
fine-tuning, of the dense model and of quantized ones, embedding tables kept; and the CPU time of that, one thread, as a
multiple of float32's.

    python benchmarks/storage.py                                         # all-MiniLM-L6-v2, in two minutes
    python benchmarks/storage.py --rows 256 --model minilm=DIRECTORY --model llama=ANOTHER --data wt2.test.txt.gz
"""

import argparse
import copy
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.utils import logging

import loftq
from fitted import Model, minilm
from harness import ROOT, environment
from loftq.nn.layers import PackedWeight

RANK, WIDTHS = 16, (16, 4, 2)
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
PARTS = ("matrices", "vectors", "adapter")


def parts(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters that are kept, matrices and vectors, and the adapter's."""
    packed = {id(p) for m in model.modules() if isinstance(m, PackedWeight) for p in m.stored}
    found: dict[str, list[nn.Parameter]] = {part: [] for part in PARTS}
    for name, parameter in model.named_parameters():
        if id(parameter) not in packed:
            part = "adapter" if ".lora_" in name else "vectors" if parameter.ndim < 2 else "matrices"
            found[part].append(parameter)
    return found


def rounded(model: nn.Module, part: str, dtype: torch.dtype) -> nn.Module:
    changed = copy.deepcopy(model)
    for parameter in parts(changed)[part]:
        parameter.data = parameter.data.to(dtype).float()
    return changed


def opened(model: Model, directory: str, bits: int, work: Path) -> nn.Module:
    """The dense model, or one quantized by the default preset, with its initialization, in float32."""
    if bits == 16:
        return model.dense
    made = work / f"{bits}"
    loftq.quantize(directory, made, bits=bits, rank=RANK, dtype="source", adapter_dtype="float32")
    auto = AutoModelForCausalLM if model.decoder else AutoModel
    return PeftModel.from_pretrained(auto.from_pretrained(made), made, subfolder="loftq_init").eval()


def quality(model: Model, changed: nn.Module) -> tuple[float, float]:
    """Perplexity or mean cosine, and the CPU seconds that it took."""
    begun = time.process_time()
    found = model._outputs(changed).float()
    seconds = time.process_time() - begun
    return math.exp(-found.mean().item()) if model.decoder else (found * model.right).sum(1).mean().item(), seconds


def rows(model: Model, directory: str, bits: int, work: Path) -> list[dict[str, Any]]:
    whole = opened(model, directory, bits, work)
    quality(model, whole)  # loads the kernels
    sides = {"float32": whole}
    for dtype, half in HALVES.items():
        sides |= {f"{part} {dtype}": rounded(whole, part, half) for part in PARTS if parts(whole)[part]}
    for dtype, half in HALVES.items():
        sides[f"computed in {dtype}"] = copy.deepcopy(whole).to(half)
    found = {side: quality(model, changed) for side, changed in sides.items()}
    base = found["float32"][1]
    return [
        {"bits": bits, "side": side, "quality": float(f"{q:.6g}"), "time_ratio": round(seconds / base, 2)}
        for side, (q, seconds) in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", metavar="NAME=DIRECTORY", help="repeatable")
    parser.add_argument("--data", type=Path, help="text, may be .gz [default: Python's documentation]")
    parser.add_argument("--rows", type=int, default=64, help="sentences, or windows of text [default: 64]")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "data" / "storage.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    models = []
    for named in options.model or [f"all-MiniLM-L6-v2={minilm()}"]:
        name, _, directory = named.rpartition("=")
        name, model = name or Path(directory).resolve().name, Model(directory, options.data, options.rows)
        what = "perplexity" if model.decoder else "cosine"
        print(f"\n{name}\n\n| bits | stored, computed | {what} | time |\n|---|---|---|---|")
        table = []
        with tempfile.TemporaryDirectory() as work:
            for bits in WIDTHS:
                for row in rows(model, directory, bits, Path(work)):
                    print(
                        f"| {row['bits']} | {row['side']} | {row['quality']:.6g} | {row['time_ratio']:.2f} |",
                        flush=True,
                    )
                    table.append(row)
        n = model.right.numel() if model.decoder else len(model.right)
        models.append({"model": name, "measure": what, "n": n, "rows": table})
    result = {
        "data": options.data.name if options.data else "pydoc_data.topics",
        "environment": environment(),
        "rank": RANK,
        "models": models,
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten: {options.output}")


if __name__ == "__main__":
    main()
