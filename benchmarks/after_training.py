"""What was trained at 2 bits, by every way out: what does each keep? Does llama.cpp compute what transformers does?

A small Llama, or mixture of experts, is quantized and an adapter trained on it. Then its perplexity: with the adapter
apart, merged to 16 bits, merged and quantized again by llama.cpp itself, and with the adapter where it does not belong.
For code int also llama.cpp's perplexity of the exact codes with the adapter apart, and how long its most probable text
is transformers'.

Goal: perplexity in llama.cpp of exact codes and adapter within 0.1 % of transformers'; no decoded weight differs.

    python benchmarks/after_training.py --model SMALL-LLAMA --train TEXT --data TEXT --library DIRECTORY

It needs `loftq[gguf]` and llama-cpp-python, or its sources on PYTHONPATH and the DIRECTORY of a libllama that was built
from them. Texts may be .gz.
"""

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import PeftModel

import loftq
from fitted import text
from harness import ROOT, environment
from loftq.architecture import skeleton
from loftq.formats.source import open_checkpoint
from loftq.serving import gguf as writer
from loftq.serving.base import Base, Dense, open_base
from loftq.serving.blocks import block_bytes, block_for
from loftq.serving.gguf_header import family_of

RANK, LENGTH, RATE = 16, 256, 5e-4
OPTIONS: dict[str, dict[str, Any]] = {
    "int": {"bits": 2, "serve": "gguf"},
    "lloyd": {"bits": 2, "preset": "fitted"},
    "trellis": {"bits": 2.1875, "code": "trellis", "preset": "fitted"},
}
REQUANTIZED = {"Q8_0": 7, "Q4_K_M": 15, "Q2_K": 10}  # llama.cpp's numbers of what a file is mostly of
AUTO = transformers.AutoModelForCausalLM


