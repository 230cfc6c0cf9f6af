"""What every solution keeps: the trace, the step that is returned, the best factors at each step, the scaling."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import loftq.solver
from loftq import codes
from loftq.errors import NumericalError, UsageError
from loftq.numerics import Metric, best_factors, dequantize
from loftq.solver import Solution
from loftq.solver import loftq as module
from loftq.spec import QuantSpec, SolveSpec, scaling
from quantizers import WIDTHS, Fitted, quantize

QUANTS = {
    "nf2": QuantSpec(bits=2),
    "nf3": QuantSpec(bits=3, block_size=48),
    "nf4": QuantSpec(bits=4, scale_dtype="float32"),
    "nf4-double": QuantSpec(bits=4, double_quant=True),
    "nf8": QuantSpec(bits=8, scale_dtype="float16"),
    "uniform2": QuantSpec(bits=2, code="uniform"),
    "uniform-tensor2": QuantSpec(bits=2, code="uniform-tensor"),
    "affine4": QuantSpec(bits=4, code="affine", block_size=32),
    "lloyd2": QuantSpec(bits=2, code="lloyd"),
    "fitted-nf4": Fitted(bits=4, scale_dtype="float32"),
    "fitted-lloyd2": Fitted(bits=2, code="lloyd", block_size=48),
    "fitted-lloyd3-double": Fitted(bits=3, code="lloyd", double_quant=True),
    "fitted-uniform2": Fitted(bits=2, code="uniform", scale_dtype="float16"),
    "fitted-affine3": Fitted(bits=3, code="affine"),
}
quants = pytest.mark.parametrize("quant", QUANTS.values(), ids=QUANTS)


def solve(w: Tensor, quant: QuantSpec, rank: int, spec: SolveSpec | None = None, name: str = "") -> Solution:
    spec = spec or SolveSpec()
    return loftq.solver.solve(
        w, quant, rank, replace(spec, scales="fitted") if isinstance(quant, Fitted) else spec, name
    )


def weight(rows: int = 96, columns: int = 112, seed: int = 0) -> Tensor:
    """Gaussian with a decaying part, as trained weights have."""
    generator = torch.Generator().manual_seed(seed)
    spikes = torch.randn(rows, 6, generator=generator) @ torch.randn(6, columns, generator=generator)
    return 0.02 * (torch.randn(rows, columns, generator=generator) + 0.3 * spikes)


def error64(w: Tensor, solution: Solution, quant: QuantSpec) -> float:
    """The relative error, in float64, from what the solution holds."""
    low_rank = solution.b.double() @ solution.a.double()
    residual = w.double() - dequantize(solution.quantized, quant).double() - low_rank
    return (torch.linalg.norm(residual) / torch.linalg.norm(w.double())).item()


@pytest.mark.sampled(5)
@quants
@pytest.mark.parametrize("order", ["quantize-first", "svd-first"])
@pytest.mark.parametrize("steps", [0, 1, 5, 10])
def test_errors_are_those_of_the_steps_and_the_best_is_kept(quant: QuantSpec, order: str, steps: int) -> None:
    w = weight()
    solution = solve(w, quant, 8, SolveSpec(steps=steps, order=order))
    errors, kept = solution.errors, solution.kept
    alone = torch.linalg.norm(w.double() - dequantize(quantize(w, quant), quant).double())
    assert len(errors) == steps + 1
    assert errors[0] == pytest.approx((alone / torch.linalg.norm(w.double())).item(), rel=1e-6)
    assert kept == (min(range(1, steps + 1), key=errors.__getitem__) if steps else 0)
    assert errors[kept] == pytest.approx(error64(w, solution, quant), rel=1e-5)
    if order == "quantize-first":
        assert errors[kept] <= errors[0]
        if steps:
            assert errors[1] < errors[0]
            assert torch.equal(solve(w, quant, 8, SolveSpec(steps=0)).quantized.codes, quantize(w, quant).codes)


@pytest.mark.sampled(3)
@quants
def test_a_longer_run_begins_with_the_shorter_one(quant: QuantSpec) -> None:
    runs = [solve(weight(), quant, 8, SolveSpec(steps=t)) for t in (1, 3, 6)]
    for short, long in itertools.pairwise(runs):
        assert long.errors[: len(short.errors)] == short.errors
        assert long.errors[long.kept] <= short.errors[short.kept]


@pytest.mark.sampled(3)
@quants
@pytest.mark.parametrize("order", ["quantize-first", "svd-first"])
def test_each_half_step_is_the_best_one(quant: QuantSpec, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every SVD is of what the other half left, and meets Eckart and Young."""
    seen: list[tuple[Tensor, Tensor]] = []

    def watched(residual: Tensor, rank: int, metric: Metric, **options):
        b, a = best_factors(residual, rank, metric, **options)
        seen.append((residual.clone(), b @ a))  # its memory is used again
        return b, a

    monkeypatch.setattr(module, "best_factors", watched)
    w = weight()
    solution = solve(w, quant, 8, SolveSpec(steps=4, order=order))
    assert len(seen) == 4
    quantized = quantize(w, quant)
    backbone = w - dequantize(quantized, quant) if order == "quantize-first" else w
    for t, (residual, low_rank) in enumerate(seen, start=1):
        torch.testing.assert_close(residual, backbone, rtol=0, atol=0)
        left = torch.linalg.norm(residual.double() - low_rank.double()).item()
        best = torch.linalg.svdvals(residual.double())[8:].square().sum().sqrt().item()
        assert left == pytest.approx(best, rel=1e-5)
        quantized = quantize(w - low_rank, quant, earlier=quantized)
        backbone = w - dequantize(quantized, quant)
        if order == "quantize-first":
            assert solution.errors[t] == pytest.approx(left / torch.linalg.norm(w.double()).item(), rel=1e-5)


