"""How much closer are the outputs of calibrated initializations, at the same stored bytes? What does that do, and cost?

All presets against the paper's LoftQ (NormalFloat, absmax scales, T = 5), rank 16. Published methods have the paper's
quantizer, and once more fitted scales. They are calibrated on one text; every fourth window of it decides which step is
kept. Output error is measured on another text, which no method has seen:

    sqrt( sum ||(W - Q - B A) x||² / sum ||W x||² )     over all tokens x and all matrices

and beside it the geometric mean, over matrices, of each one's ratio to the paper's. Before any fine-tuning: perplexity
of a decoder, or cosine of an encoder's sentence embeddings with full precision's. Time is that of one CPU thread for
all matrices, statistics included, against the paper's.

Goals: output error at 2.25, 3.25, 4.25 bits at most 0.40, 0.50, 0.60 of the paper's; the distance to 16 bits at 2 bits
at least halved; 10 times its time at most.

    python benchmarks/calibrated.py --fit wt103.train.txt.gz --test wt2.test.txt.gz [--model llama=DIRECTORY]
    python benchmarks/calibrated.py --trellis --fit … --test … --output docs/data/trellis-calibrated.json
    python benchmarks/calibrated.py --show      # the table of docs/methods.md, from what was measured
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoTokenizer

import loftq
from fitted import RANK, WIDTHS, Model, minilm
from harness import ROOT, environment
from loftq.formats.statistics import Statistics
from loftq.numerics import dequantize
from loftq.solver import solve
from loftq.spec import QuantSpec, SolveSpec, code_for, quant_spec, solve_spec, stored_bytes

GOALS = {2: 0.40, 3: 0.50, 4: 0.60}
SAMPLES, TOKENS = 128, 256
COLLECTED = {"full": ("full", SAMPLES), "half": ("full", SAMPLES // 2), "fisher": ("fisher", SAMPLES)}


class Side(NamedTuple):
    quant: QuantSpec
    spec: SolveSpec
    statistics: str = "full"  # which of COLLECTED; empty for none


Sides = Callable[[int, bool], dict[str, Side]]  # of a number of bits, and whether the model is a decoder


def sides(bits: int, decoder: bool) -> dict[str, Side]:
    """The paper's side first. ``nested``: one-byte scales for blocks of 35, in no more bytes than two for 64."""
    nf, own = QuantSpec(bits=bits), QuantSpec(bits=bits, code=code_for("auto", bits, "fitted"))
    lloyd = QuantSpec(bits=bits, code="lloyd")
    nested = replace(lloyd, block_size=35, double_quant=True)
    found = {name: Side(nf, solve_spec(name), "") for name in ("loftq", "qlora")}
    found["fitted"] = Side(own, solve_spec("fitted"), "")
    found["descent, data-free"] = Side(own, solve_spec("descent"), "")
    for name in ("qera-diag", "qera-full", "cloq", "projq", "srr"):
        found[name] = Side(nf, solve_spec(name))
    if decoder:  # squared gradients need a loss
        found["lq-lora"] = Side(nf, solve_spec("lq-lora"), "fisher")
    for name in ("qera-full", "cloq", "projq"):
        found[f"{name}, fitted"] = Side(own, solve_spec(name, scales="fitted"))
    found["descent"] = Side(own, solve_spec("descent"))
    found["descent, half the windows"] = Side(own, solve_spec("descent"), "half")
    if own != lloyd:
        found["descent, lloyd"] = Side(lloyd, solve_spec("descent"))
    found["descent, lloyd, nested"] = Side(nested, solve_spec("descent"))
    return found


def trellis(bits: int, decoder: bool) -> dict[str, Side]:
    """The trellis beside the default with a calibration; a byte of every column, for its rate, is counted."""
    rates = {2: (2.1875, 2.125, 1.9375, 1.875, 1.4375, 1.375), 3: (3.1875, 3.125), 4: (4,)}[bits]
    spec = solve_spec("descent")
    found = {
        "loftq": Side(QuantSpec(bits=bits), solve_spec("loftq"), ""),
        "descent": Side(quant_spec(spec, bits), spec),
    }
    for rate in rates:
        found[f"trellis of {rate}, descent"] = Side(quant_spec(spec, rate, "trellis"), spec)
    if bits == 2:
        feedback = solve_spec("cloq", scales="fitted")
        found["trellis of 2.125, cloq, fitted"] = Side(quant_spec(feedback, 2.125, "trellis"), feedback)
        even = replace(quant_spec(spec, 2.1875, "trellis"), column_rates=False)
        found["trellis of 2.1875, descent, one rate"] = Side(even, spec)
    return found


