"""Limits for data files, so that no file can fill the memory or end the process.

Files are gone through once before ``datasets`` reads them, in pieces of one size. What is nested deeper, is longer or
expands to more than here is refused in a line. ``docs/tasks.md`` states these limits.
"""

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq.errors import InputError, quoted
from loftq.formats.regular import open_regular
from loftq.formats.text import MAX_DEPTH

if TYPE_CHECKING:
    from datasets import Dataset

PIECE = 1 << 20
MAX_ROW = 16 << 20  # bytes of a line, and of a text: tokenizers take about a hundred times as many
MAX_COLUMNS = 1000
MAX_ARRAY = 256 << 20  # bytes of a JSON file that is one list, which its reader holds as a whole
MAX_GROUP = 2 << 30  # bytes of a row group of Parquet, as its header says
MAX_EXPANSION = 100  # of gzip, which expands text by 3 to 20 and at most by 1032 ...
EXPANDS_FREELY = 64 << 20  # ... from these bytes on
_TOKENS = re.compile(rb'"(?:[^"\\]|\\.)*"?|[\[\]{}]')


def check_file(path: Path, kind: str) -> None:
    """Refuse a file that exceeds a limit, before it is read.

    Args:
        kind: json, csv, text or parquet.

    Raises: InputError with the line; OSError, EOFError and zlib.error as they come.
    """
    if kind == "parquet":
        _check_parquet(path)
        return
    depth = 0
    for number, line in enumerate(_lines(path, kind), 1):
        where = f"{quoted(path)}: line {number}"
        try:
            line.decode()
        except UnicodeDecodeError as e:
            raise InputError(f"{where} is not UTF-8 ({e.reason} at its byte {e.start}); convert the file") from e
        if kind == "json":
            _check_columns(line, where)
            depth = _depth(line, depth, where)


def check_texts(dataset: "Dataset", name: str, where: str) -> None:
    """Refuse a column of texts with one that no tokenizer should be given. InputError with the row."""
    import pyarrow.compute

    pc: Any = pyarrow.compute
    row = 0
    for chunk in dataset.data.column(name).chunks:
        sizes = pc.binary_length(chunk)
        if (pc.max(sizes).as_py() or 0) > MAX_ROW:
            at, size = next((i, size) for i, size in enumerate(sizes.to_pylist(), 1) if (size or 0) > MAX_ROW)
            raise InputError(f"{where}, row {row + at}: {long_text(size)}")
        row += len(chunk)


def long_text(size: int) -> str:
    """What is said of a text of too many bytes."""
    return f"a text of {size} bytes, at most {MAX_ROW} are read; split it into several rows"


def batch_size(dataset: "Dataset") -> int:
    """Rows that are tokenized at a time: so many that their texts are not more than the longest that is taken."""
    import pyarrow as pa
    import pyarrow.compute

    pc: Any = pyarrow.compute
    largest = 1
    for column in dataset.data.columns:
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            largest = max(largest, pc.max(pc.binary_length(column)).as_py() or 0)
    return max(1, min(1000, MAX_ROW // largest))


def _lines(path: Path, kind: str) -> Iterator[bytes]:
    """The lines of a file, unpacked. No more is held than the longest line that is taken."""
    held: list[bytes] = []
    longest, number = 0, 1
    for piece in _pieces(path):
        if not longest:
            listed = kind == "json" and piece.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
            longest = MAX_ARRAY if listed else MAX_ROW
        first, *others = piece.split(b"\n")
        held.append(first)
        for other in others:
            yield b"".join(held)
            held, number = [other], number + 1
        if sum(map(len, held)) > longest:
            raise InputError(f"{quoted(path)}: line {number} has more than {longest} bytes; split it into several")
    yield b"".join(held)


def _pieces(path: Path) -> Iterator[bytes]:
    with open_regular(path) as opened:
        if path.suffix != ".gz":
            yield from map(bytes, opened.chunks(0, opened.stamp.size, PIECE))
            return
        total, most = 0, max(EXPANDS_FREELY, MAX_EXPANSION * opened.stamp.size)
        with gzip.open(path) as file:
            while piece := file.read(PIECE):
                total += len(piece)
                if total > most:
                    raise InputError(
                        f"{quoted(path)}: {opened.stamp.size} bytes expand to more than {most}; "
                        "unpack it yourself if that is meant"
                    )
                yield piece


def _depth(line: bytes, depth: int, where: str) -> int:
    """How deep JSON is nested after a line, which begins at ``depth``."""
    opened = line.count(b"[") + line.count(b"{")
    if not depth and opened <= MAX_DEPTH and opened == line.count(b"]") + line.count(b"}"):
        return 0
    for found in _TOKENS.finditer(line):
        sign = found[0]
        depth += (sign in b"[{") - (sign in b"]}") if len(sign) == 1 and sign != b'"' else 0
        if depth > MAX_DEPTH:
            raise InputError(f"{where} has more than {MAX_DEPTH} levels of nesting; mend or remove it")
    return depth


def _check_columns(line: bytes, where: str) -> None:
    """Refuse a row of very many columns, for each of which its reader looks at all others."""
    if line.count(b'":') <= MAX_COLUMNS or line.lstrip()[:1] != b"{":
        return
    try:
        columns = len(json.loads(line))
    except (ValueError, RecursionError):
        return  # told elsewhere
    if columns > MAX_COLUMNS:
        raise InputError(f"{where} has {columns} columns, at most {MAX_COLUMNS} are read")


def _check_parquet(path: Path) -> None:
    import pyarrow.parquet as pq

    with open_regular(path):
        head: Any = pq.read_metadata(path)
    for i in range(head.num_row_groups):
        size = head.row_group(i).total_byte_size
        if not 0 <= size <= MAX_GROUP:
            raise InputError(
                f"{quoted(path)}: row group {i} holds {size} bytes, at most {MAX_GROUP} are read at a time; "
                "write smaller row groups"
            )
