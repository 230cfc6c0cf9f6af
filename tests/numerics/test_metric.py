"""The closed form in a metric: Eckart and Young, two routes to one formula, and what rank deficiency does to it."""

import math

import pytest
import torch
from torch import Tensor

from loftq.errors import NumericalError
from loftq.numerics import Metric, best_factors, deflated, truncated_svd

ROWS, COLUMNS, RANK = 40, 56, 6


def error(seed: int = 0) -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))


def second_moments(tokens: int = 400, seed: int = 1) -> Tensor:
    """Of inputs with a decaying spectrum and features of very different size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(COLUMNS, COLUMNS, generator=generator) * torch.logspace(0, -2, COLUMNS)
    x = torch.randn(tokens, COLUMNS, generator=generator) @ mixing
    return (x.T @ x / tokens).double()


def gradients() -> Tensor:
    return torch.rand(ROWS, generator=torch.Generator().manual_seed(2)) + 0.1


METRICS = {
    "weights": Metric(),
    "diagonal": Metric(second_moments().diagonal()),
    "full": Metric(second_moments()),
    "fisher": Metric(second_moments().diagonal(), gradients()),
    "rows": Metric(None, gradients()),
    "full and rows": Metric(second_moments(), gradients()),
    "few tokens": Metric(second_moments(tokens=9)),
}
metrics = pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)


@metrics
@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_no_term_of_this_rank_is_closer(metric: Metric, method: str) -> None:
    b, a = best_factors(error(), RANK, metric, method=method, generator=torch.Generator().manual_seed(0))
    tail = torch.linalg.svdvals(metric.whiten(error()).double())[RANK:].square().sum().sqrt().item()
    assert metric.norm(error() - b @ a) == pytest.approx(tail, rel=1e-3 if method == "randomized" else 1e-4, abs=1e-5)
    norms = torch.linalg.vector_norm(b, dim=0), torch.linalg.vector_norm(a, dim=1)
    torch.testing.assert_close(*norms, rtol=1e-4, atol=1e-6)  # balanced


@metrics
def test_the_norm_is_that_of_the_formula(metric: Metric) -> None:
    h = torch.eye(COLUMNS) if metric.columns is None else metric.columns
    h = (torch.diag(h) if h.ndim == 1 else h).double()
    g = torch.ones(ROWS) if metric.rows is None else metric.rows
    square = torch.einsum("m,mi,ij,mj->", g.double(), error().double(), h, error().double())
    assert metric.norm(error()) == pytest.approx(math.sqrt(square), rel=1e-5)


def test_by_the_symmetric_root_it_is_the_same() -> None:
    """QERA's route: [E H^½]_r H^-½."""
    h = second_moments()
    values, vectors = torch.linalg.eigh(h)
    root = (vectors * values.sqrt()) @ vectors.T
    b, a = truncated_svd((error().double() @ root).float(), RANK, method="exact")
    theirs = (b @ a).double() @ torch.linalg.inv(root)
    b, a = best_factors(error(), RANK, Metric(h), method="exact")
    torch.testing.assert_close((b @ a).double(), theirs, rtol=1e-3, atol=1e-4)


def test_one_metric_said_in_several_ways() -> None:
    plain = truncated_svd(error(), RANK, method="exact")
    product = plain[0] @ plain[1]
    diagonal = second_moments().diagonal()
    pairs = [
        (Metric(torch.eye(COLUMNS)), product),
        (Metric(torch.ones(COLUMNS)), product),
        (Metric(None, torch.full((ROWS,), 3.0)), product),
        (Metric(torch.diag(diagonal)), torch.mm(*best_factors(error(), RANK, Metric(diagonal), method="exact"))),
    ]
    for metric, expected in pairs:
        b, a = best_factors(error(), RANK, metric, method="exact")
        torch.testing.assert_close(b @ a, expected, rtol=1e-4, atol=1e-4)


@metrics
def test_without_row_weights_the_term_is_no_longer_than_the_error(metric: Metric) -> None:
    """It is an orthogonal projection: a longer one would be a numerical failure."""
    b, a = best_factors(error(), RANK, metric)
    assert b.isfinite().all()
    assert a.isfinite().all()
    if metric.rows is None:
        assert torch.linalg.norm(b @ a) <= torch.linalg.norm(error()) * (1 + 1e-5)


def test_dead_features_and_dead_outputs() -> None:
    h, g = second_moments(), gradients()
    h[:5], h[:, :5], g[3] = 0, 0, 0
    b, a = best_factors(error(), RANK, Metric(h, g))
    assert b.isfinite().all()
    assert a.isfinite().all()
    nothing = best_factors(error(), RANK, Metric(torch.zeros(COLUMNS, COLUMNS)))
    assert not torch.mm(*nothing).any()


def test_what_is_no_second_moment_is_refused() -> None:
    for broken in (-second_moments(), second_moments() * math.nan):
        with pytest.raises(NumericalError, match="second moments"):
            best_factors(error(), RANK, Metric(broken))


@pytest.mark.parametrize("tokens", [400, 30])
def test_beyond_is_what_tokens_lose_by_projection(tokens: int) -> None:
    """ProjQ's form: the cached inputs without their part in the row space of E X."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, COLUMNS, generator=generator).double() @ torch.diag(torch.logspace(0, -1, COLUMNS).double())
    _, _, vh = torch.linalg.svd(error().double() @ x.T, full_matrices=False)
    rest = x - vh[:RANK].T @ (vh[:RANK] @ x)
    _, a = best_factors(error(), RANK, Metric(x.T @ x / tokens), method="exact")
    torch.testing.assert_close(deflated(a, x.T @ x / tokens), rest.T @ rest / tokens, rtol=1e-3, atol=1e-5)


def test_in_beyond_a_matrix_is_as_long_as_with_its_best_term() -> None:
    """min over B of the norm of E - B A: least squares, solved here for all rows."""
    h = second_moments()
    _, a = best_factors(error(1), RANK, Metric(h))  # of another error: any A will do
    root = torch.linalg.cholesky(h)
    b = torch.linalg.lstsq((a.double() @ root).T, (error().double() @ root).T).solution.T
    best = Metric(h).norm((error().double() - b @ a.double()).float())
    square = torch.einsum("mi,ij,mj->", error().double(), deflated(a, h), error().double()).item()
    assert math.sqrt(square) == pytest.approx(best, rel=1e-4)
