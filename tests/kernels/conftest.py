import pytest
from backends import NAMES, Backend, backend


@pytest.fixture(params=NAMES)
def kernels(request: pytest.FixtureRequest) -> Backend:
    """Each back end in turn; those that this machine cannot run are skipped."""
    return backend(request.param)