def matrices() -> dict[str, Tensor]:
    """What trained weights are like, and what they are not."""
    generator = torch.Generator().manual_seed(1)
    flat = torch.randn(72, 200, generator=generator) * 0.02
    u, s, vh = torch.linalg.svd(flat, full_matrices=False)
    sparse = flat * (torch.rand(72, 200, generator=generator) < 0.1)
    sparse[:, :64] = 0
    return {
        "spiked": weight(),
        "flat": flat,
        "decaying": u * torch.arange(1, len(s) + 1) ** -1.0 @ vh,
        "heavy-tailed": flat**3,
        "off centre": flat + 0.03,
        "rows of all sizes": flat * torch.logspace(-3, 3, 72)[:, None],
        "sparse": sparse,
        "on the grid": flat.sign(),
    }


FITTED = [
    Fitted(bits=bits, code=code, block_size=block, scale_dtype=dtype, double_quant=double)
    for code, bits in WIDTHS
    for block, dtype, double in ((64, "bfloat16", False), (24, "float32", bits != 3))
    if not codes.get(code).per_tensor
]


@pytest.mark.sampled(7)
@pytest.mark.parametrize("kind", matrices())
@pytest.mark.parametrize("order", ["quantize-first", "svd-first"])
def test_with_fitted_scales_no_step_raises_the_error(kind: str, order: str) -> None:
    """Each half of a step starts from what the other left and keeps it, or finds less. Even at two bits.

    Kinds and orders take turns with the codes.
    """
    w = matrices()[kind]
    first = 0 if order == "quantize-first" else 1
    for quant in FITTED[(list(matrices()).index(kind) + first) % 2 :: 2]:
        solution = solve(w, quant, 8, SolveSpec(steps=6, order=order))
        for earlier, later in itertools.pairwise(solution.errors[first:]):
            assert later <= earlier * (1 + 1e-5) + 1e-7, (quant, solution.errors)
    if kind in ("spiked", "flat", "decaying"):
        formula = solve(w, QuantSpec(bits=2), 8)
        assert solve(w, Fitted(bits=2), 8).errors[-1] < 0.75 * formula.errors[formula.kept]


@pytest.mark.parametrize("seed", range(3))
def test_two_bits_are_not_monotone_and_the_best_step_is_returned(seed: int) -> None:
    """What keeping the best step rests on: NF2's trace rises with absmax scales, and the last step is not the best."""
    w = torch.randn(256, 256, generator=torch.Generator().manual_seed(seed)) * 0.02
    solution = solve(w, QuantSpec(bits=2), 64, SolveSpec(steps=10))
    errors = solution.errors
    assert any(later > earlier for earlier, later in itertools.pairwise(errors[1:]))
    assert errors[-1] > errors[solution.kept] == min(errors)
    assert 2 <= solution.kept <= 5
    four = solve(w, QuantSpec(bits=4), 16, SolveSpec(steps=10)).errors
    assert list(four) == sorted(four, reverse=True)  # at four bits and a small rank more steps only help


