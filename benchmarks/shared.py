"""What does sharing a checkpoint among processes cost?

Peer: one process with as many workers as there are processes. If Ray is installed, also the tasks of a cluster of two
nodes on this machine, its daemons and workers counted. CPU seconds are of all processes, libraries included.

Goal: two processes that share, one worker each, at 0.95 times the speed of one with two workers, from command to exit
code. Ray: at most 1.1 times the CPU seconds.
"""

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from harness import Bench, Versus, installed
from models import llama

BITS, RANK, STEPS = 2, 64, 5
ONE, TWO, RAY = "1 process, 2 workers", "2 processes --shared", "2 Ray tasks at a time"


def command(source: Path, output: Path, *options: str) -> list[str]:
    work = ["--bits", str(BITS), "--rank", str(RANK), "--preset", "loftq", "--steps", str(STEPS)]
    given = ["--max-shard-size", "8MB", *work, *options]
    return [sys.executable, "-m", "loftq", "quantize", str(source), "-o", str(output), *given]


def run_all(commands: list[list[str]]) -> None:
    """All at once, to the end of the last."""
    children = [subprocess.Popen(c, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for c in commands]
    codes = [child.wait() for child in children]
    assert codes == [0] * len(codes), codes


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
        for process in psutil.process_iter(["cmdline", "cpu_times", "pid"]):
            line = " ".join(process.info["cmdline"] or ())
            if "raylet" in line or "gcs_server" in line or line.startswith("ray::") or "/ray/" in line:
                times = process.info["cpu_times"]
                seen[process.info["pid"]] = max(seen.get(process.info["pid"], 0.0), times.user + times.system)
        return sum(seen.values())

    try:
        yield taken
    finally:
        nodes.shutdown()


def main() -> None:
    bench = Bench(__file__, __doc__)
    hidden, few, many = (256, 1, 2) if bench.quick else (2048, 4, 20)
    with tempfile.TemporaryDirectory() as directory:
        compare(bench, Path(directory), hidden, few, 1 if bench.quick else 5)
        if installed("ray"):
            with cluster() as taken:
                compare(bench, Path(directory), hidden, many, 1, taken)
        else:
            bench.note("Ray is not installed and was left out.")
    bench.finish()


def compare(
    bench: Bench, root: Path, hidden: int, layers: int, repeats: int, of_cluster: Callable[[], float] | None = None
) -> None:
    """Two processes that share against one, or, given what a cluster has taken, the cluster."""
    name = TWO if of_cluster is None else RAY
    seconds: dict[str, list[float]] = {ONE: [], name: []}
    source = root / str(layers)
    llama(hidden, layers, 1024, "bfloat16").save_pretrained(source)

    def side(what: str, processes: int, *options: str) -> None:
        with tempfile.TemporaryDirectory(dir=root) as place:
            before = spent() + (of_cluster() if of_cluster else 0)
            run_all([command(source, Path(place) / "out", *options)] * processes)
            seconds[what].append(spent() + (of_cluster() if of_cluster else 0) - before)

    shared = (2, "--workers", "1", "--shared") if of_cluster is None else (1, "--workers", "1", "--cluster", "auto")
    sides = {ONE: lambda: side(ONE, 1, "--workers", "2"), name: lambda: side(name, *shared)}
    size = sum(file.stat().st_size for file in source.glob("*.safetensors")) / 1e9
    case = f"{size:.1f} GB: {layers} layers, hidden {hidden}, rank {RANK}, {STEPS} steps, NF{BITS}"
    bench.compare(case, sides, [Versus(name, ONE, 0.95 if name == TWO else None)], repeats=repeats, slow=[*sides])
    for what in sides:
        bench.record(case, f"CPU seconds, {what}", seconds[what], "s")
    pairs = [a / b for a, b in zip(seconds[name], seconds[ONE], strict=True)]
    bench.record(case, f"CPU seconds of {name} / {ONE}", pairs, "x", at_most=1.1 if name == RAY else None)
    bench.note(f"Load of the machine after the case of {size:.1f} GB: {os.getloadavg()[0]:.1f}.")


if __name__ == "__main__":
    main()
