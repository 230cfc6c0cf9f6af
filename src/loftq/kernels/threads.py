"""Threads for the compiled CPU kernels.

A kernel works on a range of rows without the interpreter's lock. On Linux the ranges run on the threads of the OpenMP
runtime that PyTorch itself uses: after a matrix product those spin for milliseconds, waiting for the next one, and
threads of our own would have to share their cores (docs/decisions/0010). Elsewhere, where PyTorch's runtime has no such
entry, they run on a pool of ours.
"""

import ctypes
import functools
import itertools
import math
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loftq.numerics.machine import cpus

RANGE = 16  # rows below which another thread is not worth waking
TASK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
DTYPES = {torch.int8: "u1", torch.uint8: "u1", torch.bfloat16: "u2", torch.int16: "i2"}  # as arrays
DTYPES |= {torch.float16: "i2", torch.int64: "i8", torch.float64: "f8"}

_forked = False
_pool: ThreadPoolExecutor | None = None


def _after_fork() -> None:
    global _forked, _pool
    _forked, _pool = True, None


os.register_at_fork(after_in_child=_after_fork)  # a forked child has none of its parent's threads


def run_over_rows(kernel: Callable[..., None], rows: int, *args: Any) -> None:
    """``kernel(*args, start, stop)`` on ranges that cover all rows; tensors go in as arrays."""
    arrays = [_array(arg) if isinstance(arg, Tensor) else arg for arg in args]
    over_rows(functools.partial(kernel, *arrays), rows)


def _array(tensor: Tensor) -> np.ndarray:
    """A contiguous tensor's memory as an array; bytes and bfloat16 as unsigned integers.

    Not by ``Tensor.numpy``, which forbids the storage to be resized from then on: FSDP2 frees gathered parameters so.
    """
    return _array_at(tensor.data_ptr(), tensor.shape, DTYPES.get(tensor.dtype, "f4"))


@functools.lru_cache(4096)
def _array_at(address: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """The same for a place in memory, whatever lies there: it holds nothing, so that it may be kept."""
    memory = (ctypes.c_char * (math.prod(shape) * np.dtype(dtype).itemsize)).from_address(address)
    return np.frombuffer(memoryview(memory), dtype).reshape(shape)


def over_rows(work: Callable[[int, int], Any], rows: int) -> None:
    """``work(start, stop)`` on ranges that cover all rows, one per thread that PyTorch has."""
    threads = min(torch.get_num_threads(), max(1, rows // RANGE))
    edges = [rows * t // threads for t in range(threads + 1)]
    ranges = list(itertools.pairwise(edges))
    if threads == 1 or _forked:
        work(0, rows)
    elif _openmp():
        _run_on_openmp(work, ranges)
    else:
        _run_on_pool(work, ranges)


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """GNU OpenMP as PyTorch has loaded it; None where it uses another runtime."""
    if sys.platform != "linux" or not torch.backends.openmp.is_available():
        return None
    library = ctypes.CDLL(None)
    if not all(hasattr(library, name) for name in ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")):
        return None
    library.GOMP_parallel.argtypes = [TASK, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    library.GOMP_parallel.restype = None
    return library


def _run_on_openmp(work: Callable[[int, int], Any], ranges: list[tuple[int, int]]) -> None:
    """One parallel region. A runtime short of threads gives fewer than asked for; each then takes several ranges."""
    library: Any = _openmp()
    failed: list[BaseException] = []

    def task(_: int | None) -> None:
        try:
            for each in ranges[library.omp_get_thread_num() :: library.omp_get_num_threads()]:
                work(*each)
        except BaseException as e:  # must not leave a foreign thread
            failed.append(e)

    library.GOMP_parallel(TASK(task), None, len(ranges), 0)
    if failed:
        raise failed[0]


def _run_on_pool(work: Callable[[int, int], Any], ranges: list[tuple[int, int]]) -> None:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(cpus(), "loftq-kernel")
    jobs = [_pool.submit(work, *each) for each in ranges[1:]]
    work(*ranges[0])
    for job in jobs:
        job.result()
