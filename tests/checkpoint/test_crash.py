"""Crashes at every change of the file system: the output is absent or complete, and the same command continues."""

import ast
import collections
import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import loftq
from harness import Child, hooked, one_skeleton, put_tree, run, tiny_source, tree
from loftq.checkpoint import quantize as module
from loftq.errors import ConflictError, StorageError

pytestmark = pytest.mark.slow

MATRICES = 12
LOST = 9


OF_OS = {
    "rename",
    "replace",
    "remove",
    "unlink",
    "mkdir",
    "makedirs",
    "rmdir",
    "truncate",
    "ftruncate",
    "link",
    "symlink",
}
OF_PATHS = {"write_text", "write_bytes", "touch", "mkdir", "rmdir", "unlink", "symlink_to", "hardlink_to", "chmod"}
ANYWHERE = {"save_file", "save_model", "save_pretrained", "torch.save", "pickle.dump", "json.dump", "tempfile.mkdtemp"}


def test_nothing_but_fsio_changes_files():
    """What every test of this file rests on. In training the Trainer writes, and a run counts by its last file; a graph
    is written by its exporter, into a directory that is renamed when it is whole.
    """
    for file in Path(loftq.__path__[0]).rglob("*.py"):
        if file.parent.name == "finetune" and file.name in ("arguments.py", "checkpoints.py", "model.py", "trainer.py"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or file.name == "fsio.py":
                continue
            name, call = ast.unparse(node.func), f"{file}: {ast.unparse(node)}"
            module, _, function = name.rpartition(".")
            assert not (module in ("os", "pathlib.os") and function in OF_OS), call
            assert not (module == "shutil" and function != "disk_usage"), call
            assert function not in OF_PATHS, call
            assert not {name, function} & ANYWHERE or (file.name, name) == ("onnx.py", "made.save_pretrained"), call
            assert name != "open" or ast.unparse(node.args[1]) == "'rb'", call


@dataclasses.dataclass
class Bench:
    """A source, a place for the output, and what an undisturbed run makes and does there."""

    source: Path
    place: Path
    golden: dict[str, bytes]
    calls: list[tuple[str, Path]]
    solved: list[str]
    before: tuple[dict[str, bytes], dict[str, int]]

    @property
    def output(self) -> Path:
        return self.place / "out"

    def run(self, **changes: Any) -> dict[str, Any]:
        return run(self.source, self.output, **changes)

    def empty(self) -> None:
        shutil.rmtree(self.place)
        self.place.mkdir()

    def check_crashed(self) -> None:
        """The oracle before resuming: output absent or complete, source untouched, nothing elsewhere."""
        assert {p.name for p in self.place.iterdir()} <= {"out", "out.loftq-partial"}
        if self.output.exists():
            assert tree(self.output) == self.golden
        assert source_state(self.source) == self.before

    def check_resumed(self, **changes: Any) -> None:
        """Resume: the golden bytes, no leftovers, finished units not made again."""
        finished = MATRICES if self.output.exists() else finished_matrices(self.place / "out.loftq-partial")
        self.solved.clear()
        self.run(**changes)
        assert tree(self.place) == {f"out/{name}": raw for name, raw in self.golden.items()}
        assert len(self.solved) == MATRICES - finished


def source_state(source: Path) -> tuple[dict[str, bytes], dict[str, int]]:
    return tree(source), {str(p): p.stat().st_mtime_ns for p in source.rglob("*")}


def finished_matrices(work: Path) -> int:
    """How many matrices are done, by the records that are whole and whose files have the recorded hashes.

    Where there is no such record, by the files of single matrices that are whole.
    """
    done = finished_shards(work)
    waiting = [
        p for p in work.glob("units/*/*.safetensors") if not p.name.startswith(".") and p.parent.name not in done
    ]
    return sum(done.values()) + sum(map(is_whole, waiting))


def is_whole(piece: Path) -> bool:
    raw = piece.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    try:
        told = json.loads(raw[8:start])["__metadata__"]
    except (ValueError, KeyError):
        return False
    return hashlib.sha256(told["report"].encode() + raw[start:]).hexdigest() == told["sha256"]


def finished_shards(work: Path) -> dict[str, int]:
    """Name of a unit -> its matrices, if its record is whole and its files have the recorded hashes."""
    index = {}
    found = {}
    for record_file in work.glob("units/?????.json"):
        record = json.loads(record_file.read_bytes())
        index[record["shard"]["sha256"]] = {"unit": record_file.stem, **record}
        piece = record_file.with_suffix(".safetensors")
        if not piece.exists() or hashlib.sha256(piece.read_bytes()).hexdigest() != record["piece"]["sha256"]:
            index.pop(record["shard"]["sha256"])
    for shard in work.glob("output/model*.safetensors"):
        record = index.get(hashlib.sha256(shard.read_bytes()).hexdigest())
        if record:
            found[record["unit"]] = len(record["matrices"])
    return found


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    """On a file system in memory if there is one: thousands of fsyncs wait for nothing there."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as root:
        yield from set_up(Path(root))


def set_up(root: Path) -> Iterator[Bench]:
    source, place = tiny_source(root / "source"), root / "place"
    place.mkdir()
    calls: list[tuple[str, Path]] = []
    solved: list[str] = []
    solve = module.solve_matrix

    def counted(matrix: Any, *rest: Any) -> Any:
        solved.append(matrix.name)
        return solve(matrix, *rest)

    with one_skeleton(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "solve_matrix", counted)
        made = Bench(source, place, {}, calls, solved, source_state(source))
        with hooked(lambda op, path: calls.append((op, path))):
            made.run()
        made.golden.update(tree(made.output))
        assert len(solved) == MATRICES
        assert sum(name.startswith("model-") for name in made.golden) >= 4
        yield made


def die(bench: Bench, step: Callable[[int, str, Path], None], done: Callable[[int, str, Path], None], **changes: Any):
    """Run in a child, with hooks that know the number of the call and may end the child at once."""
    calls = iter(range(100_000))
    now = [0]

    def before(op: str, path: Path) -> None:
        now[0] = next(calls)
        step(now[0], op, path)

    def work() -> None:
        with hooked(before, lambda op, path: done(now[0], op, path)):
            bench.run(**changes)

    return Child(work).ended()


def nothing(*_: Any) -> None:
    pass


def die_before(bench: Bench, k: int, **changes: Any) -> None:
    ended = die(bench, lambda n, op, path: n == k and os._exit(LOST), nothing, **changes)
    assert ended.code == LOST, ended.err


OPS = {"mkdir", "create", "write", "fsync", "rename", "link", "unlink", "fsync-dir", "rmtree"}


def test_the_ops_are_known(bench):
    assert {op for op, _ in bench.calls} == OPS


@pytest.mark.parametrize("op", ["mkdir", "create", "rename", "link", "unlink", "rmtree"])
def test_killed_before_every(op, bench):
    """A kill keeps what was written, so these are all states but those within a file, which follow below.

    Nothing happens between two primitives: before one is after the other, and a sync changes nothing that is seen.
    """
    for k in [n for n, (called, _) in enumerate(bench.calls) if called == op]:
        bench.empty()
        die_before(bench, k)
        bench.check_crashed()
        bench.check_resumed()


class Stairs:
    """Trouble at the first primitive that had none yet: run after run, each gets one primitive further."""

    def __init__(self) -> None:
        self.troubled: set[str] = set()
        self._seen: collections.Counter[str] = collections.Counter()
        self._last = ""

    def begin(self) -> None:
        self._seen.clear()

    def next(self, op: str, path: Path) -> str:
        """The name of this primitive if it is its turn to have trouble, else nothing."""
        name = path.name[:-21] if path.name.endswith(".tmp") else path.name
        place = f"{op} {path.parent.name}/{name}" if path.parent.parent.name == "units" else f"{op} {name}"
        if op == "fsync-dir":
            place += f" after {self._last}"
        self._last = place
        self._seen[place] += 1
        name = f"{place} {self._seen[place]}"
        return "" if name in self.troubled else name

    def missed(self, calls: list[tuple[str, Path]]) -> set[str]:
        """Primitives of an undisturbed run that had no trouble."""
        self.begin()
        return {self.next(op, path) for op, path in calls} - {""}


def test_killed_within_every_file(bench):
    """In the middle of each write and after each sync; then the same command again, until all had their kill."""
    stairs, size = Stairs(), [0]

    def step(n: int, op: str, path: Path) -> None:
        size[0] = path.stat().st_size if op == "write" else 0

    def done(n: int, op: str, path: Path) -> None:
        turn = stairs.next(op, path)
        if turn and op in ("write", "fsync"):
            if op == "write":
                os.truncate(path, (size[0] + path.stat().st_size) // 2)
            os.write(2, turn.encode())
            os._exit(LOST)

    bench.empty()
    while (ended := die(bench, step, done)).code == LOST:
        stairs.troubled.add(ended.err)
        bench.check_crashed()
    assert ended.code == 0, ended.err
    assert tree(bench.output) == bench.golden
    assert not [turn for turn in stairs.missed(bench.calls) if turn.startswith(("write", "fsync "))]


@pytest.mark.parametrize("seed", range(4))
def test_killed_within_the_cleaning(seed, bench):
    """A directory is removed file by file, in any order."""

    def half_removed(n: int, op: str, path: Path) -> None:
        if op == "rmtree":
            files = sorted(p for p in path.rglob("*") if p.is_file())
            for file in random.Random(seed).sample(files, len(files) // 2 + 1):
                file.unlink()
            os._exit(LOST)

    bench.empty()
    assert die(bench, half_removed, nothing).code == LOST
    bench.check_crashed()
    bench.check_resumed()


@pytest.mark.parametrize("seed", range(3))
def test_killed_again_and_again(seed, bench):
    chance = random.Random(seed)
    bench.empty()
    for _ in range(5):
        k = chance.randrange(60)
        die(bench, lambda n, op, path, k=k: n == k and os._exit(LOST), nothing)
        bench.check_crashed()
    bench.check_resumed()


def test_killed_at_every_point_of_an_overwrite(bench):
    """The old output is there, whole, until the new one is; in between it waits in the workspace."""
    other = dataclasses.replace(module.QuantizeOptions().policy, bits="4", rank="4")
    bench.empty()
    bench.run(policy=other)
    old = tree(bench.output)
    calls: list[str] = []
    with hooked(lambda op, path: calls.append(f"{op} {path.name}")):
        bench.run(overwrite=True)
    first = calls.index("rename replaced")
    assert len(calls) - first == 8
    for k in range(first - 3, len(calls)):
        bench.empty()
        put_tree(bench.output, old)
        die_before(bench, k, overwrite=True)
        waiting = bench.place / "out.loftq-partial" / "replaced"
        assert tree(bench.output if bench.output.exists() else waiting) in (old, bench.golden)
        bench.run(overwrite=True)
        assert tree(bench.place) == {f"out/{name}": raw for name, raw in bench.golden.items()}


def test_the_old_output_comes_back_before_anything_else(bench):
    """Killed between the two renames, then called with other options: nothing of the old output is lost."""
    other = dataclasses.replace(module.QuantizeOptions().policy, bits="4", rank="4")
    bench.empty()
    bench.run(policy=other)
    old = tree(bench.output)
    calls: list[str] = []
    with hooked(lambda op, path: calls.append(f"{op} {path.name}")):
        bench.run(overwrite=True)
    bench.empty()
    put_tree(bench.output, old)
    die_before(bench, calls.index("rename out"), overwrite=True)
    assert not bench.output.exists()
    with pytest.raises(ConflictError, match="made by another command"):
        bench.run()
    assert tree(bench.output) == old
    bench.empty()
    put_tree(bench.output, old)
    die_before(bench, calls.index("rename out"), overwrite=True)
    bench.run(policy=other)  # the command that made the old one: done already, and the unfinished work is not its own
    assert tree(bench.output) == old
    assert finished_matrices(bench.place / "out.loftq-partial") == MATRICES


class Disk:
    """What a power cut would leave: only bytes that were synced, under names whose directory was synced.

    Every file and directory has a number for life. ``synced`` has the bytes of a file at its last fsync, ``names``
    the entries of a directory at its last fsync. ``forgets`` are kinds of fsync that this disk only pretends.
    """

    def __init__(self, root: Path, forgets: tuple[str, ...] = ()) -> None:
        self.root, self.forgets = root, forgets
        self.numbers: dict[int, int] = {}
        self.synced: dict[int, bytes] = {}
        self.names: dict[int, dict[str, tuple[int, bool]]] = {}
        self._fresh = iter(range(1, 1_000_000))
        self._number(root)

    def _number(self, path: Path, new: bool = False) -> int:
        inode = path.stat().st_ino
        if new or inode not in self.numbers:
            self.numbers[inode] = next(self._fresh)
        return self.numbers[inode]

    def done(self, op: str, path: Path) -> None:
        if op in self.forgets:
            return
        if op in ("create", "mkdir"):
            self._number(path, new=True)
        elif op == "fsync":
            self.synced[self._number(path)] = path.read_bytes()
        elif op == "fsync-dir" and path.is_relative_to(self.root):
            entries = {p.name: (self._number(p), p.is_dir()) for p in path.iterdir()}
            self.names[self._number(path)] = entries

    def durable(self, number: int | None = None, prefix: str = "") -> dict[str, bytes]:
        """Names and bytes that were synced."""
        left: dict[str, bytes] = {}
        entries = self.names.get(self._number(self.root) if number is None else number, {})
        for name, (child, is_directory) in entries.items():
            if is_directory:
                left |= self.durable(child, f"{prefix}{name}/") or {f"{prefix}{name}/": b""}
            else:
                left[prefix + name] = self.synced.get(child, b"")
        return left

    def names_only(self, lost: Callable[[int], bytes]) -> dict[str, bytes]:
        """All names of the moment; bytes that were not synced are lost."""
        left = tree(self.root)
        for name, raw in left.items():
            if not name.endswith("/"):
                left[name] = self.synced.get(self._number(self.root / name), lost(len(raw)))
        return left


def power_cuts(bench: Bench, forgets: tuple[str, ...] = ()) -> tuple[list[tuple[dict[str, bytes], int]], dict]:
    """Every different state that a power cut can leave, each with the matrices promised durable; and the last state."""
    bench.empty()
    disk = Disk(bench.place, forgets)
    states: dict[int, tuple[dict[str, bytes], int]] = {}
    promised = 0

    def keep() -> None:
        for left in (disk.durable(), disk.names_only(lambda n: b""), disk.names_only(bytes)):
            states.setdefault(key(left), (left, promised))

    def done(op: str, path: Path) -> None:
        nonlocal promised
        disk.done(op, path)
        if op == "fsync-dir" and "units" in (path.name, path.parent.name):
            promised = finished_matrices(bench.place / "out.loftq-partial")
        keep()

    with hooked(lambda op, path: keep(), done):
        bench.run()
    return list(states.values()), disk.durable()


def key(state: dict[str, bytes]) -> int:
    """Equal for states that differ only in temporary files, which nothing ever reads."""
    return hash(tuple(sorted((n[:-21], b"") if n.endswith(".tmp") else (n, raw) for n, raw in state.items())))


def test_power_cut_at_every_point(bench):
    states, last = power_cuts(bench)
    assert last == {f"out/{name}": raw for name, raw in bench.golden.items()}, "exit 0 promised this"
    assert len(states) > 100
    for left, promised in states:
        bench.empty()
        put_tree(bench.place, left)
        bench.check_crashed()
        assert finished_matrices_whole(bench) >= promised
        bench.check_resumed()


def finished_matrices_whole(bench: Bench) -> int:
    return MATRICES if bench.output.exists() else finished_matrices(bench.place / "out.loftq-partial")


@pytest.mark.parametrize("forgets", ["fsync", "fsync-dir"])
def test_a_missing_fsync_is_noticed(forgets, bench):
    """The test of the test above: on a disk that only pretends to sync, it goes red."""
    states, last = power_cuts(bench, (forgets,))
    good = {f"out/{name}": raw for name, raw in bench.golden.items()}
    visible = [{n: raw for n, raw in left.items() if n.startswith("out/")} for left, _ in states]
    assert last != good or any(seen not in ({}, good) for seen in visible)


ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT)


def test_a_fault_at_every_primitive(bench, caplog):
    """Exit code 4, output absent or complete, and the same command continues to the same bytes."""
    stairs, errors = Stairs(), itertools.cycle(ERRORS)
    failed: list[str] = []

    def step(op: str, path: Path) -> None:
        turn = stairs.next(op, path) if not failed else ""
        if turn:
            failed.append(turn)
            number = next(errors)
            raise OSError(number, os.strerror(number))

    def once() -> str:
        """One run with one fault; its name."""
        stairs.begin()
        failed.clear()
        raised = None
        with hooked(step):
            try:
                bench.run()
            except StorageError as e:
                raised = e
        if failed and not failed[0].startswith(("rmtree out", "fsync-dir place after rmtree out")):
            assert raised is not None
            assert raised.exit_code == 4
            assert str(raised).startswith(str(bench.place))
        else:  # nothing failed, or only the cleaning
            assert raised is None
        bench.check_crashed()
        return failed[0] if failed else ""

    bench.empty()
    while turn := once():
        stairs.troubled.add(turn)
    assert tree(bench.place) == {f"out/{name}": raw for name, raw in bench.golden.items()}
    assert stairs.missed(bench.calls) <= {"fsync-dir out.loftq-partial after fsync-dir place after rename out 1"}
    assert "this directory can be deleted" in caplog.text


@pytest.mark.parametrize("number", ERRORS, ids=["ENOSPC", "EIO", "EDQUOT"])
def test_a_fault_that_stays(number, bench):
    """From some primitive on, all fail: nothing that runs afterwards makes it worse."""
    for k in range(ERRORS.index(number), len(bench.calls), 15):
        calls = itertools.count()

        def step(op: str, path: Path, k=k, calls=calls) -> None:
            if next(calls) >= k:
                raise OSError(number, os.strerror(number))

        bench.empty()
        with hooked(step), contextlib.suppress(StorageError):
            bench.run()
        bench.check_crashed()
        bench.run()
        assert tree(bench.place) == {f"out/{name}": raw for name, raw in bench.golden.items()}


def test_no_descriptor_is_left_open(bench):
    def fail(op: str, path: Path) -> None:
        if op == "fsync" and "00003" in path.name:
            raise OSError(errno.EIO, "Input/output error")

    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        bench.empty()
        with hooked(fail), pytest.raises(StorageError):
            bench.run()
        bench.run()
    assert len(os.listdir("/proc/self/fd")) == before
