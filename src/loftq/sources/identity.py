"""Whether two models are the same: their files have the same names and contents.

Where the directory lies is no part of it. How much of the weights is read depends on what is asked, for they may be
hundreds of gigabytes; small files are always hashed whole.

* :func:`stamp`: may work that was begun be continued? Of weights size, time (in a store: what it gives as the version,
  such as the ETag) and header: nothing else is read, and whatever was touched since is another model. It never takes
  a changed file for the same; it may take a copy for another.
* :func:`sample`: are these statistics of this model? Of weights size, header and a few kilobytes from all over a file,
  which tell two trainings apart; no times, so a copy is the same model.
* :func:`digests`: is this result of these files? Every byte; no times either.
"""

import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from loftq.errors import InputError, StorageError
from loftq.formats import fsio
from loftq.formats.belongings import belongings
from loftq.formats.regular import open_regular, state, url_of
from loftq.formats.source import Checkpoint
from loftq.sources.checkpoint import Source

PROBES, PROBE_BYTES = 64, 4096  # of each file of weights that is sampled


def stamp(source: Source) -> dict[str, Any]:
    """Of a source's configuration and small files their hashes, of its weights size, time and hash of the header."""
    small = [source.directory / "config.json", *belongings(source.directory).files]
    found: dict[str, Any] = {p.relative_to(source.directory).as_posix(): fsio.sha256_file(p).sha256 for p in small}
    for file in source.checkpoint.files:
        found[file.name] = {**state(source.directory / file.name), "header_sha256": file.header_sha256}
    return found


def is_unchanged(source: Source, stamped: dict[str, Any]) -> bool:
    """Whether the files of a source are what they were when ``stamped`` was made of them.

    Raises: StorageError if a store does not answer: that says nothing of the files.
    """
    try:
        return stamp(source) == stamped
    except StorageError:
        if url_of(source.directory):
            raise
        return False
    except (OSError, InputError):
        return False


def sample(directory: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """Of a model's ``config.json`` its hash, of its weights size and a hash of header and samples."""
    found: dict[str, Any] = {"config.json": fsio.sha256_file(directory / "config.json").sha256}
    for file in checkpoint.files:
        digest = hashlib.sha256(file.header_sha256.encode())
        with open_regular(directory / file.name) as opened:
            for i in range(PROBES):
                offset = i * max(0, file.size - PROBE_BYTES) // (PROBES - 1)
                digest.update(opened.read_at(offset, min(PROBE_BYTES, file.size)))
        found[file.name] = {"size": file.size, "sampled_sha256": digest.hexdigest()}
    return found


def digests(files: Iterable[Path]) -> list[list[Any]]:
    """Name, size and SHA-256 of each file."""
    return [[f.name, *_digest(f, f.stat().st_size, f.stat().st_mtime_ns)] for f in files]


@functools.lru_cache(maxsize=4096)
def _digest(file: Path, size: int, changed: int) -> tuple[int, str]:
    """Size and SHA-256; a file with the size and the time of before is not read again."""
    return size, fsio.sha256_file(file).sha256
