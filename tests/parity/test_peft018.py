"""Ours against PEFT 0.18.1, the last release with a 2-bit LoftQ quantizer. Opt-in:

pip download peft==0.18.1 --no-deps && python -m zipfile -e peft-0.18.1-*.whl DIRECTORY
LOFTQ_PEFT018=DIRECTORY pytest tests/parity/test_peft018.py
"""

import importlib.util
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor

from loftq.numerics import dequantize, encode, quantize
from loftq.numerics.codebooks import midpoints
from loftq.solver import solve
from loftq.spec import QuantSpec, SolveSpec

DIRECTORY = os.environ.get("LOFTQ_PEFT018", "")
pytestmark = pytest.mark.skipif(not DIRECTORY, reason="LOFTQ_PEFT018 does not name an unpacked PEFT 0.18.1")


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch):
    """PEFT's module of LoftQ alone: what it asks of the rest of PEFT is answered here, without bitsandbytes' 4 bits,
    so that its own quantizer does the work, and on the CPU.
    """
    pytest.importorskip("scipy", reason="PEFT's quantizer takes its quantiles from scipy")
    answers = types.ModuleType("peft.import_utils")
    answers.is_bnb_available = lambda: True  # type: ignore[attr-defined]
    answers.is_bnb_4bit_available = lambda: False  # type: ignore[attr-defined]
    answers.is_xpu_available = lambda: False  # type: ignore[attr-defined]
    parent = types.ModuleType("peft")
    parent.import_utils = answers  # type: ignore[attr-defined]
    for name in [n for n in sys.modules if n == "peft" or n.startswith("peft.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "peft", parent)
    monkeypatch.setitem(sys.modules, "peft.import_utils", answers)
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    path = Path(DIRECTORY) / "peft" / "utils" / "loftq_utils.py"
    found = importlib.util.spec_from_file_location("peft018_loftq_utils", path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def weight(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(11)
    w = torch.randn(128, 192, generator=generator) * 0.02
    return w**3 * 2500 if kind == "cubed" else w


def ours(bits: int, code: str = "nf") -> QuantSpec:
    return QuantSpec(bits=bits, code=code, block_size=64, scale_dtype="float32")


@pytest.mark.parametrize("kind", ["normal", "cubed"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("code", "method"), [("nf", "normal"), ("uniform", "uniform")])
def test_the_quantizer_is_peft_018s(theirs, code: str, method: str, bits: int, kind: str) -> None:
    """The same levels, scales, packed bytes and values."""
    w = weight(kind)
    quantizer = theirs.NFQuantizer(num_bits=bits, device="cpu", method=method, block_size=64)
    packed, scale, shape = quantizer.quantize_block(w)
    mine = quantize(w, ours(bits, code))
    torch.testing.assert_close(mine.scales["weight_scale"].flatten(), scale.flatten(), rtol=1e-6, atol=0)
    values = quantizer.dequantize_block(packed, scale, shape)
    differ = (dequantize(mine, ours(bits, code)) - values).abs() > 1e-6 * w.abs().max()
    assert differ.float().mean() < 0.01
    # theirs compares rounded distances, so a weight within rounding of a midpoint goes to the lower level
    scaled = (w.view(-1, 64) / scale).flatten()[differ.flatten()]
    assert ((scaled[:, None] - midpoints(code, bits)).abs().amin(1) < 1e-7).all()
    if not differ.any():
        stored = encode(mine, ours(bits, code))["weight"].view(torch.uint8)
        assert torch.equal(stored.flatten(), packed.flatten())


@pytest.mark.parametrize("kind", ["normal", "cubed"])
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("bits", [2, 4])
def test_the_initialization_is_peft_018s(theirs, bits: int, steps: int, kind: str) -> None:
    """Its last step is our step T: the same error and, where T is the best step, the same start."""
    w = weight(kind)
    backbone, a, b = theirs.loftq_init(w, num_bits=bits, reduced_rank=16, num_iter=steps)
    error = (torch.linalg.norm((w - backbone - b @ a).double()) / torch.linalg.norm(w.double())).item()
    mine = solve(w, ours(bits), 16, SolveSpec(steps=steps, svd="exact"))
    assert mine.errors[steps] == pytest.approx(error, rel=1e-5)
    assert mine.errors[mine.kept] <= error * (1 + 1e-6)
    if mine.kept == steps:
        start = dequantize(mine.quantized, ours(bits)) + mine.b @ mine.a
        far = (start - backbone - b @ a).abs() > 1e-5 * w.abs().max()
        assert far.float().mean() <= 1e-3
