"""Presets: each is its published formula, all report what they leave, and they meet where their metrics do."""

import itertools

import pytest
import torch
from torch import Tensor

from loftq.errors import UsageError
from loftq.kernels import reference
from loftq.numerics import Metric, Moments, best_factors, deflated, dequantize, feedback, quantize
from loftq.solver import Solution, rounding, solve
from loftq.solver.loftq import preserved, tensor_seed
from loftq.spec import PRESETS, QuantSpec, SolveSpec, check_statistics, solve_spec

ROWS, COLUMNS, RANK = 48, 72, 6
QUANT = QuantSpec(bits=2, block_size=24, scale_dtype="float32")
PLAIN = ("qlora", "svd", "loftq", "fitted")
presets = pytest.mark.parametrize("preset", PRESETS)


def weight(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    spikes = torch.randn(ROWS, 4, generator=generator) @ torch.randn(4, COLUMNS, generator=generator)
    return 0.02 * (torch.randn(ROWS, COLUMNS, generator=generator) + 0.5 * spikes)


def second_moments(seed: int, tokens: int = 600) -> Tensor:
    mixing = torch.randn(COLUMNS, COLUMNS, generator=torch.Generator().manual_seed(7)) * torch.logspace(0, -1, COLUMNS)
    x = torch.randn(tokens, COLUMNS, generator=torch.Generator().manual_seed(seed)) @ mixing
    return x.T @ x / tokens


def moments_for(preset: str, *, same: bool = False) -> Moments:
    """Of the kind that the preset needs. ``same``: nothing is held out."""
    fit, held = Metric(second_moments(1)), Metric(second_moments(1 if same else 2))
    if PRESETS[preset].get("metric") == "fisher":
        rows = torch.rand(ROWS, generator=torch.Generator().manual_seed(3)) + 0.2
        fit, held = (Metric(m.columns.diagonal().contiguous(), rows) for m in (fit, held) if m.columns is not None)
    return Moments(fit, held, 600)


def solved(preset: str, moments: Moments | None = None, quant: QuantSpec = QUANT, **changes: object) -> Solution:
    return solve(weight(), quant, RANK, solve_spec(preset, **changes), "w", moments)


def rest(solution: Solution, quant: QuantSpec = QUANT) -> Tensor:
    return weight() - dequantize(solution.quantized, quant) - solution.b @ solution.a


@presets
@pytest.mark.parametrize("quant", [QUANT, QuantSpec(bits=3, code="lloyd", block_size=40, double_quant=True)])
def test_it_reports_what_it_leaves_and_keeps_the_best_step(preset: str, quant: QuantSpec) -> None:
    moments = moments_for(preset)
    solution = solved(preset, moments, quant)
    outputs = moments.held.norm(rest(solution, quant)) / moments.held.norm(weight())
    weights = (torch.linalg.norm(rest(solution, quant)) / torch.linalg.norm(weight())).item()
    if preset != "qlora":
        assert solution.output_errors[solution.kept] == pytest.approx(outputs, rel=1e-5)
        assert solution.errors[solution.kept] == pytest.approx(weights, rel=1e-5)
        assert solution.output_errors[solution.kept] < solution.output_errors[0]
    assert solution.output_errors[solution.kept] == min(solution.output_errors)
    assert len(solution.errors) == len(solution.output_errors) == PRESETS[preset]["steps"] + 1


def test_in_their_metric_the_calibrated_ones_are_better() -> None:
    """On tokens that none of them has seen, at equal bytes."""
    left = {p: min(solved(p, moments_for(p)).output_errors) for p in PRESETS if p != "lq-lora"}
    assert left["qera-full"] < left["qera-diag"] < left["svd"]
    assert left["cloq"] < left["qera-full"]
    assert left["descent"] < min(left["cloq"], left["projq"], left["loftq"])


@presets
def test_with_the_identity_all_metrics_are_one(preset: str) -> None:
    identity = Metric(torch.eye(COLUMNS))
    given = Moments(Metric(torch.ones(COLUMNS), torch.ones(ROWS)), identity, 1)
    given = given if preset == "lq-lora" else Moments(identity, identity, 1)
    own = {**PRESETS[preset], "metric": "weights"}
    ours, plain = solved(preset, given), solve(weight(), QUANT, RANK, SolveSpec(**own), "w")
    assert ours.errors == pytest.approx(plain.errors, rel=2e-3)
    assert ours.errors[ours.kept] == pytest.approx(ours.output_errors[ours.kept], rel=1e-5)


def test_with_the_identity_five_calibrated_steps_are_loftqs() -> None:
    """Codes, factors and errors, by the closed form for a whole H and by the plain SVD."""
    identity = Metric(torch.eye(COLUMNS))
    spec = SolveSpec(steps=5, metric="full", svd="exact")
    ours = solve(weight(), QUANT, RANK, spec, "w", Moments(identity, identity, 1))
    plain = solved("loftq", svd="exact")
    assert ours.errors == pytest.approx(plain.errors, rel=1e-5)
    assert torch.equal(ours.quantized.codes, plain.quantized.codes)
    torch.testing.assert_close(ours.b @ ours.a, plain.b @ plain.a)


def test_a_diagonal_in_full_is_the_diagonal() -> None:
    diagonal = second_moments(1).diagonal().contiguous()
    held = Metric(second_moments(2))
    full = solved("qera-full", Moments(Metric(torch.diag(diagonal)), held, 600))
    assert full.output_errors == pytest.approx(
        solved("qera-diag", Moments(Metric(diagonal), held, 600)).output_errors, rel=1e-5
    )
    by_full = solved("qera-diag", Moments(Metric(second_moments(1)), held, 600))
    by_itself = solved("qera-diag", Moments(Metric(second_moments(1).diagonal()), held, 600))
    assert torch.equal(by_full.b, by_itself.b)


def test_qera_is_the_term_for_nearest_codes() -> None:
    quantized, h = quantize(weight(), QUANT), second_moments(1)
    solution = solved("qera-full", moments_for("qera-full"))
    assert torch.equal(solution.quantized.codes, quantized.codes)
    b, a = best_factors(weight() - dequantize(quantized, QUANT), RANK, Metric(h))
    torch.testing.assert_close(solution.b @ solution.a, b @ a)
    assert solved("eora", moments_for("eora")).errors == solution.errors  # one formula, found twice


def test_cloq_is_the_term_for_codes_with_feedback() -> None:
    quantized, h = feedback(weight(), second_moments(1), QUANT), second_moments(1)
    solution = solved("cloq", moments_for("cloq"))
    assert torch.equal(solution.quantized.codes, quantized.codes)
    b, a = best_factors(weight() - dequantize(quantized, QUANT), RANK, Metric(h))
    torch.testing.assert_close(solution.b @ solution.a, b @ a)


def test_projq_quantizes_the_weight_against_what_the_adapter_leaves() -> None:
    h, quantized = second_moments(1), feedback(weight(), second_moments(1), QUANT)
    trace = []
    for _ in range(PRESETS["projq"]["steps"]):
        b, a = best_factors(weight() - dequantize(quantized, QUANT), RANK, Metric(h))
        trace.append(Metric(h).norm(weight() - dequantize(quantized, QUANT) - b @ a) / Metric(h).norm(weight()))
        quantized = feedback(weight(), deflated(a, h), QUANT)
    solution = solved("projq", moments_for("projq", same=True))
    assert solution.output_errors[1:] == pytest.approx(trace, rel=1e-3)


def test_projq_projects_as_often_as_its_authors_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five times, after a first quantization without: the README of their code says ``--iteration 5``."""
    projected = []
    monkeypatch.setattr(rounding, "deflated", lambda a, h: projected.append(a) or deflated(a, h))
    solved("projq", moments_for("projq"))
    assert len(projected) == 5


def test_lq_lora_begins_with_the_weight_and_alternates_in_fisher_weights() -> None:
    given = moments_for("lq-lora", same=True)
    left, trace = weight(), []
    for _ in range(PRESETS["lq-lora"]["steps"]):
        b, a = best_factors(left, RANK, given.fit)
        quantized = quantize(weight() - b @ a, QUANT)
        left = weight() - dequantize(quantized, QUANT)
        trace.append(given.fit.norm(left - b @ a) / given.fit.norm(weight()))
    solution = solved("lq-lora", given)
    assert solution.output_errors[1:] == pytest.approx(trace, rel=1e-3)
    assert solution.output_errors[solution.kept] == pytest.approx(min(trace), rel=1e-3)


def test_srr_preserves_as_many_directions_as_are_worth_it() -> None:
    metric, seed = Metric(second_moments(1)), tensor_seed(0, "w")
    _, a = preserved(weight(), RANK, metric, "exact", torch.Generator().manual_seed(seed))
    noise = torch.rand(weight().shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    left = []
    for matrix in (weight(), noise):
        squares = torch.linalg.svdvals(metric.whiten(matrix).double()).square()
        left.append([(squares[p:].sum() / squares.sum()).item() for p in range(RANK + 1)])
    k = min(range(RANK + 1), key=lambda k: left[0][k] * left[1][RANK - k])
    assert len(a) == k > 0
    solution = solved("srr", moments_for("srr"), svd="exact")
    assert torch.linalg.matrix_rank(solution.b) == RANK
    assert not torch.equal(solution.quantized.codes, quantize(weight(), QUANT).codes)
    first_b, first_a = best_factors(weight(), k, metric, method="exact")
    quantized = quantize(weight() - first_b @ first_a, QUANT)
    assert torch.equal(solution.quantized.codes, quantized.codes)
    b, a = best_factors(weight() - dequantize(quantized, QUANT), RANK, metric, method="exact")  # all ranks are refitted
    torch.testing.assert_close(solution.b @ solution.a, b @ a)


@pytest.mark.parametrize("scales", ["formula", "fitted"])
@pytest.mark.parametrize("metric", ["full", "weights"])
@pytest.mark.parametrize(
    "quant", [QUANT, QuantSpec(bits=2, code="lloyd", double_quant=True), QuantSpec(bits=3, code="affine")], ids=str
)
def test_descent_only_goes_down(scales: str, metric: str, quant: QuantSpec) -> None:
    """In the metric that it is for; with the identity, the trace of the weights says so too."""
    moments = moments_for("descent", same=True) if metric == "full" else None
    solution = solved("descent", moments, quant, scales=scales, steps=8)
    trace = solution.output_errors or solution.errors
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(trace[1:]))
    assert trace[8] < trace[1]
    assert trace[solution.kept] == trace[8]  # it may have come to rest before


def test_few_tokens_and_dead_features() -> None:
    x = torch.randn(10, COLUMNS, generator=torch.Generator().manual_seed(4))
    x[:, :9] = 0
    few = Metric(x.T @ x / 10)
    for preset in PRESETS:
        diagonal = Metric(x.square().mean(0), torch.zeros(ROWS))
        fit = diagonal if preset == "lq-lora" else few
        solution = solved(preset, Moments(fit, Metric(second_moments(2)), 10))
        assert solution.b.isfinite().all()
        assert solution.a.isfinite().all()
        assert solution.output_errors[solution.kept] <= solution.output_errors[0]


def test_a_few_features_of_enormous_size() -> None:
    """As trained decoders have them; with fewer tokens than features, H in float32 is then far from positive."""
    sizes = torch.full((COLUMNS,), 0.1)
    sizes[:3] = torch.tensor([100.0, 1000.0, 3000.0])
    x = torch.randn(50, COLUMNS, generator=torch.Generator().manual_seed(6)) * sizes
    x[:, 1] += 5 * x[:, 0]
    h = Metric(x.T @ x / len(x))
    for preset in PRESETS:
        fit = Metric(h.columns.diagonal().contiguous(), torch.ones(ROWS)) if preset == "lq-lora" else h
        solution = solved(preset, Moments(fit, h, 50))
        assert solution.output_errors[solution.kept] <= solution.output_errors[0]
        assert solution.a.isfinite().all()


def test_statistics_of_another_matrix_are_refused() -> None:
    wide = Metric(torch.ones(COLUMNS + 1))
    for moments in (Moments(wide, wide, 9), Moments(Metric(torch.ones(COLUMNS), torch.ones(ROWS + 1)), Metric(), 9)):
        with pytest.raises(UsageError, match="do not fit a matrix of shape"):
            solved("lq-lora", moments)


def test_a_matrix_without_moments_is_solved_by_its_weights() -> None:
    for preset in ("qera-full", "qera-diag"):
        assert solved(preset).errors == solved("svd").errors
    assert solved("projq").output_errors == ()


def test_loftq_with_moments_is_measured_by_them_and_not_changed() -> None:
    measured, plain = solved("loftq", moments_for("loftq")), solved("loftq")
    assert measured.errors == pytest.approx(plain.errors, rel=1e-6)
    assert measured.kept == measured.output_errors.index(min(measured.output_errors))


def test_statistics_that_do_not_fit_are_refused() -> None:
    for preset in PRESETS:
        spec = solve_spec(preset)
        check_statistics(spec, moments_for(preset).fit.kind)
        if preset in (*PLAIN, "descent"):
            check_statistics(spec, None)
            continue
        with pytest.raises(UsageError, match="needs statistics"):
            check_statistics(spec, None)
        wrong = "full" if spec.metric == "fisher" else "fisher"
        with pytest.raises(UsageError, match=f"kind {spec.metric}"):
            check_statistics(spec, wrong)


def test_presets_and_what_may_differ_from_them() -> None:
    assert solve_spec("loftq") == SolveSpec()
    assert solve_spec() == solve_spec("fitted")
    assert solve_spec(calibrated=True) == solve_spec("descent")
    assert solve_spec(code="uniform-tensor").scales == "formula"
    assert solve_spec("descent", steps=2, scales="formula").steps == 2
    for words, message in (
        ({"preset": "gptq"}, "preset must be one of"),
        ({"preset": "svd", "steps": 5}, "preset svd has 1 steps"),
        ({"preset": "descent", "order": "svd-first"}, "order svd-first"),
    ):
        with pytest.raises(UsageError, match=message):
            solve_spec(**words)


def test_the_reference_back_end_solves_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = solved("descent", moments_for("descent"))
    monkeypatch.setattr("loftq.solver.rounding.backend", lambda *_: reference)
    plain = solved("descent", moments_for("descent"))
    assert torch.equal(compiled.quantized.codes, plain.quantized.codes)
    assert compiled.output_errors == plain.output_errors
