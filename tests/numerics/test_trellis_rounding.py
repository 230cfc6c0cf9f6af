"""Error feedback and descent on a trellis: the error of the outputs falls, and rates go to the columns that count."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from loftq.kernels import backend
from loftq.numerics import Moments, decode, dequantize, encode, quantize, trellis_rounding
from loftq.numerics.trellis import RATE_STEP, column_rates
from loftq.solver import solve
from loftq.spec import QuantSpec, SolveSpec, quant_spec, solve_spec, stored_tensors

ROWS, COLUMNS = 40, 24


def spec_of(bits: float, column_rates: bool) -> QuantSpec:
    return QuantSpec(bits=bits, code="trellis", window=8, column_rates=column_rates)


@pytest.fixture(scope="module")
def problem() -> tuple[Tensor, Tensor]:
    """A weight, and second moments of inputs that are far from white, one of them without energy."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, COLUMNS, generator=generator) @ torch.randn(COLUMNS, COLUMNS, generator=generator)
    inputs = inputs * torch.linspace(0.1, 2, COLUMNS)
    inputs[:, 5] = 0
    return torch.randn(ROWS, COLUMNS, generator=generator), inputs.T @ inputs / len(inputs)


def left(weight: Tensor, q: Tensor, h: Tensor) -> float:
    rest = (weight - q).double()
    return ((rest @ h.double()) * rest).sum().item()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("rates", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_descent_never_raises_the_error_of_the_outputs(problem, rates: bool, compiled: bool) -> None:
    weight, h = problem
    spec = spec_of(2, rates)
    kernels = backend(weight.device, spec) if compiled else trellis_rounding
    found = kernels.feedback(weight, h, spec, fitted=True)
    plain = left(weight, dequantize(quantize(weight, spec, fitted=True), spec), h)
    errors = [left(weight, dequantize(found, spec), h)]
    assert errors[0] < 0.8 * plain
    for _ in range(2):
        found = kernels.descend(weight, found, h, spec, fitted=True)
        errors.append(left(weight, dequantize(found, spec), h))
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(errors))
    assert errors[-1] < 0.98 * errors[0]
    stored = encode(found, spec)
    assert {name: tuple(t.shape) for name, t in stored.items()} == {
        name: shape for name, (_, shape) in stored_tensors(spec, ROWS, COLUMNS).items()
    }
    assert torch.equal(decode(stored, spec, COLUMNS), dequantize(found, spec))


def test_back_ends_leave_the_same_error(problem) -> None:
    weight, h = problem
    spec = spec_of(2.1875, True)
    errors = []
    for kernels in (backend(weight.device, spec), trellis_rounding):
        found = kernels.descend(weight, kernels.feedback(weight, h, spec, fitted=True), h, spec, fitted=True)
        errors.append(left(weight, dequantize(found, spec), h))
    assert errors[0] == pytest.approx(errors[1], rel=5e-3)


def test_a_column_without_energy_keeps_its_windows(problem) -> None:
    weight, h = problem
    spec = spec_of(2, False)
    found = quantize(weight, spec, fitted=True)
    moved = trellis_rounding.descend(weight, found, h, spec)
    assert torch.equal(moved.codes[:, 5], found.codes[:, 5])
    assert not torch.equal(moved.codes, found.codes)


@pytest.mark.parametrize(("bits", "columns"), [(2.1875, 48), (1.4375, 37), (0.5, 20), (4, 9)])
def test_rates_have_the_mean_that_was_asked_for(bits: float, columns: int) -> None:
    energy = torch.rand(columns, generator=torch.Generator().manual_seed(1)).double() ** 4
    rates = column_rates(energy, spec_of(bits, True)).long()
    assert rates.sum() == round(16 * bits) * columns
    assert rates.max() <= 64
    part = round(16 * bits) * columns % RATE_STEP
    assert (rates % RATE_STEP != 0).sum() <= bool(part)
    whole = [(r, e) for r, e in zip(rates.tolist(), energy.tolist(), strict=True) if r % RATE_STEP == 0]
    for more, e in whole:  # no step would take more elsewhere
        for less, f in whole:
            if more and less < 64:
                gain = f * (4 ** (-less / 16) - 4 ** (-(less + RATE_STEP) / 16))
                loss = e * (4 ** (-(more - RATE_STEP) / 16) - 4 ** (-more / 16))
                assert gain <= loss * (1 + 1e-12)


@pytest.mark.parametrize(("bits", "energy"), [(2.0625, [1.0, 0.0]), (0.0625, [3.0, 2.0, 1.0])])
def test_rates_are_equal_where_nothing_takes_the_rest_of_a_step(bits: float, energy: list[float]) -> None:
    rates = column_rates(torch.tensor(energy), spec_of(bits, True))
    assert rates.tolist() == [round(16 * bits)] * len(energy)


def test_rates_belong_to_rounding_column_by_column() -> None:
    assert quant_spec(solve_spec("descent"), 1.5).column_rates
    assert not quant_spec(solve_spec("fitted"), 1.5).column_rates
    assert quant_spec(SolveSpec(rounding="descent"), 2) == QuantSpec(bits=2)  # no trellis, no rates


@pytest.mark.sampled(3)
@pytest.mark.parametrize("preset", ["cloq", "projq", "descent"])
def test_calibrated_presets_on_a_trellis(problem, preset: str) -> None:
    weight, h = problem
    spec = solve_spec(preset)
    calibrated = solve(weight, quant_spec(spec, 1.5, "trellis", window=8), 4, spec, moments=Moments.of(h))
    data_free = solve(weight, quant_spec(solve_spec("fitted"), 1.5), 4, solve_spec("fitted"), moments=Moments.of(h))
    assert calibrated.output_error < 0.8 * data_free.output_error
