"""Every error a user can meet, each with the exit code of the command line.

The layer that knows the file or tensor puts its name into the message; the message says what came, what was
wanted and what to do. The command line prints one line and exits with ``exit_code``.
"""


class LoftqError(Exception):
    """Base of every error raised on purpose. Anything else that escapes is a bug of ours (exit 70)."""

    exit_code = 70
    label = "internal"


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


def quoted(name: object, limit: int = 120) -> str:
    """``name`` as it may stand in a message: control characters escaped, cut at ``limit`` characters."""
    text = str(name)
    text = "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def listed(names: object, limit: int = 10) -> str:
    """At most ``limit`` names, then how many more."""
    items = [quoted(n) for n in names]  # type: ignore[attr-defined]
    more = len(items) - limit
    return ", ".join(items[:limit]) + (f" and {more} more" if more > 0 else "")
