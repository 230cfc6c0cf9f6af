"""A matrix that is solved, in a file of its own until the shard that it belongs to is written.

So a run that is stopped loses only the matrices that were being worked on, however large a shard is. A piece is a
safetensors file with the tensors of the shard and of the adapter, and in its metadata the report and a hash of all.
"""

import hashlib
import json
import logging
from pathlib import Path

from torch import Tensor

from loftq.checkpoint.shards import Solved, adapter_entries
from loftq.errors import InputError
from loftq.formats import fsio, strict_json
from loftq.formats.layouts import Layout
from loftq.formats.regular import shown
from loftq.formats.tensorfile import Entry, encode_header, read_header, read_tensor, tensor_bytes
from loftq.planning import Matrix

logger = logging.getLogger("loftq")


def write(path: Path, solved: Solved, layout: Layout) -> None:
    """Put a matrix at ``path``, durably; its directory is made."""
    fsio.make_dirs(path.parent)
    tensors = [*solved.stored, *solved.adapter.values()]
    report = json.dumps(solved.report, allow_nan=False)
    metadata = {"report": report, "sha256": _hash(report, tensors)}
    header = encode_header(_entries(solved.matrix, layout), metadata)
    fsio.write_atomic(path, [header, *map(tensor_bytes, tensors)])


def read(path: Path, matrix: Matrix, layout: Layout) -> Solved | None:
    """What :func:`write` put there; None if there is nothing, or it was changed."""
    if not path.exists():
        return None
    entries = _entries(matrix, layout)
    try:
        file = read_header(path)
        if [Entry(t.name, t.dtype, t.shape) for t in file.tensors.values()] == entries:
            tensors = [read_tensor(t, file.stamp) for t in file.tensors.values()]
            report = file.metadata.get("report", "")
            if file.metadata.get("sha256") == _hash(report, tensors):
                stored = len(layout.entries(matrix))
                names = [e.name for e in entries[stored:]]
                adapter = dict(zip(names, tensors[stored:], strict=True))
                return Solved(matrix, tensors[:stored], adapter, strict_json.loads(report.encode(), shown(path)))
    except InputError:
        pass
    logger.warning("%s: its bytes are not those that were written; %s is solved again", shown(path), matrix.name)
    return None


def _entries(matrix: Matrix, layout: Layout) -> list[Entry]:
    return [*layout.entries(matrix), *adapter_entries(matrix)]


def _hash(report: str, tensors: list[Tensor]) -> str:
    digest = hashlib.sha256(report.encode())
    for tensor in tensors:
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
