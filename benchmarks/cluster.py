"""What does a Ray cluster add to the work on a checkpoint?

Peer: one process with two workers, from command to exit code. The cluster has two nodes with a CPU each on this
machine; its daemons and workers are counted, libraries too. Needs Ray: `pip install 'loftq[ray]'`.

Goal: at most 1.1 times the CPU seconds, for 2 GB.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from ray.cluster_utils import Cluster

from harness import Bench
from models import llama
from shared import BITS, ONE, RANK, STEPS, compare

RAY = "2 Ray tasks at a time"
FLAGS = ("--bits", BITS, "--rank", RANK, "--preset", "loftq", "--steps", STEPS, "--max-shard-size", "32MB")


def commanded(source: Path, output: Path, *options: str) -> None:
    command = [sys.executable, "-m", "loftq", "quantize", source, "-o", output, *FLAGS, *options]
    subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@contextmanager
def cluster() -> Iterator[Callable[[], float]]:
    """A Ray cluster of two nodes with a CPU each on this machine; the CPU seconds that it has taken so far."""
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    os.environ["RAY_ADDRESS"] = nodes.address
    session = str(nodes.head_node.get_session_dir_path())
    seen: dict[int, float] = {}

    def taken() -> float:
        found = {p.pid: p.info for p in psutil.process_iter(["cmdline", "cpu_times", "ppid"])}
        ours = {pid for pid, info in found.items() if any(session in part for part in info["cmdline"] or ())}
        for pid, info in found.items():
            if info["cpu_times"] and (pid in ours or info["ppid"] in ours):  # workers are a raylet's children
                seen[pid] = max(seen.get(pid, 0.0), info["cpu_times"].user + info["cpu_times"].system)
        return sum(seen.values())

    try:
        yield taken
    finally:
        nodes.shutdown()


def main() -> None:
    bench = Bench(__file__, __doc__)
    with tempfile.TemporaryDirectory() as directory, cluster() as taken:
        source = Path(directory) / "source"
        llama(*((256, 2) if bench.quick else (2048, 20)), 1024, "bfloat16").save_pretrained(source)
        sides: dict[str, Callable[[Path], None]] = {
            ONE: lambda output: commanded(source, output, "--workers=2"),
            RAY: lambda output: commanded(source, output, "--workers=1", "--cluster=auto"),
        }
        compare(bench, source, sides, 1, {"speed": None, "cpu": 1.1}, taken)
    bench.finish()


if __name__ == "__main__":
    main()