class Calibrated:
    """A model, the statistics of two texts, and what collecting the first took."""

    def __init__(self, name: str, directory: str, fit: Path, test: Path, sides: Sides) -> None:
        self.name, self.model = name, Model(directory, test)
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        self.seconds = {"": 0.0}
        self.statistics: dict[str, Statistics | None] = {"": None}
        chosen = [side for bits in WIDTHS for side in sides(bits, self.model.decoder).values()]
        for which in (kind for kind in COLLECTED if any(side.statistics == kind for side in chosen)):
            begun = time.process_time()
            self.statistics[which] = self._collected(fit, tokenizer, which)
            self.seconds[which] = time.process_time() - begun
        self.test = self._collected(test, tokenizer, "full")

    def _collected(self, text: Path, tokenizer: Any, which: str) -> Statistics:
        kind, samples = COLLECTED[which]
        return loftq.calibrate(
            self.model.dense, text, tokenizer, kind=kind, samples=samples, max_length=TOKENS, progress=False
        )

    def measured(self, side: Side) -> dict[str, Any]:
        statistics, dense, kept, spent = self.statistics[side.statistics], {}, [], 0.0
        left: dict[str, tuple[float, float]] = {}
        weights = [0.0, 0.0]
        for name, weight in self.model.weights.items():
            moments = statistics.moments(name) if statistics else None
            begun = time.process_time()
            solution = solve(weight, side.quant, RANK, side.spec, name, moments)
            spent += time.process_time() - begun
            dense[name] = dequantize(solution.quantized, side.quant) + solution.b @ solution.a
            seen = self.test.moments(name)
            assert seen is not None
            left[name] = seen.held.norm(weight - dense[name]), seen.held.norm(weight)
            weights[0] += (weight - dense[name]).double().square().sum().item()
            weights[1] += weight.double().square().sum().item()
            kept.append(solution.kept)
        size = sum(stored_bytes(side.quant, *w.shape) for w in self.model.weights.values())
        return {
            "bits_per_weight": round(8 * size / sum(w.numel() for w in self.model.weights.values()), 4),
            "weight_error": math.sqrt(weights[0] / weights[1]),
            "output_error": math.sqrt(sum(e**2 for e, _ in left.values()) / sum(n**2 for _, n in left.values())),
            "each": {name: e / n for name, (e, n) in left.items()},
            "kept": sum(kept) / len(kept),
            "quality": self.model.quality(dense),
            "seconds": spent,
        }


def rows(subject: Calibrated, sides: Sides) -> list[dict[str, Any]]:
    found = []
    for bits in WIDTHS:
        chosen = sides(bits, subject.model.decoder)
        for side in chosen.values():  # compiles the kernels
            solve(torch.eye(2 * RANK), side.quant, RANK, replace(side.spec, steps=2))
        results = {name: subject.measured(side) for name, side in chosen.items()}
        paper = results["loftq"]
        for name, result in results.items():
            ratios = [math.log(error / paper["each"][m]) for m, error in result["each"].items()]
            row = {"bits": bits, "side": name, "code": chosen[name].quant.code, "scales": chosen[name].spec.scales}
            row |= {key: value for key, value in result.items() if key != "each"}
            row |= {f"{key}_ratio": result[key] / paper[key] for key in ("weight_error", "output_error")}
            row["each_ratio"] = math.exp(sum(ratios) / len(ratios))
            row["time_ratio"] = (result["seconds"] + subject.seconds[chosen[name].statistics]) / paper["seconds"]
            found.append({key: float(f"{v:.5g}") if isinstance(v, float) else v for key, v in row.items()})
    return found


def show(name: str, what: str, table: list[dict[str, Any]]) -> None:
    print(f"\n{name}, rank {RANK}\n")
    ratios = f"output error | ratio | of each | weight error | {what} | time"
    print(f"| bits per weight | initialization | code, scales | {ratios} |")
    print("|---|---|---|---|---|---|---|---|---|")
    for r in table:
        cells = [f"{r['bits_per_weight']:.2f}", r["side"], f"{r['code']}, {r['scales']}", f"{r['output_error']:.4f}"]
        cells += [f"{r['output_error_ratio']:.3f}", f"{r['each_ratio']:.3f}", f"{r['weight_error_ratio']:.3f}"]
        cells += [f"{r['quality']:.4f}" if what == "cosine" else f"{r['quality']:.2f}", f"{r['time_ratio']:.1f}"]
        print("|", " | ".join(cells), "|", flush=True)


