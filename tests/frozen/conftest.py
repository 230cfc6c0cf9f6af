from pathlib import Path

import pytest
from bases import make_llama

from models import made  # noqa: F401


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """The original, in float32."""
    directory = tmp_path_factory.mktemp("original")
    make_llama().save_pretrained(directory)
    return directory
