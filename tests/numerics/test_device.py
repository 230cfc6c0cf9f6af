"""What devices ask of arithmetic and of random numbers, tried without one."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from loftq.adapters import guard
from loftq.nn.layers import LoftQLinear
from loftq.numerics import Quantized, encode, fit_scales, quantize, rounding, trellis, trellis_rounding
from loftq.numerics.device import seeded
from loftq.spec import QuantSpec

CPU = torch.device("cpu")


def test_a_seed_reaches_no_other_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's seed of CUDA devices outlives what is tried on a CPU; of two devices the one that is not worked on."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("all devices begin anew"))
    drawn = []
    before = torch.get_rng_state()
    for _ in range(2):
        with seeded(3, [CPU, CPU, torch.device("meta")]):
            drawn.append(torch.rand(2))
    assert torch.equal(*drawn)
    assert torch.equal(before, torch.get_rng_state())


def test_a_trial_seeds_its_devices_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("all devices begin anew"))
    spec = QuantSpec(bits=2)
    layer = LoftQLinear(72, 37, False, spec)
    layer.load_stored(encode(quantize(torch.randn(37, 72), spec), spec))
    get_peft_model(torch.nn.Sequential(layer), LoraConfig(target_modules=["0"]))


def test_a_trial_asks_a_layer_on_its_own_device() -> None:
    """device_map may have spread the layers."""
    assert guard._inputs(LoftQLinear(72, 37, False, QuantSpec(bits=2), device="meta")).is_meta


class Looks(TorchDispatchMode):
    """Counts the values that are fetched from tensors: each is a wait for a device."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return function(*args, **(kwargs or {}))


def looks(columns: int, spec: QuantSpec) -> int:
    """Of one round of descent with a whole H."""
    target, inputs = torch.randn(64, columns), torch.randn(2 * columns, columns)
    quantized: Quantized
    if spec.code == "trellis":
        codes = trellis.windows(encode(quantize(target, spec), spec), spec, columns)
        quantized = Quantized(codes, fit_scales(target, spec))
        windows = lambda weight, scales, spec, earlier: earlier  # noqa: E731
        with Looks() as seen:
            trellis_rounding.descend(target, quantized, inputs.T @ inputs, spec, best_windows=windows)
    else:
        quantized = quantize(target, spec)
        with Looks() as seen:
            rounding.descend(target, quantized, inputs.T @ inputs, spec)
    return seen.count


@pytest.mark.parametrize(
    "spec", [QuantSpec(bits=2), QuantSpec(bits=2, code="trellis", window=8)], ids=["nf", "trellis"]
)
def test_descent_does_not_wait_for_each_column(spec: QuantSpec) -> None:
    assert looks(16, spec) == looks(48, spec)
