"""How much better than the paper's mixed precision are bits that a budget chooses, at the same stored bytes?

The paper gives the first k layers 4 bits and the rest 2. The budget may spend exactly as many bytes, on
all-MiniLM-L6-v2 or --model: greedily, or at the optimum of the mixed-integer program. Beside them the widest uniform
code that takes no more. All have rank 16 everywhere and T = 5, the best step kept; once with the paper's NormalFloat
and absmax scales, once with fitted scales and their code.

Weight error is ||W - Q - B A|| / ||W|| over all matrices. Relative error, which a budget aims at, is the root of the
mean over all weights of the squared error relative to its matrix; expected from one step, and as found. Quality, before
any fine-tuning, is the cosine of sentence embeddings with full precision's, or a decoder's perplexity.

    python benchmarks/budget.py [--quick] [--model NAME=DIRECTORY] [--data wt2.test.txt.gz]
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fitted import RANK, STEPS, Model, minilm
from harness import ROOT, environment
from loftq import planning
from loftq.checkpoint.curves import Curves, measured
from loftq.numerics import dequantize
from loftq.planning import Plan, Policy
from loftq.solver import solve
from loftq.sources.checkpoint import Source, open_source
from loftq.spec import SolveSpec

SETTINGS = {"nf, absmax": {"code": "nf", "scales": "formula"}, "lloyd, fitted": {"code": "lloyd", "scales": "fitted"}}
AVERAGES = ("2.5", "3.0")  # of the paper's rule; 2.25 gives no layer of six 4 bits


class Side(NamedTuple):
    """One way to spend the bytes."""

    name: str
    plan: Plan
    expected: float


def policies(code: str, scales: str, steps: int) -> tuple[Policy, dict[str, Any]]:
    """The policy that measures, at more than is spent, and what all policies share."""
    shared = {"code": code, "rank": str(RANK), "solve": SolveSpec(steps=steps, scales=scales)}
    return Policy(budget="4", **shared), shared


def sides(source: Source, curves: Curves, shared: dict[str, Any], average: str) -> list[Side]:
    """The paper's rule, and what else there is for its bytes."""

    def expected(plan: Plan) -> float:
        by_choice = {m: {(c.bits, c.block_size, c.rank): c.error for c in curves[m]} for m in curves}
        errors = [by_choice[m.module][m.quant.bits, m.quant.block_size, m.rank] for m in plan.matrices]
        return math.sqrt(sum(errors) / sum(m.numel for m in plan.matrices))

    def planned(**options: Any) -> Plan:
        return planning.make(source.tensors, source.roles, Policy(**shared, **options))

    def bytes_of(plan: Plan) -> int:
        return sum(m.bytes + planning.factor_bytes(m, m.rank) for m in plan.matrices)

    paper = planned(bits=average)
    limit = bytes_of(paper)
    uniform = next(plan for plan in (planned(bits=bits) for bits in "432") if bytes_of(plan) <= limit)
    found = [Side(f"paper: average {average}", paper, expected(paper))]
    found += [Side(f"uniform: {uniform.matrices[0].quant.bits} bits", uniform, expected(uniform))]
    for method in ("greedy", "milp"):
        chosen = planning.allocate(curves, limit, method).chosen
        plan = planning.make(source.tensors, source.roles, Policy(**shared), chosen)
        assert bytes_of(plan) <= limit
        found.append(Side(f"budget: {method}", plan, expected(plan)))
    return found


def row(model: Model, side: Side) -> dict[str, Any]:
    """Every matrix solved, and what that leaves."""
    left = size = relative = 0.0
    dense = {}
    for m in side.plan.matrices:
        weight = model.weights[m.module]
        solution = solve(weight, m.quant, m.rank, side.plan.solve, m.name)
        dense[m.module] = dequantize(solution.quantized, m.quant) + solution.b @ solution.a
        error = (weight - dense[m.module]).double().square().sum().item()
        norm = weight.double().square().sum().item()
        left, size, relative = left + error, size + norm, relative + m.numel * error / norm
    weights = sum(m.numel for m in side.plan.matrices)
    return {
        "side": side.name,
        "bits_per_weight": round(8 * sum(m.bytes for m in side.plan.matrices) / weights, 4),
        "bytes": sum(m.bytes for m in side.plan.matrices),
        "expected_relative_error": float(f"{side.expected:.5g}"),
        "relative_error": float(f"{math.sqrt(relative / weights):.5g}"),
        "error": float(f"{math.sqrt(left / size):.5g}"),
        "quality": float(f"{model.quality(dense):.5g}"),
        "widths": {str(bits): sum(m.quant.bits == bits for m in side.plan.matrices) for bits in (2, 3, 4, 8)},
    }


def rows(
    model: Model, directory: str, settings: dict[str, dict[str, str]], averages: tuple[str, ...], steps: int
) -> list[dict[str, Any]]:
    found = []
    for setting, options in settings.items():
        measuring, shared = policies(steps=steps, **options)
        source = open_source(directory, measuring)
        curves = measured(source, measuring, None, workers=1)
        for average in averages:
            results = [row(model, side) for side in sides(source, curves, shared, average)]
            for result in results:
                ratio = round(result["error"] / results[0]["error"], 4)
                found.append({"setting": setting, "average": float(average), **result, "error_ratio": ratio})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="one row of each kind, one step: does it run? nothing is written"
    )
    parser.add_argument(
        "--model", action="append", metavar="NAME=DIRECTORY", help="repeatable, beside all-MiniLM-L6-v2"
    )
    parser.add_argument("--data", type=Path, help="text, may be .gz [default: Python's documentation]")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "data" / "budget.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    averages, steps = (AVERAGES[:1], 1) if options.quick else (AVERAGES, STEPS)
    settings = dict(list(SETTINGS.items())[: 1 if options.quick else None])
    models, begun_in = [], environment()
    for named in options.model or [f"all-MiniLM-L6-v2={minilm()}"]:
        name, _, directory = named.rpartition("=")
        name, model = name or Path(directory).resolve().name, Model(directory, options.data)
        what = "perplexity" if model.decoder else "cosine"
        full = model.quality({})
        print(
            f"\n{name}: {len(model.weights)} matrices, rank {RANK}, T = {steps}; {what} in full precision {full:.5g}\n"
        )
        print(
            f"| code, scales | spent by | bits per weight | expected | relative error | weight error | ratio | {what} |"
        )
        print("|---|---|---|---|---|---|---|---|")
        table = rows(model, directory, settings, averages, steps)
        for r in table:
            cells = [r["setting"], r["side"], f"{r['bits_per_weight']:.3f}", f"{r['expected_relative_error']:.4f}"]
            cells += [f"{r['relative_error']:.4f}", f"{r['error']:.4f}", f"{r['error_ratio']:.3f}"]
            cells += [f"{r['quality']:.4f}" if what == "cosine" else f"{r['quality']:.1f}"]
            print("|", " | ".join(cells), "|", flush=True)
        measured_on = {"measure": what, "n": model.right.numel() if model.decoder else len(model.right)}
        models.append(
            {"model": name, "matrices": len(model.weights), **measured_on, "full_precision": full, "rows": table}
        )
    if options.quick:
        return
    result = {
        "data": options.data.name if options.data else "pydoc_data.topics",
        "environment": begun_in,
        "rank": RANK,
        "steps": steps,
        "models": models,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten: {options.output}")


if __name__ == "__main__":
    main()
