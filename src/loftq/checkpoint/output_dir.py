"""Where a result goes: what may stand there already, and how the finished work gets there."""

import errno
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any

from loftq.checkpoint.manifest import MANIFEST, checked
from loftq.checkpoint.shards import Workspace
from loftq.errors import ConflictError, InputError, LoftqError, StorageError, UsageError, listed, option, quoted
from loftq.formats import fsio, hashed_json, strict_json
from loftq.formats.regular import shown, url_of

PLACE = "source_directory"  # in the identity of a workspace alone: no output holds a path
SHARED = "shared"  # the same: whether it is made by processes that share it
OF_SOURCE = ("source.", "base.", "plan:", "statistics.")  # of an identity: the sources, and what follows from them
MACHINE = "machine"  # of an identity: what may change bits, and makes no other result of what is done
NOTES = {"", ".md", ".png", ".pdf", ".svg"}  # endings of files that no loader reads: people may add them
TRAINED = re.compile(r"checkpoint-\d+")  # what a Trainer puts beside the model that it trains
_TAKEN = (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY)


def check_places(source: Path, work: Workspace, output: Path) -> None:
    """Refuse places that would touch the source, and those that no rename can reach."""
    real_source = PurePath(_place(source))
    for path in (PurePath(url_of(directory) or directory) for directory in (output, work.root)):
        if path == real_source or real_source in path.parents or path in real_source.parents:
            what = f"is, holds or lies in the source {shown(source)}"
            raise UsageError(f"{shown(path)}: {what}; choose another {option('output')}")
    if os.path.ismount(output):
        raise UsageError(f"{output}: a mount point, where no rename can put the result; choose a directory in it")


