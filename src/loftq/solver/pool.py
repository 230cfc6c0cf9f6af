"""Work on several matrices at a time, results in order, bits independent of the number of workers."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from loftq.numerics.chunks import lend

T = TypeVar("T")
R = TypeVar("R")


@contextlib.contextmanager
def solvers(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of ``workers`` threads for matrices; what still runs at the end is not waited for.

    LAPACK's bits depend on its number of threads, so each matrix is worked on by one thread, always, but for chunks of
    rows that it lends to threads without a matrix; PyTorch releases the interpreter's lock in its kernels, so threads
    are enough, and share memory with the writer.
    """
    before = torch.get_num_threads()
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    def begin() -> None:
        if stream is not None:  # and its device: else "cuda" would be the first one, whichever the caller has chosen
            torch.cuda.set_stream(stream)
        torch.set_num_threads(1)
        lend(pool)

    pool = ThreadPoolExecutor(workers, "loftq", initializer=begin)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        torch.set_num_threads(before)


def ordered_map(
    work: Callable[[T], R], items: Iterable[T], workers: int, finished: Callable[[R], object] | None = None
) -> Iterator[R]:
    """``map(work, items)`` on ``workers`` of the :func:`solvers`, at most one finished result waiting per worker.

    While the next result is not there, ``finished`` is called, in the caller's thread, with each later one that is;
    and with every result before it is yielded.
    """
    waiting: deque[Future[R]] = deque()
    untold: set[Future[R]] = set()

    def first() -> R:
        head = waiting.popleft()
        while head in untold:
            done = wait(untold, return_when=FIRST_COMPLETED).done
            for future in [head] if head in done else [f for f in waiting if f in done]:
                untold.remove(future)
                if finished and not future.exception():
                    finished(future.result())
        return head.result()

    with solvers(workers) as pool:
        for item in items:
            waiting.append(pool.submit(work, item))
            untold.add(waiting[-1])
            if len(waiting) > 2 * workers:
                yield first()
        while waiting:
            yield first()
