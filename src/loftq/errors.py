"""Every error a user can meet, each with the exit code of the command line.

The layer that knows the file or tensor puts its name into the message; the message says what came, what was
wanted and what to do. The command line prints one line and exits with ``exit_code``.

Messages speak the caller's language: :func:`option` and :func:`command` name things in Python's words, or, where it is
the command line that runs, in its own.
"""

import contextlib
import difflib
import functools
import inspect
import itertools
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePath
from typing import Any, TypeVar

from loftq.values import plain

# What Python counts as printable and no screen shows: of Unicode's Default_Ignorable_Code_Point; the Braille blank.
_UNSEEN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
# How torch says that memory is wanting: on CUDA and MPS; on a CPU of Linux; of Windows; in a library of CUDA's.
_NO_MEMORY = re.compile(
    r"out of memory|can(?:'t|not) allocate memory|not enough memory|_STATUS_ALLOC_FAILED", re.IGNORECASE
)
_LIBRARIES = ("loftq", "peft", "transformers", "trl")


class LoftqError(Exception):
    """Base of every error raised on purpose. Anything else that escapes is a bug of ours (exit 70).

    Whatever names are in its message, they are shown as they are: see :func:`visible`.
    """

    exit_code = 70
    label = "internal"

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(visible(a) if isinstance(a, str) else a for a in arguments))


class UsageError(LoftqError, ValueError):
    """An option, pattern or spec that cannot be meant (exit 2)."""

    exit_code = 2
    label = "usage"


class InputError(LoftqError, ValueError):
    """A file, header, index or configuration that must not be trusted or cannot be read (exit 3)."""

    exit_code = 3
    label = "input"


class StorageError(LoftqError, OSError):
    """The environment failed us: disk, permission, memory (exit 4)."""

    exit_code = 4
    label = "storage"


class ConflictError(LoftqError):
    """The output belongs to something else: another run, other options, another process (exit 5)."""

    exit_code = 5
    label = "conflict"


class NumericalError(LoftqError, ArithmeticError):
    """Values that are not finite, or a result that breaks a promise of the method (exit 6)."""

    exit_code = 6
    label = "numerical"


class Interrupted(LoftqError):
    """Stopped by a signal; the same command continues (exit 75)."""

    exit_code = 75
    label = "stopped"


_on_command_line = False


def speak_as_command_line() -> None:
    """From now on, messages of this process name options as they are typed in a shell."""
    global _on_command_line
    _on_command_line = True


def option(name: str, value: object = None) -> str:
    """An option as the caller writes it: ``rank_policy='clamp'``, on the command line ``--rank-policy clamp``."""
    if _on_command_line:
        return f"--{name.replace('_', '-')}" + ("" if value is None or value is True else f" {value}")
    return name if value is None else f"{name}={_python(value)}"


def command(verb: str, *arguments: str, **options: object) -> str:
    """A call as the caller writes it: ``loftq.calibrate(kind='full')``, or ``loftq calibrate --kind full``."""
    named = [option(name, value) for name, value in options.items()]
    if _on_command_line:
        return f"`{' '.join(['loftq', verb, *arguments, *named])}`"
    return f"`loftq.{verb}({', '.join([*arguments, *named])})`"


def _python(value: object) -> str:
    """A value as Python has it; a word in capitals stands for what the caller has to put there."""
    return value if isinstance(value, str) and value.isalpha() and value.isupper() else repr(value)


