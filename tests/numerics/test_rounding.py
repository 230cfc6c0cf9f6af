"""Error feedback and descent: what they are by definition, what they never do, and equal bits from every back end."""

import itertools
import threading
import time

import pytest
import torch
from torch import Tensor

from loftq.kernels import backend, reference
from loftq.numerics import Metric, Quantized, chunks, deflated, dequantize, levels, nearest, quantize, rounding
from loftq.numerics.rounding import DAMPING, descend, feedback
from loftq.solver import ordered_map
from loftq.spec import QuantSpec

SPECS = {
    "nf2": QuantSpec(bits=2, block_size=16),
    "nf4": QuantSpec(bits=4, scale_dtype="float32"),
    "nf8": QuantSpec(bits=8),
    "lloyd3-double": QuantSpec(bits=3, code="lloyd", block_size=20, double_quant=True),
    "uniform2": QuantSpec(bits=2, code="uniform", block_size=48, scale_dtype="float16"),
    "affine4": QuantSpec(bits=4, code="affine"),
    "uniform-tensor2": QuantSpec(bits=2, code="uniform-tensor"),
}
specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
ROWS, COLUMNS = 24, 80


def weight() -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))


def moments(tokens: int = 500) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, COLUMNS, generator=generator) @ torch.randn(COLUMNS, COLUMNS, generator=generator)
    return (x.T @ x / tokens).double()


def distance(quantized: Quantized, spec: QuantSpec, h: Tensor) -> float:
    return Metric(h).norm(weight() - dequantize(quantized, spec))


def fitted_too(spec: QuantSpec) -> list[bool]:
    return [False] if spec.code == "uniform-tensor" else [False, True]


@specs
def test_with_no_correlation_feedback_is_rounding(spec: QuantSpec) -> None:
    found, alone = feedback(weight(), torch.eye(COLUMNS), spec), quantize(weight(), spec)
    if not spec.double_quant:  # whose scales are stored after a first pass, all together
        assert all(torch.equal(found.scales[name], alone.scales[name]) for name in alone.scales)
    assert torch.equal(found.codes, nearest(weight(), found.scales, spec).codes)


def test_feedback_column_by_column() -> None:
    """GPTQ as it was first told (arXiv 2210.17323, eq. 2 and 3): with the inverse of what is left of H."""
    spec = SPECS["nf4"]
    h = moments() + DAMPING * moments().diagonal().mean() * torch.eye(COLUMNS)
    found = feedback(weight(), moments(), spec)
    scale, table = found.scales["weight_scale"].double(), levels("nf", 4).double()
    values, inverse = weight().double(), torch.linalg.inv(h)
    for i in range(COLUMNS):
        s = scale[:, i // spec.block_size]
        q = table[(values[:, i, None] / s[:, None] - table).abs().argmin(1)] * s
        values -= ((values[:, i] - q) / inverse[i, i])[:, None] * inverse[i]
        inverse = inverse - inverse[:, i, None] * inverse[i] / inverse[i, i]
        values[:, i] = q
    same = (values.float() - dequantize(found, spec)).abs() < 1e-4
    assert same.float().mean() > 0.99  # all but ties that float32 breaks the other way, and what follows from them
    assert distance(found, spec, moments()) == pytest.approx(
        Metric(moments()).norm(weight() - values.float()), rel=1e-3
    )


@pytest.mark.sampled(3)
@specs
def test_feedback_and_descent_lower_the_error_of_the_output(spec: QuantSpec) -> None:
    h = moments()
    for fitted in fitted_too(spec):
        kernels = backend(torch.device("cpu"))
        alone, _ = kernels.quantize_residual(weight(), weight(), spec, fitted=fitted)
        quantized = feedback(weight(), h, spec, fitted=fitted)
        trace = [distance(alone, spec, h), distance(quantized, spec, h)]
        for _ in range(4):
            quantized = descend(weight(), quantized, h, spec, fitted=fitted)
            trace.append(distance(quantized, spec, h))
        assert trace[1] < trace[0]
        assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(trace[1:]))
        assert trace[2] < trace[1]


@pytest.mark.sampled(3)
@specs
def test_where_descent_stops_no_single_code_is_better(spec: QuantSpec) -> None:
    h, quantized = moments(), quantize(weight(), spec)
    for _ in range(60):
        before, quantized = quantized, descend(weight(), quantized, h, spec)
        if torch.equal(before.codes, quantized.codes):
            break
    else:
        pytest.fail("60 rounds, and still moving")
    row = 3
    least = distance_of_row(row, quantized, spec, h)
    for column, code in itertools.product(range(0, COLUMNS, 7), range(2 ** min(spec.bits, 4))):
        codes = quantized.codes.clone()
        codes[row, column] = code
        assert distance_of_row(row, Quantized(codes, quantized.scales), spec, h) >= least * (1 - 1e-6)


