"""Work on several matrices at a time, results in order, bits independent of the number of workers."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def ordered_map(work: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """``map(work, items)`` on ``workers`` threads, at most one finished result waiting per worker.

    LAPACK's bits depend on its number of threads, so each matrix is worked on by one thread, always; PyTorch
    releases the interpreter's lock in its kernels, so threads are enough, and share memory with the writer.
    """
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, "loftq", initializer=torch.set_num_threads, initargs=(1,))
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        torch.set_num_threads(before)
