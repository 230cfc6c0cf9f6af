"""What does sharing a checkpoint among processes cost?

Peer: one process with as many workers as there are processes; both are forked with the libraries loaded.

Goal: two processes that share, one worker each, at 0.95 times the speed of one with two workers.
"""

import multiprocessing
import os
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import loftq
from harness import Bench, Versus
from loftq.solver import solve
from models import llama

BITS, RANK, STEPS = 2, 64, 5
WORK = {"bits": BITS, "rank": RANK, "preset": "loftq", "steps": STEPS, "max_shard_bytes": 8_000_000}
ONE, TWO = "1 process, 2 workers", "2 processes that share"
forks = multiprocessing.get_context("fork")


def forked(source: Path, output: Path, processes: int, **options: Any) -> None:
    """So many processes at once, to the end of the last."""
    given = {**WORK, "progress": False, **options}
    children = [forks.Process(target=loftq.quantize, args=(source, output), kwargs=given) for _ in range(processes)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * processes


def spent() -> float:
    """CPU seconds of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def compare(
    bench: Bench,
    source: Path,
    sides: dict[str, Callable[[Path], None]],
    repeats: int,
    goals: dict[str, float | None],
    taken: Callable[[], float] = lambda: 0.0,
) -> None:
    """Time and CPU seconds of every side, which takes a directory to be made."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}

    def measured(side: str) -> None:
        with tempfile.TemporaryDirectory(dir=source.parent) as place:
            before = spent() + taken()
            sides[side](Path(place) / "out")
            seconds[side].append(spent() + taken() - before)

    size = sum(file.stat().st_size for file in source.glob("*.safetensors")) / 1e9
    case = f"{size:.1f} GB of a Llama's shapes, rank {RANK}, {STEPS} steps, NF{BITS}"
    first, second = sides
    calls = {side: lambda side=side: measured(side) for side in sides}
    bench.compare(
        case, calls, [Versus(second, first, goals["speed"])], repeats=repeats, slow=sides if repeats == 1 else ()
    )
    kept = {side: values[-repeats:] for side, values in seconds.items()}
    for side, values in kept.items():
        bench.record(case, f"CPU seconds, {side}", values, "s")
    pairs = [a / b for a, b in zip(kept[second], kept[first], strict=True)]
    bench.record(case, f"CPU seconds of {second} / {first}", pairs, "x", at_most=goals["cpu"])
    bench.note(f"Load of the machine at the end: {os.getloadavg()[0]:.1f}.")


def main() -> None:
    bench = Bench(__file__, __doc__)
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    solve(torch.eye(128), loftq.QuantSpec(bits=BITS), 4, loftq.SolveSpec(steps=1))  # loads the compiled kernels
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "source"
        llama(*((256, 1) if bench.quick else (1024, 6)), 1024, "bfloat16").save_pretrained(source)
        sides: dict[str, Callable[[Path], None]] = {
            ONE: lambda output: forked(source, output, 1, workers=2),
            TWO: lambda output: forked(source, output, 2, workers=1, shared=True),
        }
        compare(bench, source, sides, 1 if bench.quick else 3, {"speed": 0.95, "cpu": None})
    bench.finish()


if __name__ == "__main__":
    main()
