"""Settings that make tests repeatable, and shapes checked at run time."""

import collections
import gc
import inspect
import os
import sys
import types

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import fsspec
import pytest
import torch
from jaxtyping import install_import_hook, jaxtyped

CHECKER = jaxtyped(lambda: None, typechecker=None).__code__.co_filename
install_import_hook(["loftq.numerics", "loftq.solver"], "beartype.beartype")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of a test with the marker ``sampled(n)`` every n-th row is quick, and the others are slow."""
    rows = collections.Counter()
    for item in items:
        sampled = item.get_closest_marker("sampled")
        if sampled:
            test = item.nodeid.partition("[")[0]
            if rows[test] % sampled.args[0]:
                item.add_marker(pytest.mark.slow)
            rows[test] += 1


def pytest_collection_finish():
    """Check shapes where there are any; leave what importing made out of garbage collections."""
    for module in [module for name, module in sys.modules.items() if name.startswith("loftq.")]:
        for name, function in list(vars(module).items()):
            checked = isinstance(function, types.FunctionType) and function.__code__.co_filename == CHECKER
            if checked and "jaxtyping" not in str(function.__annotations__):  # it may be an inner loop
                setattr(module, name, inspect.unwrap(function))
    gc.collect()  # every run of a Trainer asks for several whole ones
    gc.freeze()


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """A scratch directory of the test's own."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))


@pytest.fixture
def memory(scratch):
    """fsspec's store in memory, empty."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    return fs


@pytest.fixture(autouse=True)
def repeatable():
    """The same random numbers, one thread and float32 for every test."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(torch.float32)