@pytest.mark.sampled(5)
@quants
@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_error_does_not_depend_on_alpha(quant: QuantSpec, ratio: float, use_rslora: bool) -> None:
    """The forward pass adds s · B @ A; whatever s is, the start is as good."""
    w = weight()
    rank = 8
    solution = solve(w, quant, rank)
    s = scaling(ratio * rank, rank, use_rslora)
    assert s == pytest.approx(ratio * (math.sqrt(rank) if use_rslora else 1))
    b, a = solution.factors(s)
    start = dequantize(solution.quantized, quant) + s * (b @ a)
    error = (torch.linalg.norm(w.double() - start.double()) / torch.linalg.norm(w.double())).item()
    assert error == pytest.approx(solution.errors[solution.kept], rel=1e-5)
    torch.testing.assert_close(b.norm(), a.norm(), rtol=1e-4, atol=0)  # divided evenly


def test_no_steps_is_loras_own_start() -> None:
    """B = 0, A uniform within 1/sqrt(in) (Kaiming with a = sqrt 5), never rescaled."""
    solution = solve(weight(96, 400), QuantSpec(bits=4), 64, SolveSpec(steps=0))
    assert solution.kept == 0
    assert solution.b.shape == (96, 64)
    assert (solution.b == 0).all()
    bound = 1 / math.sqrt(400)
    assert solution.a.abs().max() <= bound
    assert solution.a.abs().max() > 0.99 * bound
    assert solution.a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    b, a = solution.factors(0.25)
    assert torch.equal(b, solution.b)
    assert torch.equal(a, solution.a)


@pytest.mark.sampled(5)
@quants
@pytest.mark.parametrize("shape", [(24, 100), (100, 24), (1, 40), (40, 1)])
def test_rank_one_and_full_rank(quant: QuantSpec, shape: tuple[int, int]) -> None:
    w = weight(*shape)
    for rank in {1, min(shape)}:
        solution = solve(w, quant, rank, SolveSpec(steps=3))
        assert solution.b.shape == (shape[0], rank)
        assert solution.a.shape == (rank, shape[1])
        assert solution.errors[solution.kept] <= solution.errors[0]
    assert solution.errors[solution.kept] < 1e-5 or rank < min(shape)


@pytest.mark.sampled(5)
@quants
@pytest.mark.parametrize("svd", ["exact", "randomized"])
@pytest.mark.parametrize("order", ["quantize-first", "svd-first"])
def test_zero_matrix(quant: QuantSpec, svd: str, order: str) -> None:
    solution = solve(torch.zeros(40, 50), quant, 4, SolveSpec(svd=svd, order=order))
    assert set(solution.errors) == {0.0}
    assert (dequantize(solution.quantized, quant) + solution.b @ solution.a == 0).all()


@pytest.mark.sampled(3)
@quants
def test_scale_of_the_weights_does_not_matter(quant: QuantSpec) -> None:
    w = weight()
    base = solve(w, quant, 8)
    for power in (-8, 6):
        if quant.scale_dtype == "float16" and power < 0:
            continue  # below float16's normal numbers
        scaled = solve(w * 2.0**power, quant, 8)
        assert scaled.errors == pytest.approx(base.errors, rel=1e-3)


@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_the_same_bits_every_time(svd: str) -> None:
    spec = SolveSpec(svd=svd, seed=3)
    w = weight(200, 160)
    first = solve(w, QuantSpec(bits=2), 4, spec, "layer.0")
    torch.randn(7)  # the global generator plays no part
    again = solve(w.clone(), QuantSpec(bits=2), 4, spec, "layer.0")
    assert first.errors == again.errors
    assert torch.equal(first.a, again.a)
    assert torch.equal(first.b, again.b)
    assert torch.equal(first.quantized.codes, again.quantized.codes)


def test_name_and_seed_make_the_random_start() -> None:
    w = weight(200, 160)
    specs = [(SolveSpec(svd="randomized", seed=s), n) for s in (0, 1) for n in ("a", "b")]
    factors = [solve(w, QuantSpec(bits=2), 4, spec, n).a for spec, n in specs]
    assert all(not torch.equal(x, y) for x, y in itertools.combinations(factors, 2))
    assert module.tensor_seed(0, "model.layers.0.weight") == 7555792411189499383  # frozen: outputs are reproducible
    assert 0 <= module.tensor_seed(1, "é") < 2**63


