"""What exports write: copies of files, and shards of tensors."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from torch import Tensor

from loftq.checkpoint.produce import Files
from loftq.formats import fsio
from loftq.formats.belongings import belongings
from loftq.formats.tensorfile import Entry, encode_header, in_shards, index_of, tensor_bytes
from loftq.serving.adapter import Adapter, own_files
from loftq.serving.base import Base

LARGEST_FILE = 5 * 10**9


def copy(paths: Iterable[Path], source: Path, target: Path) -> Files:
    """Copy files to the places below ``target`` that they have below ``source``."""
    made = {}
    for path in paths:
        name = path.relative_to(source).as_posix()
        fsio.make_dirs((target / name).parent)
        made[name] = fsio.copy_file(path, target / name)
    return made


def small_files(place: Path, base: Base, adapter: Adapter | None) -> Files:
    """The tokenizer and the like, the adapter's own before the base's."""
    files = copy(belongings(base.directory).files, base.directory, place)
    return files if adapter is None else files | copy(own_files(adapter), adapter.directory, place)


def write_shards(
    directory: Path, entries: list[Entry], read: Callable[[Entry], Iterable[Tensor]], max_bytes: int = LARGEST_FILE
) -> Files:
    """Write tensors as ``model*.safetensors``, each file up to ``max_bytes``, with their index.

    Args:
        read: gives a tensor, or the slices of its first axis, one after the other.
    """
    shards = in_shards(entries, lambda entry: entry.nbytes, max_bytes)

    def contents(shard: list[Entry]) -> Iterator[bytes | memoryview]:
        yield encode_header(shard, {"format": "pt"})
        for entry in shard:
            yield from map(tensor_bytes, read(entry))

    made = {name: fsio.write_atomic(directory / name, contents(shard)) for name, shard in shards.items()}
    if len(shards) > 1:
        index = "model.safetensors.index.json"
        made[index] = fsio.write_json(directory / index, index_of(shards))
    return made
