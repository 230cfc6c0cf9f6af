"""The command as a process: signals, one line for every error, exit codes."""

import contextlib
import io
import logging
import os
import signal
import sys
from typing import Any, NoReturn

import typer

from loftq.cli.app import app
from loftq.errors import (
    Interrupted,
    LoftqError,
    StorageError,
    UsageError,
    is_of_memory,
    nearest,
    quoted,
    speak_as_command_line,
)


class _Quoting(logging.Formatter):
    """One line for every record, whatever names are in it."""

    def format(self, record: logging.LogRecord) -> str:
        return quoted(super().format(record), 4000)


def _stop(number: int, _: object) -> NoReturn:
    """End at once, with nothing cleaned up: whatever a killed run leaves, the same command continues from it."""
    with contextlib.suppress(OSError):
        os.write(2, b"\n")  # below the progress bar
    _say("stopped by a signal; run the same command again to continue", Interrupted.label)
    os._exit(Interrupted.exit_code)


def main() -> NoReturn:
    """Run the command line: for every error one line on stderr and an exit code; a traceback if LOFTQ_DEBUG is set."""
    speak_as_command_line()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may have no sign for what is in a name
    handler = logging.StreamHandler()
    handler.setFormatter(_Quoting("loftq: %(levelname)s: %(message)s"))
    logging.getLogger("loftq").addHandler(handler)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it; its advice would cut the bar in two
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, _stop)
    code = _run()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError as e:
        code = code or _failed(e)
    os._exit(code)  # a matrix that is still being solved after a failure is not waited for


def _run() -> int:
    """The exit code of the command in ``sys.argv``."""
    try:
        app(standalone_mode=False)
        return 0
    except typer.Exit as e:
        return e.exit_code
    except SystemExit:  # how rich and typer say that nobody reads their output
        return _failed(BrokenPipeError())
    except Exception as e:
        return _failed(e)


def _failed(e: Exception) -> int:
    """Say what went wrong; the exit code for it."""
    if os.environ.get("LOFTQ_DEBUG"):
        import traceback

        traceback.print_exception(e)
    if isinstance(e, LoftqError):
        kind, text = type(e), str(e)
    elif isinstance(e, BrokenPipeError):
        kind, text = Interrupted, "nobody reads the output any more; run the same command again to continue"
    elif isinstance(e, OSError):
        kind, text = StorageError, str(e)
    elif is_of_memory(e):
        kind, text = StorageError, "not enough memory; use fewer --workers, a smaller batch, or a larger machine"
    elif type(e).__module__.partition(".")[0] in ("click", "typer"):
        kind, text = UsageError, usage(e)
    else:
        kind, text = LoftqError, f"{type(e).__name__}: {e}; this is a bug of loftq, please report it"
    _say(text, kind.label)
    return kind.exit_code


def usage(e: Any) -> str:
    """What the parser of the command line has against it; of an unknown option, which one may be meant."""
    if getattr(e, "option_name", None) and getattr(e, "ctx", None) and hasattr(e, "possibilities"):
        known = [flag for parameter in e.ctx.command.params for flag in parameter.opts if flag.startswith("--")]
        return f"No such option: {e.option_name}{nearest(e.option_name, known, str)}"
    return getattr(e, "format_message", e.__str__)() or "no command given"


def _say(text: object, label: str) -> None:
    """One line on stderr, past Python's buffers: a signal may come while they are in use, or the reader be gone."""
    line = quoted(" ".join(str(text).split()), 4000)
    with contextlib.suppress(OSError):
        os.write(2, f"loftq: error[{label}]: {line}\n".encode("utf-8", "replace"))