class LlamaCpp:
    """llama.cpp, by the bindings of llama-cpp-python."""

    def __init__(self, library: Path | None) -> None:
        if library is not None:
            os.environ["LLAMA_CPP_LIB_PATH"] = str(library.resolve())
        import llama_cpp

        self.module = llama_cpp

    def load(self, file: Path, lora: Path | None) -> Any:
        given = {"n_ctx": LENGTH, "n_batch": LENGTH, "n_ubatch": LENGTH, "n_threads": 1, "n_threads_batch": 1}
        adapter = None if lora is None else str(lora)
        return self.module.Llama(str(file), lora_path=adapter, logits_all=True, verbose=False, **given)

    def logits(self, file: Path, lora: Path | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
        model = self.load(file, lora)

        def of(ids: torch.Tensor) -> torch.Tensor:
            model.reset()
            model.eval(ids.tolist())
            return torch.from_numpy(np.array(model.scores[: len(ids)]))

        return of

    def quantize(self, file: Path, output: Path, kind: int) -> None:
        parameters = self.module.llama_model_quantize_default_params()
        parameters.ftype, parameters.nthread = kind, 1
        if self.module.llama_model_quantize(str(file).encode(), str(output).encode(), parameters):
            sys.exit(f"llama.cpp cannot quantize {file}")


def of_model(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    model.eval()

    @torch.inference_mode()
    def of(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids[None]).logits[0].float()

    return of


def perplexity(logits: Callable[[torch.Tensor], torch.Tensor], windows: torch.Tensor) -> float:
    """Of every token but the first of each window."""
    parts = [logits(ids)[:-1].log_softmax(-1).gather(1, ids[1:, None]).double() for ids in windows]
    return math.exp(-torch.cat(parts).mean().item())


def greedy(logits: Callable[[torch.Tensor], torch.Tensor], prompt: torch.Tensor, count: int) -> list[int]:
    for _ in range(count):
        prompt = torch.cat([prompt, logits(prompt)[-1].argmax()[None]])
    return prompt[-count:].tolist()


def train(base: Path, output: Path, ids: torch.Tensor, steps: int, batch: int) -> float:
    """LoRA from the LoftQ initialization; the last loss."""
    torch.manual_seed(0)
    model = loftq.load_start(AUTO.from_pretrained(base, dtype=torch.float32), base)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    model.train()
    for step in range(steps):
        part = ids[step * batch : (step + 1) * batch]
        loss = model(input_ids=part, labels=part).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(output)
    return loss.item()


def dense_base(directory: Path) -> Base:
    """A plain checkpoint, as the writer of GGUF takes it."""
    checkpoint = open_checkpoint(directory)
    model = skeleton.build(directory, len(checkpoint.tensors))
    rename, roles = skeleton.renamer(model), skeleton.roles(model, checkpoint.tensors)
    tensors = {n: Dense(n, rename(n)[0], roles[n], t.shape, t.dtype) for n, t in checkpoint.tensors.items()}
    return Base(directory, {}, checkpoint, None, model, tensors)  # type: ignore[arg-type]


def as_gguf(directory: Path, place: Path) -> Path:
    base = dense_base(directory)
    place.mkdir()
    writer.write(place, base, None, family_of(base.model), None, "", lambda count: lambda: None)
    return place / "model.gguf"


def differing(directory: Path) -> int:
    """Weights that the package gguf, or GGML's definition of Q2_0, which it lacks, decodes to other values than we."""
    import gguf

    base, found = open_base(directory), 0
    for matrix, expert in ((m, e) for m in base.matrices for e in range(m.experts) or (None,)):
        block, held = block_for(matrix), base.by_suffix(matrix, expert)
        raw = block_bytes(block, matrix, held)
        if block.name == "Q2_0":
            rows = raw.numpy().reshape(-1, 18)
            codes = (rows[:, 2:, None] >> np.array([0, 2, 4, 6], np.uint8) & 3).reshape(len(rows), 64)
            values = (codes.astype(np.float32) - 1) * rows[:, :2].copy().view(np.float16).astype(np.float32)
        else:
            values = gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType(block.type))
        ours = base.read(base.tensors[matrix.name], expert).numpy()
        found += int((values.reshape(matrix.shape) != ours).sum())
    return found


def for_original(model: Path, start: dict[str, torch.Tensor], tuned: dict[str, torch.Tensor]) -> Any:
    """The original with what training added to the initialization: ``W + (B'A' - B0A0)``, of rank 2r."""
    dense = AUTO.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        for name, value in tuned.items():
            dense.get_submodule(name).weight += value - start[name]
    return dense


def deltas(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """``s · B @ A`` of every adapted module."""
    model: Any = PeftModel.from_pretrained(AUTO.from_pretrained(base, dtype=torch.float32), str(adapter)).base_model
    layers = {n: m for n, m in model.model.named_modules() if hasattr(m, "get_delta_weight")}
    return {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}


def ways(given: argparse.Namespace, code: str, work: Path, cpp: LlamaCpp, data: dict[str, torch.Tensor]) -> Iterator:
    """Way -> perplexity, one after the other; and for the exact codes what else is compared."""
    base, run = work / f"{code}-base", work / f"{code}-adapter"
    loftq.quantize(given.model, base, rank=RANK, workers=1, progress=False, **OPTIONS[code])
    loss = train(base, run, data["train"], given.steps, given.batch)
    windows = data["test"]

    def transformers_(model: Any) -> float:
        return perplexity(of_model(model), windows)

    def loaded() -> Any:
        return AUTO.from_pretrained(base, dtype=torch.float32).dequantize()

    def at(model: Any, adapter: Path) -> Any:
        return PeftModel.from_pretrained(model, str(adapter))

    original = AUTO.from_pretrained(given.model, dtype=torch.float32)
    with_experts = json.loads((run / "adapter_config.json").read_text()).get("target_parameters")
    apart = at(loaded(), run)
    yield "base alone", transformers_(loaded())
    yield "initialization", transformers_(at(loaded(), base / "loftq_init"))
    yield "adapter apart", transformers_(apart)
    yield "adapter on the original", transformers_(at(original, run))
    if not with_experts:  # of which it has no form
        start, tuned = deltas(base, base / "loftq_init"), deltas(base, run)
        yield "adapter for the original, rank 2r", transformers_(for_original(given.model, start, tuned))
    loftq.merge(base, work / f"{code}-merged", adapter=run, dtype="bfloat16", progress=False)
    yield "merged, bfloat16", transformers_(AUTO.from_pretrained(work / f"{code}-merged", dtype=torch.float32))
    if code == "int":
        loftq.export(base, work / "gguf", to="gguf", adapter=run, progress=False)
        exact = cpp.logits(work / "gguf" / "model.gguf", work / "gguf" / "adapter.gguf")
        yield "llama.cpp: exact codes, adapter apart", perplexity(exact, windows)
        texts = [(greedy(of_model(apart), p[:32], 24), greedy(exact, p[:32], 24)) for p in windows[:4]]
        same = [next((i for i, (a, b) in enumerate(zip(*t, strict=True)) if a != b), 24) for t in texts]
        yield "exact", {"greedy tokens alike, of 24": same, "weights that differ": differing(base), "loss": loss}
    merged = as_gguf(work / f"{code}-merged", work / f"{code}-gguf")
    yield "llama.cpp: merged, BF16", perplexity(cpp.logits(merged), windows)
    for name, kind in REQUANTIZED.items():
        cpp.quantize(merged, merged.with_name(f"{name}.gguf"), kind)
        yield f"llama.cpp: merged, then {name}", perplexity(cpp.logits(merged.with_name(f"{name}.gguf")), windows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a Llama or Qwen3-MoE in one directory")
    parser.add_argument("--train", type=Path, required=True, help="text to train on")
    parser.add_argument("--data", type=Path, required=True, help="text to measure on")
    parser.add_argument("--library", type=Path, help="where libllama lies [default: that of llama-cpp-python]")
    parser.add_argument("--codes", default=",".join(OPTIONS))
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "data" / "after-training.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    cpp, tokenizer = LlamaCpp(given.library), transformers.AutoTokenizer.from_pretrained(given.model)

    def cut(path: Path, count: int) -> torch.Tensor:
        ids = tokenizer(text(path)[: count * LENGTH * 8], return_tensors="pt").input_ids[0]
        return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)[:count]

    data = {"train": cut(given.train, given.steps * given.batch), "test": cut(given.data, given.windows)}
    result: dict[str, Any] = {
        "data": [given.train.name, given.data.name],
        "environment": environment(),
        "rank": RANK,
        "rate": RATE,
        "steps": given.steps,
        "batch": given.batch,
        "tokens": LENGTH,
        "n": data["test"][:, 1:].numel(),
        "codes": {},
    }
    with tempfile.TemporaryDirectory() as work:
        original = AUTO.from_pretrained(given.model, dtype=torch.float32)
        result["original"] = perplexity(of_model(original), data["test"])
        result["original in llama.cpp"] = perplexity(cpp.logits(as_gguf(given.model, Path(work) / "o")), data["test"])
        for code in given.codes.split(","):
            rows = result["codes"].setdefault(code, {})
            for way, value in ways(given, code, Path(work), cpp, data):
                rows[way] = value
                print(f"{code}: {way}: {value}", flush=True)
                given.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {given.output}")


if __name__ == "__main__":
    main()