def figures(result: dict[str, Any]) -> str:
    """One line an initialization, for docs/methods.md: three widths in a cell."""
    models = result["models"]
    starts = list(dict.fromkeys(row["side"] for model in models for row in model["rows"]))
    measures = [cell for m in models for cell in (f"{m['model']}: outputs", "weights", m["measure"], "time")]
    lines = [f"| initialization | {' | '.join(measures)} |", f"|---|{'---|' * len(measures)}"]
    for start in starts:
        cells = []
        for model in models:
            rows = {row["bits"]: row for row in model["rows"] if row["side"] == start}
            digits = 3 if model["measure"] == "cosine" else 1
            shown = {"output_error_ratio": 2, "weight_error_ratio": 2, "quality": digits, "time_ratio": 1}
            for key, n in shown.items():
                values = [f"{rows[bits][key]:.{n}f}" if bits in rows else "-" for bits in WIDTHS]
                cells.append(" / ".join(values) if rows else "")
        lines.append(f"| {start} | {' | '.join(cells)} |")
    full = "; ".join(f"{m['model']} {m['full_precision']:.4g}, n = {m['n']}" for m in models)
    where = result["environment"]
    told = (
        f"Each cell has three figures: at 2.25 / 3.25 / 4.25 stored bits, rank {result['rank']}, before any "
        "fine-tuning. Outputs, weights: the error, divided by that of the paper's LoftQ; below 1 is better. The "
        f"outputs are on {result['test']}, which no initialization has seen. Calibration: {result['samples']} windows "
        f"of {result['tokens']} tokens of {result['fit']}. Time: divided by that of the paper's LoftQ, calibration "
        f"included. Full precision: {full}."
    )
    machine = f"{where['cpu']}, one thread, torch {where['versions']['torch']}"
    about = f"commit {where['commit']}, {machine}, seed 0, one timing on a loaded machine"
    return "\n".join([told, "", *lines, "", f"<sub>benchmarks/calibrated.py, {about}.</sub>"])


def update(page: Path, text: str) -> None:
    """Put ``text`` between the two markers of a page."""
    before, begin, rest = page.read_text(encoding="utf-8").partition("<!-- figures: begin -->\n")
    _, end, after = rest.partition("<!-- figures: end -->")
    page.write_text(f"{before}{begin}{text}\n{end}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", action="append", default=[], metavar="NAME=DIRECTORY", help="beside all-MiniLM-L6-v2"
    )
    parser.add_argument("--fit", type=Path, help="text to calibrate on, may be .gz")
    parser.add_argument("--test", type=Path, help="another, to measure on")
    parser.add_argument("--trellis", action="store_true", help="the trellis at several rates, beside the default")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "data" / "calibrated.json")
    options = parser.parse_args()
    page = ROOT / "docs" / "methods.md"
    if options.show:
        return update(page, figures(json.loads(options.output.read_text("utf-8"))))
    if options.fit is None or options.test is None:
        parser.error("--fit and --test are needed")
    torch.set_num_threads(1)
    models, begun_in, compared = [], environment(), trellis if options.trellis else sides
    for named in [f"all-MiniLM-L6-v2={minilm()}", *options.model]:
        name, _, directory = named.rpartition("=")
        subject = Calibrated(name or Path(directory).resolve().name, directory, options.fit, options.test, compared)
        what = "perplexity" if subject.model.decoder else "cosine"
        table = rows(subject, compared)
        show(subject.name, what, table)
        models.append(
            {
                "model": subject.name,
                "matrices": len(subject.model.weights),
                "measure": what,
                "full_precision": subject.model.quality({}),
                "n": subject.model.right.numel() if subject.model.decoder else len(subject.model.right),
                "calibration_seconds": {k: round(v, 1) for k, v in subject.seconds.items() if k},
                "rows": table,
            }
        )
    result = {
        "goal": {"output_error_ratio": GOALS, "time_ratio": 10.0},
        "fit": options.fit.name,
        "test": options.test.name,
        "samples": SAMPLES,
        "tokens": TOKENS,
        "environment": begun_in,
        "rank": RANK,
        "models": models,
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if not options.trellis:
        update(page, figures(result))
    print(f"\nwritten: {options.output}")


if __name__ == "__main__":
    sys.exit(main())
