"""The CPUs and the memory that this process may use, and the code path of its arithmetic."""

import functools
import hashlib
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from loftq.errors import option
from loftq.spelled import spell_size

logger = logging.getLogger("loftq")

SHARE = 0.8  # of the available memory that workers may fill together
CGROUPS = Path("/sys/fs/cgroup")


def _slow_dtypes() -> Iterator[torch.dtype]:
    one_dnn = torch.backends.mkldnn.is_available()
    for dtype, asked in (
        (torch.bfloat16, "_is_mkldnn_bf16_supported"),
        (torch.float16, "_is_mkldnn_fp16_supported"),
    ):
        if not (one_dnn and getattr(torch.ops.mkldnn, asked)()):
            yield dtype


# Without oneDNN, which has bfloat16 from AVX-512 on and float16 on few processors, PyTorch multiplies matrices in loops
# of its own. They take many times as long as a product in float32 that is rounded (docs/performance.md).
SLOW_DTYPES = frozenset(_slow_dtypes())


def default_workers(device: str, bytes_each: int) -> int:
    """Matrices to work on at a time: one per CPU of this process, fewer where memory is short; one for a GPU.

    Args:
        bytes_each: what the largest matrix needs.
    """
    if torch.device(device).type != "cpu":
        return 1
    free, cores = available_memory(), cpus()
    fitting = cores if free is None else max(1, int(SHARE * free / max(bytes_each, 1)))
    if fitting < cores:
        logger.warning(
            "%d of %d CPUs are used: %s of memory are free, and the largest matrix needs %s on each; "
            "%s sets another number",
            *(fitting, cores, spell_size(free or 0), spell_size(bytes_each), option("workers")),
        )
    return min(cores, fitting)


def cpus() -> int:
    """CPUs that this process may use: of its affinity (Slurm, taskset, cpusets) and its control group's quota."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min([count, *(math.ceil(quota) for quota in _quotas())]))


def available_memory() -> int | None:
    """Bytes of memory available without swapping, on the machine and in every control group of this process.

    None where nothing says.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        lines = []
    free = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return min([*free, *_left_in_groups()], default=None)


def code_path(device: str) -> dict[str, str]:
    """The machine's properties that bits of a result depend on: runs with different ones may differ in bits.

    Returns: ``cpu``, the instructions that PyTorch's kernels use; ``arithmetic``, a hash of a few products and
        factorizations, which sees the code path of the BLAS too; ``gpu``, its name, if ``device`` is one.
    """
    found = {"cpu": torch.backends.cpu.get_cpu_capability(), "arithmetic": _arithmetic()}
    if torch.device(device).type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


@functools.cache
def _arithmetic() -> str:
    """Hash of the bits of products and factorizations of fixed matrices, on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        digest = hashlib.sha256()
        at = torch.arange(256 * 192, dtype=torch.float64).view(256, 192)
        for dtype in (torch.float32, torch.float64):
            matrix = (at * at * 0.618).frac().sub(0.5).to(dtype)
            gram = matrix.T @ matrix + torch.eye(192, dtype=dtype)
            results = [gram, *torch.linalg.qr(matrix), *torch.linalg.svd(matrix[:, :64], full_matrices=False)]
            results += [*torch.linalg.eigh(gram), torch.linalg.cholesky(gram), matrix.exp().sum(0)]
            for result in results:
                digest.update(result.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]
    finally:
        torch.set_num_threads(before)


def _groups(controller: str) -> Iterator[tuple[Path, bool]]:
    """Directories of this process's control group and all above it, and whether they are of version 2."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, names, inside = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        root = CGROUPS / names if names else CGROUPS
        place = root / inside.strip("/")
        for directory in (place, *place.parents):
            if not directory.is_relative_to(root):
                break
            yield directory, not names


def _quotas() -> Iterator[float]:
    """CPUs that control groups grant by time."""
    for directory, second in _groups("cpu"):
        if second:
            quota, _, period = _text(directory / "cpu.max").partition(" ")
        else:
            quota, period = _text(directory / "cpu.cfs_quota_us"), _text(directory / "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal() and int(period):
            yield int(quota) / int(period)


def _left_in_groups() -> Iterator[int]:
    """Bytes that control groups leave, files that are cached only for speed not counted as used."""
    for directory, second in _groups("memory"):
        most, now = ("memory.max", "memory.current") if second else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        limit, used = _text(directory / most), _text(directory / now)
        if limit.isdecimal() and used.isdecimal():
            cached = "inactive_file" if second else "total_inactive_file"
            lines = _text(directory / "memory.stat").splitlines()
            files = sum(int(line.split()[1]) for line in lines if line.startswith(f"{cached} "))
            yield max(0, int(limit) - int(used) + files)


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
