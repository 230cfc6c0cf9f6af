"""Writing: whole or not at all, durable, with every primitive failing or dying in turn."""

import errno
import fcntl
import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading

import pytest
from blobs import put

from loftq.errors import ConflictError, InputError, StorageError
from loftq.formats import fsio, strict_json

OLD, NEW = b"old", b"new content"
WRITE_OPS = ["create", "write", "write", "fsync", "rename", "fsync-dir"]


@pytest.fixture
def trace(monkeypatch):
    """Every primitive as ``(op, file name)``, in order."""
    calls = []
    monkeypatch.setattr(fsio, "step", lambda op, path: calls.append((op, path.name)))
    return calls


def failing(monkeypatch, at, number, forever=False):
    """Let primitive number ``at`` fail with errno ``number``, and all later ones as well if ``forever``."""
    count = iter(range(10_000))

    def step(op, path):
        k = next(count)
        if k == at or (forever and k > at):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fsio, "step", step)


def parts():
    yield NEW[:3]
    yield memoryview(NEW[3:])


def test_write_atomic(tmp_path):
    path = put(tmp_path / "f", OLD)
    digest = fsio.write_atomic(path, parts())
    assert path.read_bytes() == NEW
    assert digest == fsio.FileDigest(len(NEW), hashlib.sha256(NEW).hexdigest())
    assert os.listdir(tmp_path) == ["f"]


def test_write_atomic_order_of_primitives(tmp_path, trace):
    fsio.write_atomic(tmp_path / "f", parts())
    assert [op for op, _ in trace] == WRITE_OPS
    temporary = trace[0][1]
    assert re.fullmatch(r"\.f\.[0-9a-f]{16}\.tmp", temporary)
    assert [name for _, name in trace] == [temporary] * 4 + ["f", tmp_path.name]


