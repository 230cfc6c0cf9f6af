"""Runs of ``loftq`` in forked children: real processes with real exit codes, without the seconds of importing."""

import contextlib
import ctypes
import dataclasses
import faulthandler
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft  # noqa: F401  # here and below: imported once, before the first fork
import torch
import tqdm.auto
import transformers
import typer

import loftq.cli
import loftq.report.tables
import loftq.solver
import models
from loftq.architecture import conversion, presence, skeleton
from loftq.checkpoint.quantize import QuantizeOptions, quantize
from loftq.formats import fsio
from loftq.planning import Policy
from loftq.spec import QuantSpec, SolveSpec

torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
tqdm.tqdm.set_lock(threading.RLock())  # its own is one for all forks: who is killed with it keeps it from all others
for bits in (2, 3, 4):  # loads the compiled kernels
    loftq.solver.solve(torch.eye(8), QuantSpec(bits=bits), 2, SolveSpec(steps=2))
with contextlib.suppress(typer.Exit):  # typer imports half of itself when it parses
    typer.main.get_command(loftq.cli.app).make_context("loftq", ["plan", "--bits", "2"], resilient_parsing=True)
HANGS = signal.SIGUSR1  # makes a child write the stacks of its threads
SHARD = 6_000  # bytes: the tiny models then have several shards
EXACT = {"dtype": "source", "adapter_dtype": "float32"}  # nothing is rounded but the weights that are quantized
POLICY = Policy(bits="2", rank="4", solve=SolveSpec(steps=2), **EXACT)
OPTIONS = QuantizeOptions(policy=POLICY, workers=1, max_shard_bytes=SHARD)
FLAGS = (
    "--dtype",
    "source",
    "--adapter-dtype",
    "float32",
    "--bits",
    "2",
    "--rank",
    "4",
    "--steps",
    "2",
    "--preset",
    "loftq",
    "--max-shard-size",
    "6KB",
    "--workers",
    "1",
)  # the same


@dataclasses.dataclass
class Ended:
    """How a child ended: exit code (negative: the signal that killed it), what it wrote, and the time that it took."""

    code: int
    out: str
    err: str
    seconds: float
    cpu_seconds: float


class Child:
    """A forked child running ``work``; it ends with the code that ``work`` returns."""

    def __init__(self, work: Callable[[], Any], stdout: str | None = None) -> None:
        self._streams = [os.memfd_create(name) for name in ("out", "err")]
        self._began = time.monotonic()
        sys.stdout.flush()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads: ours are idle
            self.pid = os.fork()
        if self.pid:
            return
        try:
            os.dup2(self._streams[0] if stdout is None else os.open(stdout, os.O_WRONLY), 1)
            os.dup2(self._streams[1], 2)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", 1, closefd=False) for n in (1, 2))
            faulthandler.register(HANGS, all_threads=True)
            torch.set_num_threads(1)  # makes PyTorch's pool anew: two threads that are first at once would find none
            code = work()
            sys.stdout.flush()
            os._exit(code or 0)
        except BaseException:
            import traceback

            traceback.print_exc(file=sys.stderr)
            sys.stderr.flush()
            os._exit(99)

    def kill(self, number: int) -> "Child":
        os.kill(self.pid, number)
        return self

    def has_ended(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def ended(self, within: float = 240) -> Ended:
        """Wait for the end; a child that hangs is killed and reported, with what its threads were doing.

        The limit is for a child that never ends: on a loaded machine one that works takes many times its CPU time.
        """
        status = None
        while status is None and time.monotonic() - self._began < within:
            time.sleep(0.001)
            pid, found, used = os.wait4(self.pid, os.WNOHANG)
            status = found if pid else None
        seconds = time.monotonic() - self._began
        if status is None:
            self.kill(HANGS)
            time.sleep(1)
            self.kill(signal.SIGKILL)
            os.waitpid(self.pid, 0)
        out, err = map(_drained, self._streams)
        assert status is not None, f"still running after {within} s: {err}"
        return Ended(os.waitstatus_to_exitcode(status), out, err, seconds, used.ru_utime + used.ru_stime)


def _drained(stream: int) -> str:
    with open(stream, encoding="utf-8", errors="replace") as file:
        file.seek(0)
        return file.read()


def start_cli(*arguments: object, setup: Callable[[], Any] = lambda: None, stdout: str | None = None) -> Child:
    """``loftq ARGUMENTS…`` in a child, after ``setup`` (environment, limits, user)."""

    def work() -> None:
        warnings.resetwarnings()  # pytest's filter makes errors of them; a user sees them
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)  # the suite itself may run where they are ignored, as under nohup
        setup()
        sys.argv = ["loftq", *map(str, arguments)]
        loftq.cli.main()

    return Child(work, stdout)


