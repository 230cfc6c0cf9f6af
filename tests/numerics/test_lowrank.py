"""Truncated SVD: exact against Eckart and Young, randomized against exact."""

import pytest
import torch
from torch import Tensor

from loftq.errors import NumericalError
from loftq.numerics import lowrank, truncated_svd


def make(family: str, rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator)
    if family == "flat":
        return normal
    if family == "heavy":  # Student's t with 3 degrees of freedom
        return normal / torch.randn(3, rows, columns, generator=generator).square().mean(0).sqrt()
    u, s, vh = torch.linalg.svd(normal, full_matrices=False)
    k = torch.arange(1, len(s) + 1)
    return u * ((k <= 20).float() if family == "deficient" else k**-0.7) @ vh


SHAPES = [(96, 96), (160, 64), (64, 160)]
FAMILIES = ["flat", "heavy", "decaying", "deficient"]


def distance(matrix: Tensor, b: Tensor, a: Tensor) -> float:
    return torch.linalg.norm(matrix.double() - b.double() @ a.double()).item()


def best_distance(matrix: Tensor, rank: int) -> float:
    """Eckart and Young: the root of the sum of squares of the singular values left out, in float64."""
    return torch.linalg.svdvals(matrix.double())[rank:].square().sum().sqrt().item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_meets_eckart_young(family: str, shape: tuple[int, int]) -> None:
    matrix = make(family, *shape)
    size = torch.linalg.norm(matrix.double()).item()
    for rank in (1, 8, 32, 64):
        b, a = truncated_svd(matrix, rank, method="exact")
        assert b.shape == (shape[0], rank)
        assert a.shape == (rank, shape[1])
        assert b.dtype == a.dtype == torch.float32
        best = best_distance(matrix, rank)
        assert best - 1e-6 * size <= distance(matrix, b, a) <= best * (1 + 1e-6) + 2e-6 * size


@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_singular_values_are_split_evenly(method: str) -> None:
    matrix = make("decaying", 96, 64)
    b, a = truncated_svd(matrix, 8, method=method, generator=torch.Generator().manual_seed(0))
    s = torch.linalg.svdvals(matrix)[:8]
    torch.testing.assert_close(b.T @ b, s.diag(), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(a @ a.T, s.diag(), atol=2e-5, rtol=1e-4)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("family", "rows", "columns"),
    [
        *(("flat", 544, 544), ("heavy", 544, 544), ("decaying", 544, 640), ("deficient", 544, 544)),
        *(("flat", 1024, 288), ("flat", 288, 1024)),
    ],
)
def test_randomized_is_close_to_the_best(family: str, rows: int, columns: int) -> None:
    """One step loses at most 0.1 % of the norm on spectra without any decay; docs/experiments.md has the table."""
    matrix = make(family, rows, columns)
    size = torch.linalg.norm(matrix.double()).item()
    for rank in (8, 24, 48):
        b, a = truncated_svd(matrix, rank, method="randomized", generator=torch.Generator().manual_seed(1))
        best = best_distance(matrix, rank)
        assert distance(matrix, b, a) <= best * 1.001 + 2e-6 * size
        b2, a2 = truncated_svd(matrix, rank, method="randomized", generator=torch.Generator().manual_seed(2), start=a)
        assert distance(matrix, b2, a2) <= distance(matrix, b, a) * (1 + 1e-6) + 2e-6 * size  # a warm start goes on


def test_randomized_repeats_with_its_generator() -> None:
    matrix = make("flat", 200, 160)
    twice = [truncated_svd(matrix, 4, method="randomized", generator=torch.Generator().manual_seed(5)) for _ in "ab"]
    assert all(torch.equal(x, y) for x, y in zip(*twice, strict=True))
    other = truncated_svd(matrix, 4, method="randomized", generator=torch.Generator().manual_seed(6))
    assert not torch.equal(other[0], twice[0][0])


