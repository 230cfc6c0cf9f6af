from collections.abc import Iterator

import pytest

from harness import one_skeleton
from ram import tmp_path  # noqa: F401


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    with one_skeleton():
        yield
