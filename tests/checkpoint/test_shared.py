"""Runs that processes share: any may die, stop or come late, and the result is that of one process, to the byte."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import loftq
from harness import FLAGS, POLICY, Child, cli, hooked, one_skeleton, refused, run, start_cli, tiny_source, tree
from loftq.checkpoint import claims, quantize, shared, team
from loftq.checkpoint.claims import Crew, Watch
from loftq.checkpoint.output_dir import claim
from loftq.checkpoint.shards import Workspace
from loftq.checkpoint.team import Handlers, Share, Team
from loftq.errors import ConflictError, StorageError, UsageError
from loftq.formats import fsio

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("LOFTQ_KILLS", "8"))
MATRICES = 12


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Hearts that beat, and are missed, within the patience of a test. Children have it too: they are forked."""
    monkeypatch.setattr(claims, "BEAT", 0.1)
    monkeypatch.setattr(claims, "STALE", 1.5)
    monkeypatch.setattr(team, "POLL", 0.02)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_source(tmp_path_factory.mktemp("shared") / "source")


@pytest.fixture(scope="module")
def golden(source):
    """What one process makes that shares with nobody; and the skeleton is built before any fork."""
    with one_skeleton():
        run(source, source.parent / "alone")
        yield tree(source.parent / "alone")


def no_locks() -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks here")

    fcntl.flock = flock


