"""The error of a matrix for every way to quantize it and every rank of the adapter.

From one quantization and one decomposition follow the errors of all ranks: with ``E = W - Q`` and the singular values
``σ`` of ``M = G^½ E T``, whose Frobenius norm is the norm of E in the metric,

    min ‖E - BA‖² = ‖M‖² - Σ_{i ≤ r} σ_i²

This is the error after one step. More steps leave less, of all ways to quantize much alike.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from loftq.kernels import backend
from loftq.numerics import Metric, frobenius, truncated_svd
from loftq.solver.loftq import checked, fitting, tensor_seed
from loftq.spec import QuantSpec, SolveSpec, check_solver


def errors_by_rank(
    weight: Float[Tensor, "out in"],
    quants: Sequence[QuantSpec],
    ranks: Sequence[int],
    spec: SolveSpec,
    name: str = "",
    metric: Metric | None = None,
) -> dict[QuantSpec, list[float]]:
    """``min ‖W - Q - BA‖² / ‖W‖²`` in the metric, for every way to quantize and every rank.

    With ``steps = 0`` the adapter is zero, so that rank does not matter. A matrix of zeros has no error.

    Args:
        metric: the Frobenius norm if not given.
        spec, name: as :func:`loftq.solver.solve` takes them.

    Raises: UsageError for a rank or scales that do not fit; NumericalError for values that are not finite.
    """
    weight = checked(weight, max(ranks))
    metric = Metric() if metric is None else fitting(metric, weight)
    whole = metric.norm(weight) ** 2
    found, residual = {}, None
    for quant in quants:
        check_solver(quant, spec)
        _, residual = backend(weight.device, quant).quantize_residual(
            weight, weight, quant, residual, fitted=spec.scales == "fitted"
        )
        error = metric.whiten(residual)
        left = frobenius(error) ** 2
        if spec.steps and left:
            gone = _largest_squares(error, max(ranks), spec, name).cpu().cumsum(0)  # CUDA's is not deterministic
            squares = [max(left - gone[rank - 1].item(), 0.0) for rank in ranks]
        else:
            squares = [left] * len(ranks)
        found[quant] = [square / whole if whole else 0.0 for square in squares]
    return found


def _largest_squares(matrix: Tensor, rank: int, spec: SolveSpec, name: str) -> Tensor:
    """Squares of the largest singular values, descending, float64; each factor carries their roots."""
    generator = torch.Generator("cpu").manual_seed(tensor_seed(spec.seed, name))
    b, _ = truncated_svd(matrix, rank, method=spec.svd, generator=generator)
    return torch.linalg.vector_norm(b, dim=0, dtype=torch.float64) ** 4