def distance_of_row(row: int, quantized: Quantized, spec: QuantSpec, h: Tensor) -> float:
    left = (weight() - dequantize(quantized, spec))[row].double()
    return (left @ h @ left).item()


@pytest.mark.sampled(4)
@specs
@pytest.mark.parametrize("h", [moments(), moments(tokens=20), torch.zeros(COLUMNS, COLUMNS)], ids=["H", "few", "none"])
def test_back_ends_agree_to_the_bit(spec: QuantSpec, h: Tensor) -> None:
    compiled = backend(torch.device("cpu"))
    assert compiled.NAME == "cpu"
    for fitted in fitted_too(spec):
        ours = compiled.feedback(weight(), h, spec, fitted=fitted)
        theirs = reference.feedback(weight(), h, spec, fitted=fitted)
        equal(ours, theirs)
        equal(
            compiled.descend(weight(), ours, h, spec, fitted=fitted),
            reference.descend(weight(), theirs, h, spec, fitted=fitted),
        )


def equal(a: Quantized, b: Quantized) -> None:
    assert torch.equal(a.codes, b.codes)
    assert all(torch.equal(a.scales[name], b.scales[name]) for name in b.scales)


def test_dead_features_keep_their_codes() -> None:
    h, spec = moments(), SPECS["nf2"]
    h[10:20], h[:, 10:20] = 0, 0
    before = quantize(weight(), spec)
    after = descend(weight(), before, h, spec)
    assert torch.equal(before.codes[:, 10:20], after.codes[:, 10:20])
    assert feedback(weight(), h, spec).scales["weight_scale"].isfinite().all()


@specs
def test_a_diagonal_without_what_an_adapter_sees_needs_no_matrix(spec: QuantSpec) -> None:
    """Descent in ``D − P Pᵀ`` is descent in that matrix, but for ties that rounding breaks."""
    a = torch.randn(6, COLUMNS, generator=torch.Generator().manual_seed(2))
    diagonal = moments().diagonal().contiguous()
    slim, dense = deflated(a, diagonal), deflated(a, torch.diag(diagonal))
    torch.testing.assert_close(slim.dense(), dense)
    start = quantize(weight(), spec)
    for fitted in fitted_too(spec):
        ours, theirs = (descend(weight(), start, h, spec, fitted=fitted) for h in (slim, dense))
        assert (ours.codes == theirs.codes).float().mean() > 0.99
        assert distance(ours, spec, dense) == pytest.approx(distance(theirs, spec, dense), rel=1e-3)
        assert distance(ours, spec, dense) < distance(start, spec, dense)
        compiled = backend(torch.device("cpu")).descend(weight(), start, slim, spec, fitted=fitted)
        equal(compiled, ours)


@specs
def test_panels_and_a_given_residual_change_nothing_but_rounding(spec: QuantSpec, monkeypatch) -> None:
    """Several panels of a matrix; and W − Q is that of the result."""
    h, start, left = moments(), quantize(weight(), spec), {}
    for panel in (32, 4096):
        monkeypatch.setattr(rounding, "PANEL", panel)
        residual = weight() - dequantize(start, spec)
        found = descend(weight(), start, h, spec, residual=residual)
        torch.testing.assert_close(residual, weight() - dequantize(found, spec), rtol=1e-5, atol=1e-5)
        left[panel] = distance(found, spec, h), distance(feedback(weight(), h, spec), spec, h)
    assert left[32] == pytest.approx(left[4096], rel=2e-3)


@specs
def test_the_same_bits_in_chunks_for_any_number_of_threads(spec: QuantSpec, monkeypatch) -> None:
    """Chunks are of one size; a matrix that is alone lends its chunks to the other threads of the pool."""
    monkeypatch.setattr(chunks, "ROWS", 5)
    kernels, h, seen = backend(torch.device("cpu")), moments(), set()
    plain = rounding.round_block

    def work(_: int) -> Quantized:
        found = kernels.feedback(weight(), h, spec)
        return kernels.descend(weight(), found, h, spec, fitted=spec.code != "uniform-tensor")

    def watched(*args: object) -> tuple[Tensor, Tensor]:
        seen.add(threading.get_ident())
        time.sleep(0.002)
        return plain(*args)

    alone = work(0)
    for workers in (1, 3):
        for found in ordered_map(work, range(2), workers):
            equal(found, alone)
    list(ordered_map(lambda _: rounding.feedback(weight(), h, spec, round_block=watched), [0], 3))
    assert len(seen) > 1