def test_done_follows_each_step(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(fsio, "step", lambda op, path: calls.append(("step", op, path)))
    monkeypatch.setattr(fsio, "done", lambda op, path: calls.append(("done", op, path)))
    fsio.write_atomic(tmp_path / "f", parts())
    assert [("done", *call[1:]) for call in calls[::2]] == calls[1::2]


@pytest.mark.parametrize("content", [[], [b""], [b"", b"a", b""], [bytearray(b"ab")], [memoryview(b"abcd").cast("H")]])
def test_write_atomic_of_odd_chunks(tmp_path, content):
    wanted = b"".join(bytes(c) for c in content)
    assert fsio.write_atomic(tmp_path / "f", content).size == len(wanted)
    assert (tmp_path / "f").read_bytes() == wanted


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(fsio.os, "write", lambda fd, view: real(fd, view[:2]))
    fsio.write_atomic(tmp_path / "f", [NEW])
    assert (tmp_path / "f").read_bytes() == NEW


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_mode_follows_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        fsio.write_atomic(tmp_path / "f", [NEW])
        fsio.make_dirs(tmp_path / "d")
    finally:
        os.umask(before)
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o666 & ~mask
    assert (tmp_path / "d").stat().st_mode & 0o777 == 0o777 & ~mask


@pytest.mark.parametrize("forever", [False, True], ids=["once", "for-ever"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("at", range(len(WRITE_OPS)))
def test_fault_at_each_primitive(tmp_path, monkeypatch, at, number, forever):
    path = put(tmp_path / "f", OLD)
    failing(monkeypatch, at, number, forever)
    with pytest.raises(StorageError) as caught:
        fsio.write_atomic(path, parts())
    message = str(caught.value)
    cure = {
        errno.EACCES: "not writable (Permission denied); choose another output",
        errno.EIO: "failed (Input/output error); check the disk, then run the same command again to continue",
    }.get(number, "; free some space and run the same command again to continue")
    assert cure in message
    assert message.startswith(str(path) if at < 5 else str(tmp_path))
    assert "\n" not in message
    renamed = WRITE_OPS[at] == "fsync-dir"
    assert path.read_bytes() == (NEW if renamed else OLD)
    monkeypatch.setattr(fsio, "step", lambda op, path: None)
    if not forever or renamed or at == 0:
        assert os.listdir(tmp_path) == ["f"], "a temporary stayed"


def test_a_failed_fsync_is_not_retried(tmp_path, monkeypatch):
    calls = []

    def fail(fd):
        calls.append(fd)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fsio.os, "fsync", fail)
    with pytest.raises(StorageError, match=r"f: fsync failed"):
        fsio.write_atomic(tmp_path / "f", [NEW])
    assert len(calls) == 1
    assert os.listdir(tmp_path) == []


def test_file_then_directory_are_really_synced(tmp_path, monkeypatch):
    synced, real = [], os.fsync

    def fsync(fd):
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        real(fd)

    monkeypatch.setattr(fsio.os, "fsync", fsync)
    fsio.write_atomic(tmp_path / "f", [NEW])
    assert [name.endswith(".tmp") for name in synced] == [True, False]
    assert synced[1] == str(tmp_path)


def test_directories_that_cannot_be_synced_are_let_pass(tmp_path, monkeypatch):
    real, refused = os.fsync, []

    def fsync(fd):
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            refused.append(os.readlink(f"/proc/self/fd/{fd}"))
            raise OSError(errno.EINVAL, "Invalid argument")
        real(fd)

    monkeypatch.setattr(fsio.os, "fsync", fsync)
    digest = fsio.write_atomic(tmp_path / "f", [NEW])
    assert refused == [str(tmp_path)]
    assert (tmp_path / "f").read_bytes() == NEW
    assert digest == fsio.FileDigest(len(NEW), hashlib.sha256(NEW).hexdigest())


def test_a_failed_directory_sync_is_told(tmp_path, monkeypatch):
    real = os.fsync

    def fsync(fd):
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(errno.EIO, "Input/output error")
        real(fd)

    monkeypatch.setattr(fsio.os, "fsync", fsync)
    with pytest.raises(StorageError, match=r"fsync-dir failed .Input/output error."):
        fsio.write_atomic(tmp_path / "f", [NEW])


@pytest.mark.parametrize("error", [InputError("x: source changed while reading"), KeyError("k"), KeyboardInterrupt()])
def test_an_error_of_the_chunks_passes_unchanged(tmp_path, error):
    def chunks():
        yield NEW
        raise error

    path = put(tmp_path / "f", OLD)
    with pytest.raises(type(error)) as caught:
        fsio.write_atomic(path, chunks())
    assert caught.value is error
    assert path.read_bytes() == OLD
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("when", ["step", "done"])
@pytest.mark.parametrize("at", range(len(WRITE_OPS)))
def test_killed_at_each_primitive(tmp_path, monkeypatch, at, when):
    path = put(tmp_path / "f", OLD)
    pid = os.fork()
    if pid == 0:
        count = iter(range(100))
        monkeypatch.setattr(fsio, when, lambda op, p: next(count) == at and os.kill(os.getpid(), signal.SIGKILL))
        try:
            fsio.write_atomic(path, parts())
        finally:
            os._exit(0)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    renamed = at > 4 or (at == 4 and when == "done")
    assert path.read_bytes() == (NEW if renamed else OLD)
    leftovers = [name for name in os.listdir(tmp_path) if name != "f"]
    assert all(re.fullmatch(r"\.f\.[0-9a-f]{16}\.tmp", name) for name in leftovers)
    fsio.write_atomic(path, parts())
    assert path.read_bytes() == NEW


class PowerCut(BaseException):
    """Stops the writer, and every primitive after it, where the power went."""


@pytest.mark.parametrize("at", range(len(WRITE_OPS) + 1))
def test_power_cut_never_shows_unsynced_bytes(tmp_path, monkeypatch, at):
    """Model: a rename is on disk at once, contents only after fsync. The name then never shows a torn file."""
    synced, count = {}, iter(range(100))

    def step(op, path):
        if next(count) >= at:
            raise PowerCut

    def done(op, path):
        if op == "fsync":
            synced["content"] = path.read_bytes()
        if op == "rename":
            synced["visible"] = synced.get("content")

    monkeypatch.setattr(fsio, "step", step)
    monkeypatch.setattr(fsio, "done", done)
    if at < len(WRITE_OPS):
        with pytest.raises(PowerCut):
            fsio.write_atomic(tmp_path / "f", parts())
    else:
        fsio.write_atomic(tmp_path / "f", parts())
    assert synced.get("visible", NEW) == NEW


def test_missing_parent(tmp_path):
    with pytest.raises(StorageError, match=r"d/f: create failed .*; its directory does not exist"):
        fsio.write_atomic(tmp_path / "d" / "f", [NEW])


def test_a_planted_temporary_is_neither_followed_nor_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(fsio.secrets, "token_hex", lambda n: "guessed")
    put(tmp_path / "victim", OLD)
    (tmp_path / ".f.guessed.tmp").symlink_to("victim")
    with pytest.raises(StorageError, match=r"f: create failed .File exists."):
        fsio.write_atomic(tmp_path / "f", [NEW])
    assert (tmp_path / "victim").read_bytes() == OLD
    assert (tmp_path / ".f.guessed.tmp").is_symlink()


def test_name_too_long(tmp_path):
    with pytest.raises(StorageError, match=r"choose a shorter output"):
        fsio.write_atomic(tmp_path / ("x" * 250), [NEW])


def test_over_a_directory(tmp_path):
    (tmp_path / "d").mkdir()
    with pytest.raises(StorageError, match=r"d: rename failed .*; move it away"):
        fsio.write_atomic(tmp_path / "d", [NEW])
    assert os.listdir(tmp_path) == ["d"]


@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: path.symlink_to("/dev/null"), lambda path: path.symlink_to("other")]
)
def test_what_is_no_file_is_not_replaced(tmp_path, make):
    """Root could put a file in the place of a device."""
    make(tmp_path / "f")
    before = os.lstat(tmp_path / "f")
    with pytest.raises(StorageError, match=r"f: a (link|device, pipe or socket), which is not replaced by a file"):
        fsio.write_atomic(tmp_path / "f", [NEW])
    assert os.lstat(tmp_path / "f") == before
    assert os.listdir(tmp_path) == ["f"]


