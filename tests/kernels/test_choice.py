"""Which back end is used, and what is said when one cannot be."""

import inspect
import logging
import sys
from collections.abc import Iterator

import pytest
import torch

import loftq.kernels
from loftq.errors import UsageError
from loftq.kernels import cpu, reference

FUNCTIONS = ("quantize_residual", "pack", "dequantize", "linear", "linear_grad_input", "embedding")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    loftq.kernels._load.cache_clear()
    yield
    loftq.kernels._load.cache_clear()


def test_one_contract(kernels) -> None:
    for name in FUNCTIONS:
        wanted = inspect.signature(getattr(reference, name))
        assert list(inspect.signature(getattr(kernels.module, name)).parameters) == list(wanted.parameters)
    for name in ("feedback", "descend"):  # a back end's may take parts of its own beside
        wanted = list(inspect.signature(getattr(reference, name)).parameters)
        given = list(inspect.signature(getattr(kernels.module, name)).parameters)
        assert given[: len(wanted)] == wanted
        assert "fitted" in given
    assert isinstance(kernels.module.NAME, str)


def test_by_device() -> None:
    assert loftq.kernels.backend(torch.device("cpu")) is cpu
    assert loftq.kernels.backend(torch.device("meta")) is reference
    assert loftq.kernels.backend(torch.device("mps")) is reference


def test_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOFTQ_KERNELS", "reference")
    assert loftq.kernels.backend(torch.device("cpu")) is reference
    monkeypatch.setenv("LOFTQ_KERNELS", "fast")
    with pytest.raises(UsageError, match="LOFTQ_KERNELS"):
        loftq.kernels.backend(torch.device("cpu"))


@pytest.mark.parametrize(("device", "package"), [("cuda", "triton"), ("cpu", "numba")])
def test_a_missing_compiler_is_named_once(
    device: str, package: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = loftq.kernels.MODULES[device]
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with caplog.at_level(logging.WARNING, "loftq"):
        for _ in range(2):
            assert loftq.kernels.backend(torch.device(device)) is reference
    assert len(caplog.records) == 1
    assert f"pip install {package}" in caplog.text
    assert module not in sys.modules


def test_triton_without_a_c_compiler_is_named_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    driver = pytest.importorskip("triton.runtime").driver

    class Broken:
        def get_current_target(self) -> None:
            raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(driver, "_active", Broken())
    with caplog.at_level(logging.WARNING, "loftq"):
        for _ in range(2):
            assert loftq.kernels.backend(torch.device("cuda")) is reference
    assert len(caplog.records) == 1
    assert "Failed to find C compiler" in caplog.text
    assert "python3-dev" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_has_its_kernels() -> None:
    assert loftq.kernels.backend(torch.device("cuda")).NAME == "cuda"
