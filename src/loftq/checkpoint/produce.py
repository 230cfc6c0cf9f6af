"""A directory of results that is made whole: absent or complete, and known again by the command that made it."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loftq.checkpoint.manifest import FileRow, Part
from loftq.checkpoint.output_dir import already_done, check_places, claim, is_ours, publish
from loftq.checkpoint.shards import Workspace
from loftq.errors import LoftqError
from loftq.formats import fsio, hashed_json
from loftq.formats.config import EXPORTED
from loftq.formats.regular import output_path

Files = dict[str, fsio.FileDigest]


class Mark(Part):
    """What is written last into the directory."""

    identity: dict[str, Any]
    files: dict[str, FileRow]


def produce(
    output: Path,
    identity: dict[str, Any],
    sources: list[Path],
    overwrite: bool | None,
    fill: Callable[[Path], Files],
    report: Callable[[], dict[str, Any]] = dict,
    mark: tuple[str, type[Mark]] = (EXPORTED, Mark),
    resumed_after: tuple[type[LoftqError], ...] = (),
) -> dict[str, Any]:
    """Make the directory ``output`` by one rename; what is written in it last: identity, the report, and files.

    Args:
        identity: all that the bytes depend on; an output of the same is left alone.
        sources: directories that are read.
        overwrite: None if the command has no such option.
        fill: writes files into a directory, and says which.
        report: called after that.
        mark: the name of the file that is written last, and its fields.
        resumed_after: errors of ``fill`` after which the same command continues; after others nothing is left.

    Raises: ConflictError if ``output`` holds something else, or another process works on it; what ``fill`` raises.
    """
    output, (name, fields) = output_path(output), mark
    work = Workspace(output)
    for source in sources:
        check_places(source, work, output)
    done = already_done(output, identity, overwrite, name, fields.checked)
    if done and not (work.root.exists() and is_ours(work, identity)):  # nothing to clean away
        return done
    fsio.make_dirs(work.root)
    with fsio.DirectoryLock(work.lock):
        done = done or already_done(output, identity, overwrite, name, fields.checked)  # by another process meanwhile
        if not done:
            claim(work, identity, sources[0])
            try:
                files = {file: asdict(digest) for file, digest in fill(work.output).items()}
            except LoftqError as e:
                if not isinstance(e, resumed_after):
                    fsio.remove_tree(work.root)
                raise
            content = {"format_version": 1, "identity": identity, **report(), "files": files}
            done = hashed_json.write(work.output / name, content)
            publish(work, output, {**files, name: asdict(fsio.sha256_file(work.output / name))}, bool(overwrite))
        if is_ours(work, identity):
            fsio.remove_tree(work.root)
    return done
