"""Work on the rows of a matrix in chunks of a fixed size, on idle threads.

What a chunk is does not depend on who works on it, so neither do the bits of a result. A pool of threads lends itself
to each of its threads by :func:`lend`. A chunk that no other thread has begun is taken back by the one that waits.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Executor, wait

from torch import Tensor

ROWS = 1024  # of a chunk: so many that its products with other matrices are as quick as those of all rows

_lent = threading.local()


def lend(pool: Executor) -> None:
    """Let this thread of the pool hand chunks to the others."""
    _lent.pool = pool


def over_chunks(work: Callable[[slice], None], matrix: Tensor) -> None:
    """``work`` for every chunk of the matrix's rows; on a GPU, which is one worker, for all of them at once."""
    size = ROWS if matrix.device.type == "cpu" else max(1, len(matrix))
    chunks = [slice(first, min(first + size, len(matrix))) for first in range(0, len(matrix), size)]
    pool: Executor | None = getattr(_lent, "pool", None)
    if pool is None:
        for chunk in chunks:
            work(chunk)
        return
    others = [pool.submit(work, chunk) for chunk in chunks[1:]]
    try:
        for chunk, other in zip(reversed(chunks), (*reversed(others), None), strict=True):
            if other is None or other.cancel():
                work(chunk)
    finally:
        running = [other for other in others if not other.cancel()]
        wait(running)
    for other in running:
        other.result()