def test_randomized_does_not_touch_the_global_generator() -> None:
    before = torch.get_rng_state()
    truncated_svd(make("flat", 200, 160), 4, method="randomized", generator=torch.Generator().manual_seed(5))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", ["exact", "randomized", "auto"])
def test_degenerate_matrices(method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for matrix in (torch.zeros(40, 30), torch.ones(40, 30), torch.eye(40, 30), torch.randn(40, 1), torch.randn(1, 30)):
        for rank in {1, min(matrix.shape)}:
            b, a = truncated_svd(matrix, rank, method=method, generator=generator)
            best = best_distance(matrix, rank)
            assert distance(matrix, b, a) <= best * (1 + 1e-5) + 2e-6 * torch.linalg.norm(matrix)
            again, _ = truncated_svd(matrix, rank, method=method, generator=generator, start=a)
            assert again.isfinite().all()


def test_randomized_takes_matrices_of_little_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    thin = torch.randn(300, 20, generator=generator) @ torch.randn(20, 200, generator=generator)
    for matrix in (torch.zeros(300, 200), torch.ones(300, 200), torch.eye(300, 200), thin):
        for rank in (1, 3, 20):
            b, a = truncated_svd(matrix, rank, method="randomized", generator=generator)
            # LAPACK in float32: Q of 300 equal columns is orthonormal to 9e-6, gesdd of them leaves 1.4e-5 (torch 2.13)
            room = 3e-5 * torch.linalg.norm(matrix).item()
            assert distance(matrix, b, a) <= best_distance(matrix, rank) * (1 + 1e-4) + room
            again = truncated_svd(matrix, rank, method="randomized", generator=generator, start=a)
            assert distance(matrix, *again) <= distance(matrix, b, a) * (1 + 1e-4) + room


def test_auto_is_exact_for_small_matrices_and_large_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(lowrank, "_krylov", lambda matrix, rank, *_: asked.append(rank) or lowrank._svd(matrix))
    small, large = torch.zeros(512, 512), torch.zeros(512, 520)
    truncated_svd(small, 8)
    assert asked == []
    truncated_svd(large, 8)
    assert asked == [8]
    truncated_svd(large, 200)  # the Krylov space would be all of the matrix
    truncated_svd(large, 200, method="randomized")
    assert asked == [8]


def test_lapack_failing_in_float32_is_tried_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """gesdd can fail to converge, and returns infinities for values near float32's end."""
    matrix = make("flat", 20, 12)
    expected = truncated_svd(matrix, 3, method="exact")
    svd = torch.linalg.svd

    def fails(a: Tensor, **options: bool):
        if a.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return svd(a, **options)

    monkeypatch.setattr(torch.linalg, "svd", fails)
    b, a = truncated_svd(matrix, 3, method="exact")
    torch.testing.assert_close(b @ a, expected[0] @ expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_singular_values_beyond_float32_are_refused(method: str) -> None:
    with pytest.raises(NumericalError, match="finite factors"):
        truncated_svd(torch.full((8, 8), 3e38), 2, method=method)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 1e30])
def test_magnitude_does_not_matter(size: float) -> None:
    """Squares of such values are beyond float32."""
    matrix = make("flat", 300, 300)
    for method in ("exact", "randomized"):
        lost = []
        for scaled in (matrix, matrix * size):
            b, a = truncated_svd(scaled, 8, method=method, generator=torch.Generator().manual_seed(0))
            lost.append(distance(scaled, b, a) / torch.linalg.norm(scaled.double()).item())
        assert lost[1] == pytest.approx(lost[0], rel=1e-5)


def test_large_values_within_float32_are_decomposed() -> None:
    matrix = make("flat", 20, 12) * 1e30  # squares overflow
    b, a = truncated_svd(matrix, 12, method="exact")
    torch.testing.assert_close(b @ a, matrix, rtol=1e-4, atol=1e25)