def test_input_is_left_alone() -> None:
    w = weight().requires_grad_()
    before = w.detach().clone()
    solution = solve(w, QuantSpec(bits=2), 8)
    assert torch.equal(w.detach(), before)
    assert not solution.a.requires_grad
    assert not solution.b.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_solved_in_float32(dtype: torch.dtype) -> None:
    w = weight().to(dtype)
    assert solve(w, QuantSpec(bits=2), 8).errors == solve(w.float(), QuantSpec(bits=2), 8).errors


def test_views_in_memory() -> None:
    w = weight()
    transposed = solve(w.T.contiguous().T, QuantSpec(bits=2, code="uniform"), 8)
    assert transposed.errors == pytest.approx(solve(w, QuantSpec(bits=2, code="uniform"), 8).errors, rel=1e-6)


@pytest.mark.parametrize("rank", [0, -1, 97])
def test_a_rank_that_does_not_fit_is_refused(rank: int) -> None:
    too_large = r"rank .* does not fit a matrix of shape \(96, 112\); give rank=96 or less"
    too_small = f"rank must be a whole number of at least 1, got {rank}"
    with pytest.raises(UsageError, match=too_large if rank > 0 else too_small):
        solve(weight(), QuantSpec(bits=2), rank)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    w = weight()
    w[3, 5] = w[90, 2] = bad
    with pytest.raises(NumericalError, match=r"2 of 10752 values are NaN or infinite.* the first at \[3, 5\]"):
        solve(w, QuantSpec(bits=2), 8)


def test_float64_values_beyond_float32_are_refused() -> None:
    w = weight().double()
    w[3, 5] = 1e300
    with pytest.raises(NumericalError, match=r"1 of 10752 values"):
        solve(w, QuantSpec(bits=2), 8)


@pytest.mark.parametrize("svd", ["exact", "randomized"])
@pytest.mark.parametrize("order", ["quantize-first", "svd-first"])
def test_huge_values_are_solved_or_refused(svd: str, order: str) -> None:
    """Within float32's range but at its end: never a solution with infinities in it."""
    w = weight()
    spec = SolveSpec(svd=svd, order=order, steps=2)
    assert solve(w * 1e36, QuantSpec(bits=4), 8, spec).errors[-1] < 1
    with pytest.raises(NumericalError):
        solve(
            torch.full((40, 40), 3e38) * torch.randn(40, 40).sign(), QuantSpec(bits=2, scale_dtype="float16"), 8, spec
        )
    try:
        solution = solve(w / w.abs().max() * 3.3e38, QuantSpec(bits=2), 8, spec)
    except NumericalError:
        return
    assert all(math.isfinite(e) for e in solution.errors)
    assert solution.b.isfinite().all()
    assert solution.a.isfinite().all()


def test_caller_defaults_do_not_matter() -> None:
    w = weight(600, 600)
    specs = [SolveSpec(steps=0), SolveSpec(steps=1, svd="randomized")]
    expected = [solve(w, QuantSpec(bits=2), 8, spec) for spec in specs]
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        got = [solve(w, QuantSpec(bits=2), 8, spec) for spec in specs]
    for a, b in zip(expected, got, strict=True):
        assert a.errors == b.errors
        assert torch.equal(a.a, b.a)
        assert a.b.dtype == b.b.dtype == torch.float32


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("family", "quant", "rank"),
    [
        ("flat", "nf2", 64),
        ("flat", "uniform2", 16),
        ("decaying", "nf4", 64),
        ("decaying", "uniform-tensor2", 16),
        ("heavy", "nf2", 16),
        ("heavy", "nf4", 128),
    ],
)
def test_randomized_ends_where_exact_ends(family: str, quant: str, rank: int) -> None:
    """T = 5. Rounding alone moves the end of the alternation by up to 0.1 % at this size, so one case may be off by
    that much beside the 0.1 % allowed; docs/experiments.md has the table of many.
    """
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(520, 560, generator=generator)
    if family == "heavy":
        w = w / torch.randn(3, 520, 560, generator=generator).square().mean(0).sqrt()
    elif family == "decaying":
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        w = u * torch.arange(1, len(s) + 1) ** -0.5 @ vh
    exact = solve(w, QUANTS[quant], rank, SolveSpec(svd="exact"))
    found = solve(w, QUANTS[quant], rank, SolveSpec(svd="randomized"))
    assert found.errors[1] <= exact.errors[1] * 1.001
    assert found.errors[found.kept] <= exact.errors[exact.kept] * 1.002