def test_descriptors_are_closed_after_faults(tmp_path, monkeypatch):
    before = len(os.listdir("/proc/self/fd"))
    for at in range(len(WRITE_OPS)):
        failing(monkeypatch, at, errno.EIO)
        with pytest.raises(StorageError):
            fsio.write_atomic(tmp_path / "f", parts())
    assert len(os.listdir("/proc/self/fd")) == before


def test_write_json(tmp_path):
    digest = fsio.write_json(tmp_path / "a.json", {"b": 1, "a": [2]})
    assert (tmp_path / "a.json").read_bytes() == strict_json.dumps({"a": [2], "b": 1})
    assert digest == fsio.sha256_file(tmp_path / "a.json")


def test_copy_file(tmp_path):
    content = os.urandom(5 << 20)
    digest = fsio.copy_file(put(tmp_path / "src", content), tmp_path / "dst")
    assert (tmp_path / "dst").read_bytes() == content
    assert digest.sha256 == hashlib.sha256(content).hexdigest()
    assert fsio.sha256_file(tmp_path / "dst") == digest


@pytest.mark.parametrize("use", [lambda p: fsio.copy_file(p, p.with_name("dst")), fsio.sha256_file])
def test_only_regular_files_are_read(tmp_path, use):
    os.mkfifo(tmp_path / "src")
    with pytest.raises(InputError, match=r"src: not a regular file"):
        use(tmp_path / "src")
    assert os.listdir(tmp_path) == ["src"]


def test_copy_notices_a_changing_source(tmp_path, monkeypatch):
    source = put(tmp_path / "src", NEW)
    monkeypatch.setattr(fsio, "step", lambda op, path: op == "write" and source.write_bytes(NEW + b"!"))
    with pytest.raises(InputError, match=r"src: source changed while reading"):
        fsio.copy_file(source, tmp_path / "dst")
    assert os.listdir(tmp_path) == ["src"]


