"""Does LoftQ's initialization meet PEFT's own criterion, whatever the scaling alpha / r? And does PEFT's rule?

PEFT accepts a LoftQ initialization if the mean squared and the mean absolute error of a model's output, against the
model in full precision, are below those of plain 4-bit quantization (QLoRA) divided by 1.03. It tests alpha / r = 0.5
only.

"PEFT's rule" is what PEFT does up to 0.21: the factors of the last step, not divided by s, while the forward pass
multiplies by s. All sides share quantizer and SVD (NF4, blocks of 64, float32 scales); ours keeps the best step.

    python benchmarks/peft_criterion.py --model llama-6m=DIRECTORY --model minilm=ANOTHER
"""

import argparse
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from harness import ROOT, environment
from loftq.numerics import dequantize, quantize, truncated_svd
from loftq.solver import solve
from loftq.spec import QuantSpec, SolveSpec

QUANT = QuantSpec(bits=4, scale_dtype="float32")
RANKS, STEPS, SCALINGS, MARGIN = (16, 64), (1, 5), (0.25, 0.5, 1.0, 2.0), 1.03
PROMPTS = [
    "The old lighthouse keeper climbed the stairs every evening to light the lamp.",
    "A farmer has 17 sheep and buys 5 more. How many sheep does the farmer have?",
    "In the spring of that year the river rose higher than anyone could remember.",
    "The committee published its report on Tuesday, and the minister resigned on Friday.",
    "To bake bread you need flour, water, salt, yeast and some patience.",
    "Mercury is the planet nearest to the sun; Neptune is the farthest.",
    "She asked whether the train to the coast still stopped at the small station.",
    "The team scored twice in the last ten minutes and won the match.",
    "Water boils at a lower temperature on a mountain because the air is thinner.",
    "The museum bought the painting at an auction for four million pounds.",
]


def load(directory: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model in float32 and the prompts as one padded batch."""
    architecture = AutoConfig.from_pretrained(directory, trust_remote_code=False).architectures[0]
    auto = AutoModelForCausalLM if architecture.endswith("ForCausalLM") else AutoModel
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return auto.from_pretrained(directory, dtype=torch.float32, trust_remote_code=False).eval(), inputs


def matrices(model: Any) -> dict[str, Tensor]:
    """The weights that ``target_modules="all-linear"`` wraps: of every linear layer but the head."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    return {name: module.weight.detach() for name, module in linear.items()}


def outputs(model: nn.Module, inputs: dict[str, Tensor], weights: dict[str, Tensor]) -> Tensor:
    """Logits, or hidden states, of the tokens that are not padding, with some weights replaced."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in weights.items():
            changed.get_submodule(name).weight.copy_(weight)
        result = changed(**inputs)
    values = result.logits if "logits" in result else result.last_hidden_state
    return values[inputs["attention_mask"].bool()]


def last_step(weight: Tensor, rank: int, steps: int) -> tuple[Tensor, Tensor]:
    """Q and B A as PEFT keeps them."""
    product = torch.zeros_like(weight)
    backbone = product
    for _ in range(steps):
        backbone = dequantize(quantize(weight - product, QUANT), QUANT)
        b, a = truncated_svd(weight - backbone, rank, method="exact")
        product = b @ a
    return backbone, product


def rows(directory: str) -> Iterator[dict[str, Any]]:
    model, inputs = load(directory)
    weights = matrices(model)
    right = outputs(model, inputs, {})

    def errors(replaced: dict[str, Tensor]) -> dict[str, float]:
        difference = outputs(model, inputs, replaced) - right
        means = {"mse": difference.square().mean().item(), "mae": difference.abs().mean().item()}
        return {name: float(f"{mean:.5g}") for name, mean in means.items()}

    qlora = errors({name: dequantize(quantize(w, QUANT), QUANT) for name, w in weights.items()})
    for rank in RANKS:
        for steps in STEPS:
            spec = SolveSpec(steps=steps, svd="exact")
            solutions = {name: solve(w, QUANT, rank, spec, name) for name, w in weights.items()}
            theirs = {name: last_step(w, rank, steps) for name, w in weights.items()}
            for s in SCALINGS:
                factors = {name: solution.factors(s) for name, solution in solutions.items()}
                started = {n: dequantize(solutions[n].quantized, QUANT) + s * (b @ a) for n, (b, a) in factors.items()}
                yield {
                    "output": "logits" if right.shape[-1] == getattr(model.config, "vocab_size", 0) else "hidden state",
                    "n": right.shape[0],
                    "matrices": len(weights),
                    "rank": rank,
                    "steps": steps,
                    "scaling": s,
                    "qlora": qlora,
                    "loftq": errors(started),
                    "peft_rule": errors({name: q + s * product for name, (q, product) in theirs.items()}),
                }


def met(row: dict[str, Any], side: str) -> bool:
    return all(row[side][k] < row["qlora"][k] / MARGIN for k in ("mse", "mae"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, metavar="NAME=DIRECTORY", help="repeatable")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "data" / "peft_criterion.json")
    options = parser.parse_args()
    torch.manual_seed(0)
    found = []
    print("error over QLoRA's error: mse, mae (criterion: both below 1/1.03 = 0.971)\n")
    print("| model | rank | T | alpha/r | LoftQ (ours) | met | PEFT's rule | met |")
    print("|---|---|---|---|---|---|---|---|")
    for named in options.model:
        name, _, directory = named.rpartition("=")
        for row in rows(directory):
            row = {"model": name or Path(directory).resolve().name, **row}
            found.append(row)
            cells = [row["model"], str(row["rank"]), str(row["steps"]), f"{row['scaling']:g}"]
            for side in ("loftq", "peft_rule"):
                ratios = [row[side][k] / row["qlora"][k] for k in ("mse", "mae")]
                cells += [f"{ratios[0]:.3f}, {ratios[1]:.3f}", "yes" if met(row, side) else "**no**"]
            print("|", " | ".join(cells), "|", flush=True)
    result = {
        "criterion": "mse and mae of the output below QLoRA's / 1.03",
        "environment": environment(),
        "seed": 0,
        "prompts": len(PROMPTS),
        "rows": [{**row, "loftq_met": met(row, "loftq"), "peft_rule_met": met(row, "peft_rule")} for row in found],
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(
        f"\nours met {sum(met(r, 'loftq') for r in found)} of {len(found)}, PEFT's rule "
        f"{sum(met(r, 'peft_rule') for r in found)}; written: {options.output}"
    )


if __name__ == "__main__":
    main()
