"""What does a matrix cost by its size, with each of the presets that need no calibration?

Random matrices at 2 bits, rank 16, T = 5, one thread. CPU seconds, and these as a multiple of the paper's LoftQ on the
same matrix; the sides take turns, so that a loaded machine slows all of them. All grow as the weights do. With --llama
also the shapes of Llama-2-7B, one matrix each, and what its 32 layers would take of one core: the sum over their 224
matrices.

    python benchmarks/widths.py --sizes 1024 2048 4096
    python benchmarks/widths.py --llama --sizes --sides loftq fitted trellis-8 trellis-10 \\
        --output docs/data/llama7b.json
"""

import argparse
import json
import time
from pathlib import Path

import torch

from harness import ROOT, environment
from loftq.solver import solve
from loftq.spec import PRESETS, QuantSpec, SolveSpec, code_for

RANK, BITS, RATE = 16, 2, 2.1875
PRESETS_OF = {"loftq": "loftq", "fitted": "fitted", "descent": "descent", "trellis-8": "fitted", "trellis-10": "fitted"}
LLAMA = {(4096, 4096): 4 * 32, (11008, 4096): 2 * 32, (4096, 11008): 32}  # out, in: how many of them


def quant(side: str) -> QuantSpec:
    code, _, window = side.partition("-")
    if code == "trellis":
        return QuantSpec(bits=RATE, code=code, window=int(window))
    return QuantSpec(bits=BITS, code=code_for("auto", BITS, SolveSpec(**PRESETS[PRESETS_OF[side]]).scales))


def seconds(weight: torch.Tensor, side: str) -> float:
    begun = time.process_time()
    solve(weight, quant(side), RANK, SolveSpec(**PRESETS[PRESETS_OF[side]]), "w")
    return time.process_time() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=[1024, 2048, 4096], help="of square matrices")
    parser.add_argument("--llama", action="store_true", help="the shapes of Llama-2-7B too")
    parser.add_argument("--sides", nargs="+", choices=list(PRESETS_OF), default=["loftq", "fitted", "descent"])
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "data" / "widths.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    first, *others = options.sides
    for side in options.sides:  # compiles the kernels
        seconds(torch.randn(256, 256), side)
    rows = []
    print(f"| out x in | {' | '.join(f'{side}, s' for side in options.sides)} | {', '.join(others)}, as multiples |")
    for out, columns in [*((size, size) for size in options.sizes), *(LLAMA if options.llama else ())]:
        weight = torch.randn(out, columns, generator=torch.Generator().manual_seed(0))
        found = {side: round(seconds(weight, side), 2) for side in options.sides}
        rows.append({"out": out, "in": columns, "seconds": found})
        multiples = [f"{found[side] / found[first]:.1f}" for side in others]
        print(
            "|", " | ".join([f"{out} x {columns}", *(f"{s:.2f}" for s in found.values()), *multiples]), "|", flush=True
        )
    result = {"environment": environment(), "bits": BITS, "rank": RANK, "rows": rows}
    if options.llama:
        times = {(row["out"], row["in"]): row["seconds"] for row in rows}
        whole = {side: sum(n * times[shape][side] for shape, n in LLAMA.items()) / 60 for side in options.sides}
        print("Llama-2-7B, minutes of one core:", {side: round(minutes, 1) for side, minutes in whole.items()})
        result["llama_2_7b_core_minutes"] = whole
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