def no_links() -> None:
    def link(*_: object, **__: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no links here")

    os.link = link


def late_listing() -> None:
    """Every listing is the one before."""
    now, seen = team.names_in, {}

    def names_in(directory: Path) -> set[str]:
        before = seen.get(directory, set())
        seen[directory] = now(directory)
        return before

    team.names_in = names_in


def plain() -> None:
    pass


FILE_SYSTEMS = (plain, no_locks, no_links, late_listing)


def sharing(source: Path, output: Path, setup: Callable[[], None] = plain, dies_at: int = -1, **changes: Any) -> Child:
    """A process that shares; it kills itself before a change of the file system, in whatever thread."""
    left = iter(range(10_000))

    def step(op: str, path: Path) -> None:
        if next(left) == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        setup()
        with hooked(step):
            run(source, output, shared=True, **changes)

    return Child(work)


@pytest.mark.parametrize("file_system", FILE_SYSTEMS)
def test_three_processes_make_what_one_makes(file_system, source, golden, tmp_path):
    children = [sharing(source, tmp_path / "out", file_system) for _ in range(3)]
    for ended in [child.ended() for child in children]:
        assert ended.code == 0, ended.err
    assert tree(tmp_path) == {f"out/{name}": raw for name, raw in golden.items()}


def test_killed_anywhere(source, golden, tmp_path):
    """``LOFTQ_KILLS=200`` is what was promised. Two are killed at a time, and two finish."""
    chance, killed, output = random.Random(0), 0, tmp_path / "out"
    while killed < KILLS:
        file_system = chance.choice(FILE_SYSTEMS)
        for _ in range(chance.randrange(1, 4)):
            doomed = [sharing(source, output, file_system, chance.randrange(150)) for _ in range(2)]
            ends = [child.ended() for child in doomed]
            assert all(e.code in (0, -signal.SIGKILL) for e in ends), ends
            killed += sum(e.code != 0 for e in ends)
            if output.exists():
                assert tree(output) == golden
        for ended in [child.ended() for child in [sharing(source, output, file_system) for _ in range(2)]]:
            assert ended.code == 0, ended.err
        assert tree(tmp_path) == {f"out/{name}": raw for name, raw in golden.items()}
        for path in sorted(tmp_path.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()


def full_disk(is_full: Callable[[Path], bool]) -> Callable[[str, Path], None]:
    def step(op: str, path: Path) -> None:
        if op == "write" and is_full(path):
            raise OSError(errno.ENOSPC, "No space left on device")

    return step


@pytest.mark.parametrize("names", [".00000.*.safetensors.*", ".00000.json.*"])
def test_a_full_disk_gets_no_fuller(names, source, golden, tmp_path):
    """However often the command is run again: a shard whose record cannot be written is removed."""
    units = Workspace(tmp_path / "out").units
    full = full_disk(lambda path: path.parent == units and path.match(names))
    with hooked(full), pytest.raises(StorageError, match="no space left"):
        run(source, tmp_path / "out", shared=True)
    assert not list(units.glob("00000.*.s*"))
    run(source, tmp_path / "out", shared=True)
    assert tree(tmp_path) == {f"out/{name}": raw for name, raw in golden.items()}


def solved_slowly(seconds: float, first: Callable[[], None] = plain) -> None:
    solve = shared.solve_matrix

    def slow(*arguments: Any) -> Any:
        first()
        time.sleep(seconds)
        return solve(*arguments)

    shared.solve_matrix = slow


def test_nobody_waits_for_a_slow_one(source, golden, tmp_path):
    """It needs a minute for a matrix; the other takes what it has claimed, and it ends with the same result."""
    slow = sharing(source, tmp_path / "out", lambda: solved_slowly(60))
    while not list(tmp_path.glob("out.loftq-partial/units/*.claim.0")):
        time.sleep(0.01)
    quick = sharing(source, tmp_path / "out").ended()
    assert quick.code == 0, quick.err
    ended = slow.ended(30)
    assert ended.code == 0, ended.err
    assert tree(tmp_path) == {f"out/{name}": raw for name, raw in golden.items()}


def test_one_that_is_stopped_and_goes_on(source, golden, tmp_path):
    """Taken for dead, replaced, and alive again: it returns what the other has made."""
    stopped = sharing(source, tmp_path / "out", lambda: solved_slowly(0, lambda: os.kill(os.getpid(), signal.SIGSTOP)))
    while not list(tmp_path.glob("out.loftq-partial/units/*.claim.0")):
        time.sleep(0.01)
    ended = sharing(source, tmp_path / "out").ended()
    assert ended.code == 0, ended.err
    until = time.monotonic() + 60
    while not stopped.has_ended() and time.monotonic() < until:
        stopped.kill(signal.SIGCONT)
        time.sleep(0.05)
    ended = stopped.ended()
    assert ended.code == 0, ended.err
    assert tree(tmp_path) == {f"out/{name}": raw for name, raw in golden.items()}


def test_one_that_goes_on_in_the_place_of_another_run(source, golden, tmp_path):
    """Its results would be taken for those of the run that was begun there meanwhile, with other options."""
    output, other = tmp_path / "out", dataclasses.replace(POLICY, solve=loftq.SolveSpec(steps=3))
    run(source, tmp_path / "alone", policy=other)
    old = sharing(source, output, lambda: solved_slowly(0, lambda: os.kill(os.getpid(), signal.SIGSTOP)))
    os.waitid(os.P_PID, old.pid, os.WSTOPPED | os.WNOWAIT)
    shutil.rmtree(Workspace(output).root)
    stopped_run(source, output, "00000.json", shared=True, policy=other)
    while not old.has_ended():
        old.kill(signal.SIGCONT)
        time.sleep(0.05)
    assert "ConflictError" in old.ended().err
    run(source, output, shared=True, policy=other)
    assert tree(output) == tree(tmp_path / "alone")


def test_a_budget_is_measured_and_spent_once(source, golden, tmp_path):
    budget = dataclasses.replace(POLICY, bits="4", budget="3.5")
    run(source, tmp_path / "alone", policy=budget)
    children = [sharing(source, tmp_path / "out", policy=budget) for _ in range(2)]
    for ended in [child.ended() for child in children]:
        assert ended.code == 0, ended.err
    assert tree(tmp_path / "out") == tree(tmp_path / "alone")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "alone"}


def test_the_summary_is_the_same(source, golden, tmp_path):
    children = [start_cli("quantize", source, "-o", tmp_path / "out", "--shared", *FLAGS) for _ in range(2)]
    ends = [child.ended() for child in children]
    assert [e.code for e in ends] == [0, 0], ends
    late = cli("quantize", source, "-o", tmp_path / "out", "--shared", *FLAGS)
    assert late.code == 0
    assert ends[0].out == ends[1].out
    assert late.out.endswith(ends[0].out)
    assert tree(tmp_path / "out") == golden


def stopped_run(source: Path, output: Path, at: str = "README.md", **changes: Any) -> None:
    """Work for an output that is left unfinished: before a file of a name is written."""

    def step(op: str, path: Path) -> None:
        if path.name == at:
            os._exit(9)

    def work() -> None:
        with hooked(step):
            run(source, output, **changes)

    assert Child(work).ended().code == 9


def test_shared_and_plain_runs_exclude_each_other(source, golden, tmp_path):
    stopped_run(source, tmp_path / "a", shared=True)
    with pytest.raises(ConflictError, match="begun by processes that share it; go on with shared=True"):
        run(source, tmp_path / "a")
    stopped_run(source, tmp_path / "b")
    with pytest.raises(ConflictError, match="begun by one process; go on without shared=True"):
        run(source, tmp_path / "b", shared=True)
    run(source, tmp_path / "a", shared=True)
    run(source, tmp_path / "b")
    assert tree(tmp_path / "a") == tree(tmp_path / "b") == golden


def test_what_sharing_refuses(source, golden, tmp_path):
    with pytest.raises(UsageError, match="remove the old output"):
        run(source, tmp_path / "out", shared=True, overwrite=True)
    policy = dataclasses.replace(POLICY, solve=loftq.SolveSpec(steps=2, metric="full"))
    with pytest.raises(UsageError, match=r"take finished statistics.* with torchrun .*loftq\.calibrate"):
        run(source, tmp_path / "out", shared=True, policy=policy, calibrate="notes.txt")
    stopped_run(source, tmp_path / "out", shared=True)

    def other_cpu() -> None:
        quantize.code_path = lambda device: {"cpu": "AVX9", "arithmetic": "0"}

    line = refused(
        cli("quantize", source, "-o", tmp_path / "out", "--shared", *FLAGS, setup=other_cpu), 5, "on another machine"
    )
    assert "AVX9" in line


def test_a_cluster_without_ray(source, golden, tmp_path):
    def without() -> None:
        sys.modules["ray"] = None

    ended = cli("quantize", source, "-o", tmp_path / "out", "--cluster", "auto", *FLAGS, setup=without)
    refused(ended, 2, "pip install 'loftq[ray]'")
    with pytest.raises(UsageError, match="neither auto nor an address like ray://"):
        run(source, tmp_path / "out", cluster="everywhere")
    assert not list(tmp_path.iterdir())


def test_a_unit_that_was_changed_is_made_again(source, golden, tmp_path, caplog):
    stopped_run(source, tmp_path / "out", shared=True)
    work = Workspace(tmp_path / "out")
    shard = next(work.units.glob("00001.*.shard"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    run(source, tmp_path / "out", shared=True)
    assert tree(tmp_path / "out") == golden
    assert "its bytes are not those that were recorded" in caplog.text


def test_what_living_processes_write_is_left_alone(tmp_path):
    work = Workspace(tmp_path / "out")
    work.units.mkdir(parents=True)
    writing = work.units / ".00000.other.shard.0123456789abcdef.tmp"
    writing.write_text("half")
    claim(work, {"options": 1}, tmp_path, shared=True)
    assert writing.exists()


def test_shards_of_a_large_model_by_its_size(source, golden, tmp_path):
    made = cli("quantize", source, "-o", tmp_path / "out", *FLAGS, "--max-shard-size", "auto")
    assert made.code == 0, made.err
    manifest = json.loads((tmp_path / "out" / "loftq_manifest.json").read_text())
    assert manifest["identity"]["options"]["max_shard_bytes"] == 64 << 20


def test_a_calibrated_unit_costs_more(source, tmp_path):
    policy = dataclasses.replace(POLICY, solve=loftq.SolveSpec(steps=1, rounding="feedback"))
    job = quantize.prepared(str(source), Workspace(tmp_path / "out"), quantize.QuantizeOptions(policy=policy)).job
    calibrated = dataclasses.replace(job, identity={**job.identity, "statistics": {}})
    assert shared.cpu_seconds(calibrated, job.units[0]) > shared.cpu_seconds(job, job.units[0])


# Claims


def test_of_many_that_create_a_file_one_wins(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: fsio.create(tmp_path / "file", [b"%d" % i]), range(8)))
    assert won.count(True) == 1
    assert (tmp_path / "file").read_bytes() == b"%d" % won.index(True)
    assert os.listdir(tmp_path) == ["file"]


def test_a_claim_is_taken_over_when_its_file_stops_growing(tmp_path):
    """By the clock of the one who looks: what stands in the file, and its time, say nothing."""
    with Crew(tmp_path) as living, Crew(tmp_path) as mine:
        assert living.take(tmp_path / "x")
        assert not mine.take(tmp_path / "x")
        for hours in (-5, 5):
            there = time.time() + 3600 * hours
            os.utime(tmp_path / "workers" / living.me.id, (there, there))
            assert not mine.take(tmp_path / "x")
        time.sleep(claims.STALE + 0.5)
        assert not mine.take(tmp_path / "x")
        living._left.set()
        time.sleep(claims.STALE + 0.5)
        assert mine.take(tmp_path / "x")
        assert not living.take(tmp_path / "x")


@pytest.mark.parametrize("raw", [b"", b"{", b"{}"])
def test_a_damaged_claim_holds_nobody_up(raw, tmp_path):
    (tmp_path / "x.claim.0").write_bytes(raw)
    with Crew(tmp_path) as mine:
        assert mine.take(tmp_path / "x")


def test_one_that_leaves_is_gone_at_once(tmp_path):
    with Crew(tmp_path) as mine:
        with Crew(tmp_path) as other:
            assert other.take(tmp_path / "x")
        assert mine.take(tmp_path / "x")
    assert not Watch(tmp_path / "workers").is_alive(mine.me.id)


@contextlib.contextmanager
def team_at(root: Path) -> Iterator[Team]:
    with Crew(root) as crew:
        yield Team(crew, 2, lambda: False)


def test_every_item_is_solved_about_once(tmp_path):
    """Three teams of two threads, four shares; what is solved twice is at most what was in work at the end."""
    solved: list[tuple[str, int]] = []
    lock = threading.Lock()

    def solve(share: Share, item: int) -> str:
        with lock:
            solved.append((share.record.name, item))
        time.sleep(0.02)
        return "done"

    def keep(share: Share, item: int, result: str) -> None:
        fsio.make_dirs(share.directory)
        fsio.write_atomic(share.place(item), [result.encode()])

    def close(share: Share) -> list[int]:
        fsio.create(share.record, [b"record"])
        return []

    shares = [Share(tmp_path / "units" / f"{i:05d}.json", 6, cost=i) for i in range(4)]
    fsio.make_dirs(tmp_path / "units")

    def work(_: int) -> int:
        told: list[int] = []
        with team_at(tmp_path) as one:
            one.work(shares, Handlers(solve, keep, close, told.append))
        return sum(told)

    with ThreadPoolExecutor(3) as pool:
        told = list(pool.map(work, range(3)))
    assert set(solved) == {(share.record.name, i) for share in shares for i in range(6)}
    assert len(solved) <= 24 + 6
    assert all(share.record.exists() for share in shares)
    assert 0 < sum(told) < 3 * 24


def closed_by_another(share: Share) -> None:
    fsio.create(share.record, [b"record"])
    fsio.remove_tree(share.directory)


def kept(share: Share, item: int, result: str) -> None:
    fsio.write_atomic(share.place(item), [result.encode()])


def test_a_result_that_comes_when_its_share_was_closed(tmp_path):
    """Who closes a share removes its directory, also from under one who is about to write into it."""
    share = Share(tmp_path / "units" / "00000.json", 2, cost=1)
    fsio.make_dirs(share.directory)
    told: list[int] = []

    def keep(share: Share, item: int, result: str) -> None:
        closed_by_another(share)
        kept(share, item, result)

    with team_at(tmp_path) as one:
        one.work([share], Handlers(lambda *_: "done", keep, lambda _: [], told.append))
    assert sum(told) == 2
    assert not share.directory.exists()


def test_an_item_that_is_claimed_when_its_share_was_closed(tmp_path, monkeypatch):
    """The same, for one who comes to help."""
    share = Share(tmp_path / "units" / "00000.json", 2, cost=1)
    fsio.make_dirs(share.directory.parent)
    with Crew(tmp_path) as other, team_at(tmp_path) as one:
        assert other.take(share.directory)
        take = one.crew.take

        def late(what: Path) -> bool:
            if what.parent == share.directory:
                closed_by_another(share)
            return take(what)

        monkeypatch.setattr(one.crew, "take", late)
        one.work([share], Handlers(lambda *_: pytest.fail("it was done"), kept, lambda _: [], lambda _: None))
    assert share.record.exists()


def test_a_result_that_cannot_be_written_is_an_error(tmp_path):
    """Its share has no record, so it is missed."""
    share = Share(tmp_path / "units" / "00000.json", 2, cost=1)
    fsio.make_dirs(share.directory.parent)
    with team_at(tmp_path) as one, pytest.raises(StorageError, match="does not exist or was removed"):
        one.work([share], Handlers(lambda *_: "done", kept, lambda _: [], lambda _: None))


# How far it is


def test_status(source, golden, tmp_path):
    output = tmp_path / "out"
    ended = cli("status", output)
    refused(ended, 3, "no unfinished run")
    refused(cli("status", "s3://bucket/out"), 2, "the directory s3://bucket/out: a URL")
    stopped_run(source, output, shared=True)
    found = loftq.status(output)
    assert found["matrices"] == {"done": MATRICES, "all": MATRICES}
    assert found["units"]["done"] == found["units"]["all"] > 3
    assert [w["state"] for w in found["workers"]] == ["gone"]
    assert found["seconds_left"] == 0
    slow = sharing(source, tmp_path / "slow", lambda: solved_slowly(60))
    while not list(tmp_path.glob("slow.loftq-partial/units/*.claim.0")):
        time.sleep(0.01)
    told = cli("status", tmp_path / "slow", "--json")
    printed = cli("status", tmp_path / "slow")
    slow.kill(signal.SIGKILL).ended()
    found = json.loads(told.out)
    assert found["matrices"] == {"done": 0, "all": MATRICES}
    assert [(w["pid"], w["state"]) for w in found["workers"]] == [(slow.pid, "working")]
    assert found["workers"][0]["at"][0].startswith("model-")
    assert f"0 of {MATRICES} matrices, 1 process at work" in printed.out
    run(source, output, shared=True)
    assert repr(loftq.status(output)) == "<Report: done; keys: state, units, matrices, workers, seconds_left>"


def test_status_at_the_end(source, golden, tmp_path, monkeypatch):
    """The result counts as soon as it is there: while the work for it is removed, and when it was just removed."""
    output, listed = tmp_path / "out", team.names_in

    def killed(op: str, path: Path) -> None:
        if op == "rmtree" and path == Workspace(output).root:
            os._exit(9)

    def work() -> None:
        with hooked(killed):
            run(source, output, shared=True)

    assert Child(work).ended().code == 9
    assert Workspace(output).identity.exists()
    assert loftq.status(output)["state"] == "done"
    stopped_run(source, tmp_path / "late", shared=True)

    def names_in(directory: Path) -> set[str]:
        monkeypatch.setattr(team, "names_in", listed)
        run(source, tmp_path / "late", shared=True)
        return listed(directory)

    monkeypatch.setattr(team, "names_in", names_in)
    assert loftq.status(tmp_path / "late")["state"] == "done"
    assert team.names_in is listed


def test_status_of_a_plain_run(source, golden, tmp_path):
    stopped_run(source, tmp_path / "out")
    found = loftq.status(tmp_path / "out")
    assert [w["state"] for w in found["workers"]] == ["gone"]
    assert found["workers"][0]["done"] == found["units"]["all"]
    assert "0 processes at work" in repr(found)
