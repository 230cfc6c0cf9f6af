"""What does a matrix cost by its size, with each of the presets that need no calibration?

Square random matrices at 2 bits, rank 16, one thread. CPU seconds, and these as a multiple of the paper's LoftQ on the
same matrix; the sides take turns, so that a loaded machine slows all of them. `fitted` grows as the weights do,
`descent` as out * in².

    python benchmarks/widths.py --sizes 1024 2048 4096
"""

import argparse
import json
import time
from pathlib import Path

import torch

from harness import ROOT, environment
from loftq.solver import solve
from loftq.spec import PRESETS, QuantSpec, SolveSpec, code_for

SIDES = ("loftq", "fitted", "descent")
RANK, BITS = 16, 2


def seconds(weight: torch.Tensor, preset: str) -> float:
    spec = SolveSpec(**PRESETS[preset])
    begun = time.process_time()
    solve(weight, QuantSpec(bits=BITS, code=code_for("auto", BITS, spec.scales)), RANK, spec, "w")
    return time.process_time() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "data" / "widths.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for preset in SIDES:  # compiles the kernels
        seconds(torch.randn(256, 256), preset)
    rows = []
    print(f"| out = in | {' | '.join(f'{side}, s' for side in SIDES)} | {' | '.join(SIDES[1:])}, as a multiple |")
    for size in options.sizes:
        weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
        found = {side: round(seconds(weight, side), 2) for side in SIDES}
        rows.append({"size": size, "seconds": found, "per_out_in2": found["descent"] / size**3})
        multiples = [f"{found[side] / found['loftq']:.1f}" for side in SIDES[1:]]
        print("|", " | ".join([str(size), *(f"{s:.2f}" for s in found.values()), *multiples]), "|", flush=True)
    result = {"environment": environment(), "bits": BITS, "rank": RANK, "rows": rows}
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
