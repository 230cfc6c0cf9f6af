"""What does sharing a checkpoint among processes cost?

Peer: one process with as many workers as there are processes; both are forked with the libraries loaded. If Ray is
installed, also the tasks of a cluster of two nodes on this machine, from command to exit code, in CPU seconds of all
processes, daemons and libraries included.

Goal: two processes that share, one worker each, at 0.95 times the speed of one with two workers. Ray: at most 1.1 times
the CPU seconds, for 2 GB.
"""

import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import loftq
from harness import Bench, Versus, installed
from loftq.solver import solve
from models import llama

BITS, RANK, STEPS = 2, 64, 5
WORK = {"bits": BITS, "rank": RANK, "preset": "loftq", "steps": STEPS, "max_shard_bytes": 8_000_000}
ONE, TWO, RAY = "1 process, 2 workers", "2 processes that share", "2 Ray tasks at a time"
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


def commanded(source: Path, output: Path, *options: str) -> None:
    flags = [f"--{name.replace('_bytes', '_size').replace('_', '-')}={value}" for name, value in WORK.items()]
    given = [sys.executable, "-m", "loftq", "quantize", str(source), "-o", str(output), *flags, *options]
    given[given.index("--max-shard-size=8000000")] = "--max-shard-size=8MB"
    subprocess.run(given, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def spent() -> float:
    """CPU seconds of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@contextmanager
def cluster() -> Iterator[Callable[[], float]]:
    """A Ray cluster of two nodes with a CPU each on this machine; the CPU seconds that it has taken so far."""
    import psutil
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    os.environ["RAY_ADDRESS"] = nodes.address
    seen: dict[int, float] = {}

    def taken() -> float:
        for process in psutil.process_iter(["cmdline", "cpu_times"]):
            line = " ".join(process.info["cmdline"] or ())
            if line.startswith("ray::") or "/ray/" in line:
                times = process.info["cpu_times"]
                seen[process.pid] = max(seen.get(process.pid, 0.0), times.user + times.system)
        return sum(seen.values())

    try:
        yield taken
    finally:
        nodes.shutdown()


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


def main() -> None:
    bench = Bench(__file__, __doc__)
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    small_shape, large_shape = ((256, 1), (256, 2)) if bench.quick else ((1024, 6), (2048, 20))  # hidden, layers
    solve(torch.eye(128), loftq.QuantSpec(bits=BITS), 4, loftq.SolveSpec(steps=1))  # loads the compiled kernels
    with tempfile.TemporaryDirectory() as directory:
        small, large = Path(directory) / "small", Path(directory) / "large"
        llama(*small_shape, 1024, "bfloat16").save_pretrained(small)
        sides: dict[str, Callable[[Path], None]] = {
            ONE: lambda output: forked(small, output, 1, workers=2),
            TWO: lambda output: forked(small, output, 2, workers=1, shared=True),
        }
        compare(bench, small, sides, 1 if bench.quick else 3, {"speed": 0.95, "cpu": None})
        if installed("ray"):
            llama(*large_shape, 1024, "bfloat16").save_pretrained(large)
            with cluster() as taken:
                sides = {
                    ONE: lambda output: commanded(large, output, "--workers=2"),
                    RAY: lambda output: commanded(large, output, "--workers=1", "--cluster=auto"),
                }
                compare(bench, large, sides, 1, {"speed": None, "cpu": 1.1}, taken)
        else:
            bench.note("Ray is not installed and was left out.")
    bench.note(f"Load of the machine at the end: {os.getloadavg()[0]:.1f}.")
    bench.finish()


if __name__ == "__main__":
    main()