def check_names(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """UsageError, with the nearest of ``known``, for the first given name that is none of them."""
    known = list(known)
    for name in given:
        if name not in known:
            raise UsageError(f"{what} has no option {quoted(repr(name))}{nearest(name, known)}")


def nearest(name: str, known: Iterable[str], show: Callable[[str], str] = repr) -> str:
    """The end of a message about a name that is none of ``known``: which one may be meant, or what there is.

    Args:
        show: a name as the caller writes it; in Python in quotes.
    """
    known = list(known)
    return meant(name, known, show) or f"; it has {listed(known, 20)}"


def meant(name: object, known: Iterable[object], show: Callable[[str], str] = str) -> str:
    """The end of a message that names all of ``known`` already: which one may be meant, if one is near."""
    near = difflib.get_close_matches(str(name), list(map(str, known)), n=1)
    return f"; did you mean {show(near[0])}?" if near else ""


F = TypeVar("F", bound=Callable[..., Any])
C = TypeVar("C", bound=type)


def checks_names(function: F) -> F:
    """Decorate a function of named options: another name is a UsageError that says which one may be meant.

    Numbers of numpy, and dtypes and devices of torch, come to the function as :func:`plain` values.
    """
    names = [name for name in inspect.signature(function).parameters if name != "self"]
    what = function.__qualname__.removesuffix(".__init__")

    @functools.wraps(function)
    def checked(*args: Any, **options: Any) -> Any:
        check_names(what, options, names)
        return function(*map(plain, args), **{name: plain(value) for name, value in options.items()})

    return checked  # type: ignore[return-value]


def checked_fields(cls: C) -> C:
    """:func:`checks_names` for a dataclass, of the names of its fields."""
    cls.__init__ = checks_names(cls.__init__)
    return cls


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Around imports of packages that come with an extra: UsageError that names it if they are missing."""
    try:
        yield
    except ModuleNotFoundError as e:
        if (e.name or "").partition(".")[0] == "loftq":
            raise
        raise UsageError(f"this verb needs {e.name}, which is not installed: pip install 'loftq[{name}]'") from e


def visible(text: str) -> str:
    """``text`` with every character escaped that cannot be seen, or that moves others (bidi), but for line ends."""
    if text.isprintable() and not _UNSEEN.search(text):
        return text
    return "".join(c if c == "\n" or (c.isprintable() and not _UNSEEN.match(c)) else _escaped(c) for c in text)


def quoted(name: object, limit: int | None = None) -> str:
    """``name`` as it may stand in a message: on one line, :func:`visible`, cut at ``limit`` characters.

    Without a limit a name has 120 of them, and a path 400: its end tells which file is meant.
    """
    text = str(name)
    limit = limit or (400 if isinstance(name, PurePath) else 120)
    cut = text if len(text) <= limit else text[:limit]  # nothing gets shorter: what is longer is not looked at
    shown = visible(cut).replace("\n", "\\n")
    return shown if len(shown) <= limit and cut is text else shown[: limit - 1] + "…"


def first_line(error: BaseException) -> str:
    """The first line of what another library says, as it may stand in a message."""
    return quoted(str(error).strip().partition("\n")[0] or type(error).__name__, 200)


def one_line(error: BaseException) -> str:
    """All that another library says, fit for a message; of a missing key, it says nothing but the key."""
    if isinstance(error, KeyError):
        return f"there is no {quoted(error, 400)}"
    return quoted(" ".join(str(error).split()) or type(error).__name__, 800)


def listed(names: Iterable[object], limit: int = 10, width: int | None = None) -> str:
    """At most ``limit`` names, each as :func:`quoted` in ``width`` characters, then how many more."""
    rest = iter(names)
    shown = ", ".join(quoted(name, width) for name in itertools.islice(rest, limit))
    more = sum(1 for _ in rest)
    return shown + (f" and {more} more" if more else "")


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "replace").decode()


def warn(message: str) -> None:
    """A UserWarning at the line that called this package, through whichever library of its models it came."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def is_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is not enough memory, of the CPU or of a device."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error))))


@contextlib.contextmanager
def in_memory(told: str) -> Iterator[None]:
    """StorageError for want of memory: ``told`` says for what, and what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as e:
        if not is_of_memory(e):
            raise
        raise StorageError(f"not enough memory {told}") from e


@contextlib.contextmanager
def naming(name: str, shape: tuple[int, ...], fewer: str = "") -> Iterator[None]:
    """Around work on one matrix: its name before the message of an error. StorageError for want of memory.

    Args:
        fewer: the option that sets how many matrices are worked on at a time.
    """
    cure = f"use fewer {fewer}" if fewer else "free some, or use a larger machine"
    try:
        with in_memory(f"for a matrix of shape {tuple(shape)}; {cure}"):
            yield
    except LoftqError as e:
        raise type(e)(f"{quoted(name)}: {e}") from e