def test_make_dirs(tmp_path, trace):
    fsio.make_dirs(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    assert trace == [("mkdir", "a"), ("fsync-dir", tmp_path.name), ("mkdir", "b"), ("fsync-dir", "a")]
    fsio.make_dirs(tmp_path / "a" / "b")
    assert len(trace) == 4, "an existing directory is left alone"


def test_make_dirs_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fsio.make_dirs(type(tmp_path)("a/b"))
    assert (tmp_path / "a" / "b").is_dir()


def test_make_dirs_in_a_removed_working_directory(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(StorageError, match=r"mkdir failed"):
        fsio.make_dirs(type(tmp_path)("a"))


def test_make_dirs_over_a_file(tmp_path):
    put(tmp_path / "f", OLD)
    with pytest.raises(StorageError, match=r"f: mkdir failed .*; move it away"):
        fsio.make_dirs(tmp_path / "f" / "d")


def test_make_dirs_lost_race(tmp_path, monkeypatch):
    """Another process makes the directory just before we do."""
    calls = []

    def step(op, path):
        calls.append(op)
        if op == "mkdir":
            os.mkdir(path)

    monkeypatch.setattr(fsio, "step", step)
    fsio.make_dirs(tmp_path / "a")
    assert (tmp_path / "a").is_dir()
    assert calls == ["mkdir", "fsync-dir"]


def test_rename_syncs_both_directories(tmp_path, trace):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    put(tmp_path / "a" / "f", NEW)
    fsio.rename(tmp_path / "a" / "f", tmp_path / "b" / "g")
    assert (tmp_path / "b" / "g").read_bytes() == NEW
    assert trace == [("rename", "g"), ("fsync-dir", "b"), ("fsync-dir", "a")]


def test_rename_across_file_systems(tmp_path, monkeypatch):
    failing(monkeypatch, 0, errno.EXDEV)
    with pytest.raises(StorageError, match=r"g: rename failed .*; both must be on one file system"):
        fsio.rename(put(tmp_path / "f", NEW), tmp_path / "g")


def test_remove(tmp_path, trace):
    fsio.remove(put(tmp_path / "f", OLD))
    fsio.remove(tmp_path / "f")
    assert os.listdir(tmp_path) == []
    assert trace[:2] == [("unlink", "f"), ("fsync-dir", tmp_path.name)]


def test_remove_tree_does_not_follow_links(tmp_path, trace):
    (tmp_path / "d" / "e").mkdir(parents=True)
    put(tmp_path / "kept", OLD)
    (tmp_path / "d" / "link").symlink_to(tmp_path / "kept")
    fsio.remove_tree(tmp_path / "d")
    fsio.remove_tree(tmp_path / "d")
    assert os.listdir(tmp_path) == ["kept"]
    assert trace == [("rmtree", "d"), ("fsync-dir", tmp_path.name)]


def test_remove_tree_of_a_link_is_refused(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "link").symlink_to("d")
    with pytest.raises(StorageError, match=r"link: rmtree failed"):
        fsio.remove_tree(tmp_path / "link")


HOLDER = """
import sys, pathlib
from loftq.formats import fsio
with fsio.DirectoryLock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds ``tmp_path/lock``."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_lock_held_by_another_process(tmp_path, holder):
    wanted = f"lock: in use by process {holder.pid} on {re.escape(socket.gethostname())}; wait for it"
    with pytest.raises(ConflictError, match=wanted), fsio.DirectoryLock(tmp_path / "lock"):
        pass
    holder.kill()
    holder.wait()
    with fsio.DirectoryLock(tmp_path / "lock"):
        pass


def test_a_lock_can_be_waited_for(tmp_path, holder):
    threading.Timer(0.3, holder.kill).start()
    with fsio.DirectoryLock(tmp_path / "lock", wait=True):
        assert holder.wait(5) == -signal.SIGKILL
    assert os.listdir(tmp_path) == []


def test_lock_leaves_nothing_and_can_be_taken_again(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    lock = fsio.DirectoryLock(tmp_path / "lock")
    for _ in range(2):
        with lock:
            assert os.listdir(tmp_path) == ["lock"]
            with pytest.raises(ConflictError, match=f"process {os.getpid()} on"), fsio.DirectoryLock(lock.path):
                pass
        assert os.listdir(tmp_path) == []
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("signed", [b"", b"{", b"[]", b'{"pid": "x", "host": 1}', b"\xff", b"[" * 4000])
def test_lock_with_unreadable_signature(tmp_path, signed):
    with open(put(tmp_path / "lock", signed), "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ConflictError, match=r"in use by another process"), fsio.DirectoryLock(tmp_path / "lock"):
            pass


def test_lock_file_left_by_a_killed_process_does_not_count(tmp_path):
    put(tmp_path / "lock", b'{"pid": 1, "host": "elsewhere"}')
    with fsio.DirectoryLock(tmp_path / "lock"):
        assert str(os.getpid()).encode() in (tmp_path / "lock").read_bytes()


def test_lock_removed_between_open_and_flock_is_taken_anew(tmp_path, monkeypatch):
    real, calls = fcntl.flock, []

    def flock(fd, how):
        if not calls:
            os.unlink(tmp_path / "lock")
        calls.append(fd)
        real(fd, how)

    monkeypatch.setattr(fsio.fcntl, "flock", flock)
    with fsio.DirectoryLock(tmp_path / "lock"):
        assert len(calls) == 2
        assert (tmp_path / "lock").exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_systems_without_locks(tmp_path, monkeypatch, caplog, number):
    def flock(fd, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fsio.fcntl, "flock", flock)
    with fsio.DirectoryLock(tmp_path / "lock"):
        assert "this file system has no locks" in caplog.text


def test_lock_fault_of_the_kernel(tmp_path, monkeypatch):
    def flock(fd, how):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fsio.fcntl, "flock", flock)
    with pytest.raises(StorageError, match=r"lock: lock failed"), fsio.DirectoryLock(tmp_path / "lock"):
        pass


def test_lock_directory_removed_while_held(tmp_path):
    (tmp_path / "work").mkdir()
    with fsio.DirectoryLock(tmp_path / "work" / "lock"):
        fsio.remove_tree(tmp_path / "work")
    assert os.listdir(tmp_path) == []


def test_lock_over_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "lock")
    with pytest.raises(StorageError, match=r"lock: not a regular file"), fsio.DirectoryLock(tmp_path / "lock"):
        pass


def test_lock_faults_are_storage_errors(tmp_path, monkeypatch):
    for at in range(2):
        failing(monkeypatch, at, errno.ENOSPC)
        with pytest.raises(StorageError, match=r"lock: no space left"), fsio.DirectoryLock(tmp_path / "lock"):
            pass
