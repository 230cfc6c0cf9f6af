import datasets
import pytest
import tiny_models


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """What ``datasets`` reads from files is kept with the tests, not in the user's home."""
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="session")
def words():
    return tiny_models.words()


@pytest.fixture(scope="session")
def letters():
    return tiny_models.letters()
