"""Matplotlib, imported only when a picture is wanted."""

import io
import os
from pathlib import Path
from typing import Any

from loftq.errors import StorageError, UsageError
from loftq.formats import fsio
from loftq.formats.regular import local_path


def pyplot() -> Any:
    """Matplotlib's pyplot, drawing to files. Raises: UsageError if it is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError as e:
        raise UsageError("a plot needs matplotlib: pip install 'loftq[plot]'") from e
    return plt


def check_place(file: Path) -> None:
    """Refuse, before long work, a picture that could not be saved. Raises: UsageError, StorageError."""
    local_path("--plot", file)
    pyplot()
    from matplotlib.backend_bases import FigureCanvasBase

    ending = file.suffix[1:] or "png"
    if ending not in FigureCanvasBase.get_supported_filetypes():
        raise UsageError(f"--plot {file}: {ending!r} is no image format; use .png, .pdf or .svg")
    if not file.parent.is_dir():
        raise StorageError(f"--plot {file}: its directory does not exist; create it and run again")
    if os.path.lexists(file) and not file.is_file():
        raise UsageError(f"--plot {file}: exists and is not a file; choose another name")


def save(figure: Any, file: Path) -> None:
    """Write a figure in the format of the file's ending, and close it."""
    local_path("--plot", file)
    picture = io.BytesIO()
    try:
        figure.savefig(picture, format=file.suffix[1:] or "png", dpi=120)
    except ValueError as e:
        raise UsageError(f"{file}: {e}") from e
    finally:
        pyplot().close(figure)
    fsio.write_atomic(Path(os.path.realpath(file)), [picture.getvalue()])
