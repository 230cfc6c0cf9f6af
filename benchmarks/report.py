"""Write docs/performance.md from the measurements in docs/data/bench: goals, what was reached, and what limits it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import ROOT, goal, shown

SCRIPTS = {  # in the order of the page: title, and what limits the result
    "solver": (
        "LoftQ of one matrix",
        "Mostly products of the matrix with a thin one, in float32; then quantization, forming W - BA, and orthonormal "
        "bases by small float64 matrices. Scales in bfloat16 (the peers keep float32) cost a part of the error.",
    ),
    "quantize": (
        "Quantizing and decoding",
        "Decoding is bound by fresh memory for the result: the faults of its pages alone take most of the time of any "
        "side. Where loftq decodes for a product, it uses the same memory again. Up to 4 bits, quantizing compares a "
        "weight with every gap between levels; at 8 bits a table tells near which gap it lies.",
    ),
    "streaming": (
        "A whole checkpoint",
        "Every worker solves one matrix at a time, so a checkpoint takes the time of its matrices. A step holds three "
        "copies of the matrix in float32, and its codes.",
    ),
    "one_pass": (
        "Calibrating and solving in one pass",
        "On disk are the moments of one block, fit and held out, `8 in²` bytes for each different input, and the "
        "hidden states of all windows. In memory, a worker holds about five float64 matrices of `in²`; the widest is "
        "11,008. The time of a step grows with `out in²`.",
    ),
    "shared": (
        "Processes that share",
        "Every process plans for itself, and reads every matrix back from the file that keeps it until its shard "
        "is written.",
    ),
    "cluster": (
        "A Ray cluster",
        "Every worker imports the libraries and plans once; beside that, Ray's daemons take what they take.",
    ),
    "train_step": (
        "A training step",
        "The products are the same BLAS calls for every side, and most of a dense step. Every packed "
        "weight is decoded twice a step, forward and backward.",
    ),
    "train_bfloat16": (
        "A training step in bfloat16",
        "Without AVX-512, PyTorch multiplies bfloat16 in loops of its own. Packed weights and their adapters are then "
        "multiplied in float32, and rounded; the head and attention stay PyTorch's.",
    ),
    "generate": (
        "One token, and a loaded model",
        "Packed weights are looked up sixteen at a time in a register (AVX-512; eight with AVX2), so that computing "
        "takes about as long as reading them from memory. The rest is Python's: a packed layer's call, and PEFT's "
        "around it, which models of small matrices feel most. What is held beyond the files is mostly Numba and LLVM, "
        "once kernels are there, whatever the model.",
    ),
    "llama_cpp_token": (
        "One token beside llama.cpp",
        "Under packed weights llama.cpp rounds activations to 8 bits, and multiplies whole numbers; ours stay "
        "floating-point numbers. At 4 bits the 35 products alone take about 14 ms, more than half of a token. "
        "Transformers' own operators (norms, rotary embedding, attention, cache) take about 5 ms in five layers: the "
        "model of hidden 256 with dense weights and no adapter shows it. In inference the adapter is part of the "
        "packed layer's operator, and a token with it takes 3 to 6 % longer than without.",
    ),
    "trellis": (
        "The trellis code",
        "The kernels of `lloyd` look sixteen weights up in a register. A table of 1,024 levels fits none: every weight "
        "is a load of its own, and gathering instructions are no faster. The goals against `lloyd` were set when one "
        "of its weights was a load too. Where columns have rates of their own, every weight loads its shift, and a "
        "read serves eight rows. Encoding is bound by arithmetic: two "
        "multiply-adds and a minimum for each of the 2^L windows of a weight, half of a vector register at a time.",
    ),
    "experts": (
        "Experts",
        "For a few tokens an expert's weights are read once: packed they are a fourteenth of the bytes, and multiplied "
        "as they are decoded. With 512 tokens, 32 to an expert, they are decoded first: the products are the same BLAS "
        "calls for every side, and decoding comes to them. PEFT's wrapper adds the adapter to all dense stacks before "
        "each call, so that its time and memory hardly depend on the number of tokens. While a checkpoint is quantized "
        "the adapter of a shard waits in memory: of a whole 1 GiB shard that is 0.3 GB at rank 16, by its sizes.",
    ),
    "startup": (
        "Start-up",
        "`import loftq` leaves torch, transformers and PEFT until they are needed. Numba compiles a kernel when it is "
        "first used on a machine, and reads it from its cache later.",
    ),
    "scaling": (
        "Scaling",
        "A step is passes over the matrix, for quantization, and products of it with a thin matrix a little wider than "
        "the rank. Up to 512 rows or columns the SVD is exact. A worker is one thread; workers share the bandwidth.",
    ),
    "gpu": ("On a GPU", ""),
}


def verdict(row: dict[str, Any]) -> str:
    return {True: "**reached**", False: "**missed**", None: ""}[row["reached"]]


def spread(row: dict[str, Any]) -> str:
    """``1.5x (1.4x to 1.7x)``, or one number where there is one."""
    low, middle, high = (shown(row[k], row["unit"]) for k in ("min", "median", "max"))
    return middle if row["n"] == 1 else f"{middle} ({low} to {high})"


def section(name: str, result: dict[str, Any] | None) -> Iterator[str]:
    title, limit = SCRIPTS[name]
    yield f"## {title}"
    if result is None:
        yield f"Not yet measured (`benchmarks/{name}.py`)."
        return
    yield result["question"]
    yield f"Compared with: {result['peer']}"
    yield f"Goal: {result['goal']}"
    if result["quick"]:
        yield "**A quick run: these are not measurements.**"
    judged = [(c["case"], row) for c in result["cases"] for row in c["findings"] if goal(row)]
    if judged:
        rows = [f"| {case} | {r['what']} | {goal(r)} | {spread(r)} | {verdict(r)} |" for case, r in judged]
        yield "\n".join(["| case | what | goal | measured | |", "|---|---|---|---|---|", *rows])
    if limit:
        yield f"What limits it: {limit}"
    if name == "scaling" and (ROOT / "docs" / "images" / "scaling.png").exists():
        yield "![Time of LoftQ by size, rank, steps and workers](images/scaling.png)"
    yield "<details><summary>All numbers</summary>"
    for case in result["cases"]:
        rows = [f"| {row['side']} | {spread(row)} | {row['n']} |" for row in case["times"]]
        rows += [f"| {row['what']} | {spread(row)} | {row['n']} |" for row in case["findings"]]
        yield "\n".join([f"{case['case']}:\n", "| | median (min to max) | n |", "|---|---|---|", *rows])
    yield from result["notes"]
    yield "</details>"
    yield f"<sub>{provenance(result['environment'])}</sub>"


def provenance(environment: dict[str, Any]) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in environment["versions"].items())
    machine = environment["gpu"] or f"{environment['cpu']}, {environment['cores']} cores"
    changed = " with changes" if environment["dirty"] else ""
    return (
        f"Commit {environment['commit']}{changed}, {environment['date']}; {machine}; {environment['threads']} threads, "
        f"load before {environment['load']}; {versions}."
    )


def page(results: dict[str, Any]) -> str:
    head = [
        "# Performance",
        "Made by `make bench` (`benchmarks/report.py`) from the files in `docs/data/bench`; do not edit.",
        "Sides are called in turn in one process, after a call to warm up. A speed is a ratio of two calls of one "
        "round; times and ratios are medians, with the smallest and the largest. A goal is judged by the median.",
    ]
    parts = [part for name in SCRIPTS for part in section(name, results.get(name))]
    return "\n\n".join(head + parts) + "\n"


def main(data: Path = ROOT / "docs" / "data" / "bench", output: Path = ROOT / "docs" / "performance.md") -> None:
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(data.glob("*.json"))}
    output.write_text(page(found), encoding="utf-8")
    print(f"written: {output}, from {', '.join(found) or 'no measurements'}")


if __name__ == "__main__":
    main()
