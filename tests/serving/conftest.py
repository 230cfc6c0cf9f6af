import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from models import made  # noqa: F401


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory where it can be: exports sync every file."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as path:
        yield Path(path)