def already_done(
    output: Path,
    identity: dict[str, Any],
    overwrite: bool | None,
    mark: str = MANIFEST,
    check: Callable[[dict[str, Any], Path], dict[str, Any]] = checked,
) -> dict[str, Any] | None:
    """What is written last of an output that this very command made earlier; ConflictError for anything else there.

    Sizes are compared and names, no bytes: reading all of a large output takes as long as copying it.

    Args:
        overwrite: None if the command has no such option.
        mark: the name of that file.
        check: returns its content, or raises InputError.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    if not (output / mark).is_file():
        made = "another command of loftq made" if any(output.glob("loftq_*.json")) else "loftq did not make"
        kind = f"a directory that {made}" if output.is_dir() else "not a directory"
        raise ConflictError(f"{shown(output)}: exists and is {kind}; choose another {option('output')}")
    try:
        found = check(hashed_json.load(output / mark), output / mark)
        all_changed = (d for d in hashed_json.differences(found["identity"], identity) if not _of_machine(d))
        changed = listed(_told(all_changed))
        damaged = listed(n for n, digest in found["files"].items() if _size(output / n) != digest["size"])
    except InputError as e:
        changed, damaged = "", str(e)
    else:
        if not changed and not damaged:
            _refuse_added(output, {*found["files"], mark})
            return found
    if overwrite:
        return None
    problem = f"made by another command ({changed})" if changed else f"damaged ({damaged})"
    cure = "remove it" if overwrite is None else option("overwrite", True)
    raise ConflictError(f"{shown(output)}: {problem}; choose another {option('output')}, or {cure}")


def _refuse_added(output: Path, named: Collection[str]) -> None:
    """ConflictError for a file beside those of a result, where a loader may take it for a part of it."""
    places = {PurePath(name).parent for name in named}
    added = listed(quoted(name) for name, _ in strangers(output, named) if PurePath(name).parent in places)
    if added:
        raise ConflictError(
            f"{shown(output)}: finished, and since then {added} was added, which a loader may take for a part of it; "
            "move that to another place"
        )


def is_ours(work: Workspace, identity: dict[str, Any]) -> bool:
    """Whether what is in the workspace belongs to this command, or to none any more."""
    return not work.identity.exists() or not list(hashed_json.differences(_left(work)[0], identity))


def claim(work: Workspace, identity: dict[str, Any], source: Path, shared: bool = False) -> None:
    """Make the workspace, or accept one that an earlier run with the same identity left. ConflictError for others.

    Args:
        shared: other processes may be at work in it.
    """
    accept(work, identity, source, shared)
    for directory in (work.output, work.units):
        fsio.make_dirs(directory)
    if not shared:
        for directory in (work.root, work.output, work.units, *filter(Path.is_dir, work.units.iterdir())):
            for leftover in directory.glob(".*.tmp"):
                fsio.remove(leftover)
    mine = {**identity, PLACE: _place(source), **({SHARED: True} if shared else {})}
    if not work.identity.exists() and not fsio.create(work.identity, [strict_json.dumps(mine)]):
        accept(work, identity, source, shared)


def accept(work: Workspace, identity: dict[str, Any], source: Path, shared: bool) -> None:
    """ConflictError for the workspace of another command, or of another way to share it."""
    if work.identity.exists():
        left, place, others = _left(work)
        changed = list(hashed_json.differences(left, identity))
        if changed and place == _place(source) and all(change.startswith(OF_SOURCE) for change in changed):
            raise ConflictError(
                f"{shown(work.root)}: holds unfinished work from before {shown(source)} changed ({listed(changed)}); "
                "put that back to finish it, or delete the directory to begin anew"
            )
        if changed and all(map(_of_machine, changed)):
            raise ConflictError(
                f"{shown(work.root)}: begun by this command on another machine ({listed(changed)}), whose results "
                "differ in their bits; finish it on such a machine, or delete the directory to begin again on this one"
            )
        if changed:
            raise ConflictError(
                f"{shown(work.root)}: holds unfinished work of another command ({listed(_told(changed))}); "
                "run that command again to finish it, or delete the directory"
            )
        if others != shared:
            mode, way = ("by processes that share it", "with") if others else ("by one process", "without")
            raise ConflictError(
                f"{shown(work.root)}: begun {mode}; go on {way} {option('shared', True)}, or delete the directory"
            )


def publish(work: Workspace, output: Path, files: dict[str, Any], overwrite: bool) -> None:
    """One rename makes the result visible. What was there before waits in the workspace until then."""
    wanted = {MANIFEST, *files}
    for path in work.output.rglob("*"):
        if not path.is_dir() and path.relative_to(work.output).as_posix() not in wanted:
            fsio.remove(path)
    for name, digest in files.items():
        if _size(work.output / name) != digest["size"]:
            gone = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            raise StorageError(f"{work.output / name}: vanished or changed; run the same command again") from gone
    if overwrite and output.is_dir() and any(output.iterdir()):
        fsio.rename(output, work.replaced)
    try:
        fsio.rename(work.output, output)
    finally:
        put_back(work, output)


def put_back(work: Workspace, output: Path) -> None:
    """Undo the first of the two renames of ``--overwrite`` where the second did not happen."""
    if work.replaced.exists() and not output.exists():
        fsio.rename(work.replaced, output)


def was_taken(error: LoftqError) -> bool:
    """Whether files vanished or appeared under our hands: where locks only pretend, another process did it."""
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in _TAKEN


def strangers(directory: Path, named: Collection[str]) -> Iterator[tuple[str, str]]:
    """What lies in a result, at any depth, and does not belong there: its name, and what is wrong with it.

    Files that the manifest does not name, of which a loader may take one for a part of the checkpoint; links to
    directories or out of it; pipes and devices. Hidden names are no loader's business.

    Args:
        named: the files that belong there.
    """
    left = [directory]
    while left:
        with os.scandir(left.pop()) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        for entry in found:
            path = Path(entry.path)
            name = path.relative_to(directory).as_posix()
            if entry.name.startswith(".") or (TRAINED.fullmatch(name) and entry.is_dir(follow_symlinks=False)):
                continue
            if entry.is_dir(follow_symlinks=False):
                left.append(path)
            elif name not in named:
                if not entry.is_file(follow_symlinks=False):
                    yield name, f"{kind(path)}, and not in the manifest"
                elif path.suffix not in NOTES:
                    yield name, "not in the manifest"


def kind(path: Path) -> str:
    """What a path is, in words."""
    if path.is_symlink():
        return "a link"
    return "a directory" if path.is_dir() else "a file" if path.is_file() else "a pipe, device or socket"


def _left(work: Workspace) -> tuple[dict[str, Any], Any, bool]:
    """The identity of the work that was left, where its source lay, and whether it is shared; empty if unreadable."""
    try:
        left = strict_json.load_object(work.identity)
    except LoftqError:
        return {}, None, False
    return left, left.pop(PLACE, None), left.pop(SHARED, False) is True


def _place(source: Path) -> str:
    """Where a source lies: one name for it on this machine."""
    return url_of(source) or str(source.resolve())


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _told(differences: Iterable[str]) -> list[str]:
    """Those to name: not the hash of the plan, which follows from the options, beside others."""
    found = list(differences)
    return [d for d in found if not d.startswith("plan: ")] or found


def _of_machine(difference: str) -> bool:
    return difference.startswith((f"{MACHINE}.", f"{MACHINE}:"))