def cli(*arguments: object, setup: Callable[[], Any] = lambda: None, stdout: str | None = None) -> Ended:
    """``loftq ARGUMENTS…`` to its end."""
    return start_cli(*arguments, setup=setup, stdout=stdout).ended()


def unprivileged() -> None:
    """Let permissions hold for root too, in this process: give up all capabilities."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if libc.capset(header, nothing):
        raise OSError(ctypes.get_errno(), "capset")


def refused(ended: Ended, code: int, *words: str) -> str:
    """The one error line of a run that had to fail with ``code``; it holds every one of ``words``."""
    lines = [line for line in ended.err.split("\n") if line and not line.startswith(("LoftQ:", "loftq: WARNING"))]
    assert ended.code == code, ended
    assert lines, ended
    assert len(lines) == 1, ended.err
    assert lines[0].startswith("loftq: error["), ended.err
    assert "Traceback" not in ended.err
    for word in words:
        assert word in lines[0], (word, lines[0])
    return lines[0]


def tree(directory: Path) -> dict[str, bytes]:
    """Every file under ``directory`` with its bytes; empty directories count too."""
    found = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_symlink():
            found[name] = b"-> " + os.readlink(path).encode()
        elif path.is_dir():
            if not any(path.iterdir()):
                found[name + "/"] = b""
        else:
            found[name] = path.read_bytes()
    return found


def put_tree(directory: Path, content: dict[str, bytes]) -> None:
    """The inverse of :func:`tree`, for a directory without links that may exist."""
    for name, raw in content.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if name.endswith("/") else path.write_bytes(raw)


def tiny_source(directory: Path) -> Path:
    """A tiny BERT of 12 matrices, with the small files that a checkpoint comes with."""
    torch.manual_seed(0)
    sizes = {**models.BERT, "vocab_size": 16, "max_position_embeddings": 8}
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(directory)
    (directory / "vocab.txt").write_text("[PAD]\nword\n")
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text("{}")
    return directory


@contextlib.contextmanager
def hooked(step: Callable[[str, Path], None], done: Callable[[str, Path], None] | None = None) -> Iterator[None]:
    """Let ``step`` be called before each change of the file system, and ``done`` after it."""
    before = fsio.step, fsio.done
    fsio.step, fsio.done = step, done or before[1]
    try:
        yield
    finally:
        fsio.step, fsio.done = before


@contextlib.contextmanager
def one_skeleton() -> Iterator[None]:
    """Build the skeleton of a source, and compare headers with it, only once: that takes most of a tiny run."""
    build, check, assign = skeleton.build, presence.check_weights, conversion.converted_roles
    built: dict[Path, Any] = {}
    good: list[tuple[Any, ...]] = []
    assigned: list[tuple[Any, ...]] = []

    def built_once(directory: Path, *rest: Any, **options: Any) -> Any:
        if directory not in built:
            built[directory] = build(directory, *rest, **options)
        return built[directory]

    def checked_once(*given: Any) -> None:
        if given not in good:
            check(*given)
            good.append(given)

    def assigned_once(model: Any, tensors: Any) -> Any:
        found = next((roles for of, before, roles in assigned if of is model and before == tensors), None)
        if found is None:
            found = assign(model, tensors)
            assigned.append((model, tensors, found))
        return found

    skeleton.build, presence.check_weights, conversion.converted_roles = built_once, checked_once, assigned_once
    try:
        yield
    finally:
        skeleton.build, presence.check_weights, conversion.converted_roles = build, check, assign


def run(source: Path, output: Path, begin: Any = None, **changes: Any) -> dict[str, Any]:
    """``quantize`` with the options that most tests use."""
    return quantize(str(source), output, dataclasses.replace(OPTIONS, **changes), begin)
