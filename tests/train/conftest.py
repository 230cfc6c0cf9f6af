import pytest
import tiny

from models import made  # noqa: F401


@pytest.fixture(scope="session")
def made_place(tmp_path_factory):
    place = tmp_path_factory.mktemp("train")
    tiny.source(place / "model")
    tiny.data(place / "data")
    return place


@pytest.fixture
def place(made_place, tmp_path):
    """A directory with ``model`` and ``data``, for runs to lie beside them."""
    for name in ("model", "data"):
        (tmp_path / name).symlink_to(made_place / name)
    return tmp_path
