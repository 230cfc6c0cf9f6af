"""What a process may use of its machine, and which code path its arithmetic takes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loftq.numerics import machine
from loftq.solver import workers_for
from loftq.spec import PRESETS, QuantSpec, SolveSpec

GB = 10**9


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no CPU affinity")
def test_cpus_are_those_of_the_affinity():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert machine.cpus() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """A process in the group /job/step of control groups under ``tmp_path``, which are to be filled; no other limit."""
    place = tmp_path / "cgroup"
    monkeypatch.setattr(machine, "CGROUPS", place)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    real = Path.read_text

    def read_text(self, *arguments):
        told = {
            "/proc/self/cgroup": "5:cpu,cpuacct:/job/step\n4:memory:/job/step\n0::/job/step\n",
            "/proc/meminfo": "MemTotal: 1 kB\nMemAvailable: 64000000 kB\n",
        }
        return told.get(str(self)) or real(self, *arguments)

    monkeypatch.setattr(Path, "read_text", read_text)

    def write(file, text):
        (place / file).parent.mkdir(parents=True, exist_ok=True)
        (place / file).write_text(text)

    return write


def test_cpus_of_a_control_group(groups):
    """The smallest quota of all groups around the process, rounded up."""
    assert machine.cpus() == 64
    groups("job/cpu.max", "250000 100000\n")
    groups("job/step/cpu.max", "max 100000\n")
    assert machine.cpus() == 3
    groups("cpu,cpuacct/job/step/cpu.cfs_quota_us", "150000\n")
    groups("cpu,cpuacct/job/step/cpu.cfs_period_us", "100000\n")
    assert machine.cpus() == 2
    groups("cpu,cpuacct/job/step/cpu.cfs_quota_us", "-1\n")
    assert machine.cpus() == 3


def test_memory_of_a_control_group(groups):
    """What is left of the smallest limit; cached files are given back when memory is wanted."""
    assert machine.available_memory() == 64_000_000 * 1024
    groups("job/memory.max", f"{8 * GB}\n")
    groups("job/memory.current", f"{5 * GB}\n")
    groups("job/memory.stat", f"anon {3 * GB}\ninactive_file {2 * GB}\n")
    assert machine.available_memory() == 5 * GB
    groups("memory/job/step/memory.limit_in_bytes", f"{4 * GB}")
    groups("memory/job/step/memory.usage_in_bytes", f"{GB}")
    groups("memory/job/step/memory.stat", "total_inactive_file 7")
    assert machine.available_memory() == 3 * GB + 7


@pytest.mark.parametrize(
    ("free", "each", "workers"), [(64 * GB, GB, 8), (6 * GB, GB, 4), (GB, 2 * GB, 1), (None, GB, 8), (GB, 0, 8)]
)
def test_workers_follow_cpus_and_memory(monkeypatch, caplog, free, each, workers):
    """Four fifths of what is free are filled, and one worker there is always; fewer than CPUs are explained."""
    monkeypatch.setattr(machine, "cpus", lambda: 8)
    monkeypatch.setattr(machine, "available_memory", lambda: free)
    assert machine.default_workers("cpu", each) == workers
    assert ("workers sets another number" in caplog.text) == (workers < 8)
    assert machine.default_workers("cuda:1", each) == 1


def test_a_worker_needs_what_its_preset_holds(monkeypatch):
    """docs/methods.md: matrices as wide as the inputs, with whole second moments."""
    seen = []
    monkeypatch.setattr("loftq.solver.cost.default_workers", lambda device, each: seen.append(each) or 1)
    lloyd, trellis = QuantSpec(bits=2), QuantSpec(bits=2.1875, code="trellis")
    rows = [
        ("fitted", lloyd, False),
        ("fitted", trellis, False),
        ("descent", lloyd, False),
        ("descent", trellis, False),  # its columns are not independent: H is whole, if only the identity
        ("descent", lloyd, True),
    ]
    for preset, quant, calibrated in rows:
        workers_for([((8, 8), quant), ((64, 512), quant)], SolveSpec(**PRESETS[preset]), "cpu", calibrated)
    plain, squares = 12.5 * 64 * 512, 40 * 512**2
    assert seen == [plain, plain, plain, plain + squares, plain + squares]


def test_the_code_path_is_the_same_for_any_number_of_threads():
    before, found = torch.get_num_threads(), set()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        machine._arithmetic.cache_clear()
        found.add(tuple(machine.code_path("cpu").items()))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    assert len(found) == 1


@pytest.mark.slow
@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="a switch of MKL")
def test_another_path_of_the_blas_is_noticed():
    """Its switch stands in for another kind of CPU."""
    code = "from loftq.numerics.machine import code_path; print(code_path('cpu'))"
    environment = {**os.environ, "MKL_CBWR": "COMPATIBLE"}
    other = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert other.stdout.strip() != str(machine.code_path("cpu"))
