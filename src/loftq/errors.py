"""Every error a user can meet, each with the exit code of the command line.

The layer that knows the file or tensor puts its name into the message; the message says what came, what was
wanted and what to do. The command line prints one line and exits with ``exit_code``.
"""

import itertools
import re
from collections.abc import Iterable

# What Python counts as printable and no screen shows: of Unicode's Default_Ignorable_Code_Point; the Braille blank.
_UNSEEN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)


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


def visible(text: str) -> str:
    """``text`` with every character escaped that cannot be seen, or that moves others (bidi), but for line ends."""
    if text.isprintable() and not _UNSEEN.search(text):
        return text
    return "".join(c if c == "\n" or (c.isprintable() and not _UNSEEN.match(c)) else _escaped(c) for c in text)


def quoted(name: object, limit: int = 120) -> str:
    """``name`` as it may stand in a message: on one line, :func:`visible`, cut at ``limit`` characters."""
    text = str(name)
    cut = text if len(text) <= limit else text[:limit]  # nothing gets shorter: what is longer is not looked at
    shown = visible(cut).replace("\n", "\\n")
    return shown if len(shown) <= limit and cut is text else shown[: limit - 1] + "…"


def listed(names: Iterable[object], limit: int = 10) -> str:
    """At most ``limit`` names, then how many more."""
    rest = iter(names)
    shown = ", ".join(quoted(name) for name in itertools.islice(rest, limit))
    more = sum(1 for _ in rest)
    return shown + (f" and {more} more" if more else "")


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "replace").decode()
