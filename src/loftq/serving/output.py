"""The directory that an export makes: absent or complete, and known again by the command that made it."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from loftq.checkpoint.manifest import FileRow, Part
from loftq.checkpoint.output_dir import already_done, check_places, claim, publish
from loftq.checkpoint.shards import Workspace
from loftq.errors import InputError, LoftqError
from loftq.formats import fsio, hashed_json
from loftq.formats.config import EXPORTED
from loftq.formats.regular import output_path, shown
from loftq.formats.tensorfile import Entry, encode_header, tensor_bytes

Files = dict[str, fsio.FileDigest]


class _Mark(Part):
    identity: dict[str, Any]
    files: dict[str, FileRow]


def produce(
    output: Path,
    identity: dict[str, Any],
    sources: list[Path],
    overwrite: bool,
    fill: Callable[[Path], Files],
    report: Callable[[], dict[str, Any]] = dict,
) -> dict[str, Any]:
    """Make the directory ``output`` by one rename; what is written in it last: identity, files, and the report.

    Args:
        identity: all that the bytes depend on; an output of the same is left alone.
        sources: directories that are read.
        fill: writes files into a directory, and says which.
        report: called after that.

    Raises: ConflictError if ``output`` holds something else, or another process works on it; what ``fill`` raises.
    """
    output = output_path(output)
    work = Workspace(output)
    for source in sources:
        check_places(source, work, output)
    done = already_done(output, identity, overwrite, EXPORTED, _checked)
    if done:
        return done
    fsio.make_dirs(work.root)
    with fsio.DirectoryLock(work.lock):
        done = already_done(
            output, identity, overwrite, EXPORTED, _checked
        )  # another process may have finished meanwhile
        if not done:
            claim(work, identity, sources[0])
            try:
                files = {name: asdict(digest) for name, digest in fill(work.output).items()}
            except LoftqError:
                fsio.remove_tree(work.root)  # nothing of it could be continued
                raise
            content = {"format_version": 1, "identity": identity, "files": files, **report()}
            done = hashed_json.write(work.output / EXPORTED, content)
            publish(work, output, {**files, EXPORTED: asdict(fsio.sha256_file(work.output / EXPORTED))}, overwrite)
        fsio.remove_tree(work.root)
    return done


def _checked(content: dict[str, Any], path: Path) -> dict[str, Any]:
    try:
        _Mark.model_validate(content)
    except ValidationError as e:
        raise InputError(f"{shown(path)}: {e.error_count()} fields missing or not what they should be") from e
    return content


def copy(paths: Iterable[Path], source: Path, target: Path) -> Files:
    """Copy files to the places below ``target`` that they have below ``source``."""
    made = {}
    for path in paths:
        name = path.relative_to(source).as_posix()
        fsio.make_dirs((target / name).parent)
        made[name] = fsio.copy_file(path, target / name)
    return made


def write_shards(directory: Path, entries: list[Entry], read: Callable[[Entry], Tensor], max_bytes: int) -> Files:
    """Write tensors, read one at a time, as ``model*.safetensors``, each file up to ``max_bytes``, with their index."""
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(e.nbytes for e in shards[-1]) + entry.nbytes > max_bytes:
            shards.append([])
        shards[-1].append(entry)
    count = len(shards)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    names = names if count > 1 else ["model.safetensors"]

    def contents(shard: list[Entry]) -> Iterator[bytes | memoryview]:
        yield encode_header(shard, {"format": "pt"})
        for entry in shard:
            yield tensor_bytes(read(entry))

    made = {n: fsio.write_atomic(directory / n, contents(shard)) for n, shard in zip(names, shards, strict=True)}
    if count > 1:
        index = {
            "metadata": {"total_size": sum(entry.nbytes for entry in entries)},
            "weight_map": {e.name: name for name, shard in zip(names, shards, strict=True) for e in shard},
        }
        made["model.safetensors.index.json"] = fsio.write_json(directory / "model.safetensors.index.json", index)
    return made
