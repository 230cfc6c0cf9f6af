"""The half of a step that finds Q: by rounding to nearest, error feedback or descent."""

import torch
from jaxtyping import Float
from torch import Tensor

from loftq.kernels import backend
from loftq.numerics import Downdate, Metric, Quantized, deflated, dequantize
from loftq.spec import QuantSpec, SolveSpec


class Rounding:
    """Finds Q for a given adapter, by ``spec.rounding``.

    =========  ======================================================================================================
    nearest    the codes nearest to ``W − B A`` (LoftQ)
    feedback   ``W − B A`` with error feedback in H (CLoQ, and GPTQ where the adapter is zero)
    shaped     ``W`` with error feedback in H without what the adapter can make up for (ProjQ)
    descent    the same, but improved from step to step by coordinate descent instead of begun again
    =========  ======================================================================================================

    The first three begin anew at every step. Descent cannot raise ``‖(W − Q − B A) H^½‖``, for the best B and A.
    """

    def __init__(self, weight: Float[Tensor, "out in"], quant: QuantSpec, spec: SolveSpec, metric: Metric) -> None:
        self._kernels, self._weight, self._quant = backend(weight.device, quant), weight, quant
        self._kind, self._fitted = spec.rounding, spec.scales == "fitted"
        if self._kind == "feedback" and metric.columns is None:
            self._kind = "nearest"
        h = metric.columns if metric.columns is not None else torch.ones(weight.shape[1], device=weight.device)
        if h.ndim == 1 and (self._kind == "shaped" or quant.codebook.form == "trellis"):
            h = torch.diag(h)  # descent over blocks needs no more than a diagonal
        self._h = None if self._kind == "nearest" else h

    def first(self, target: Tensor) -> tuple[Quantized, Tensor]:
        """The first Q of a target, and ``W − Q``."""
        return self._round(target, self._h, None, None)

    def next(self, quantized: Quantized, b: Tensor, a: Tensor, out: Tensor) -> tuple[Quantized, Tensor]:
        """The Q of the next step, and ``W − Q``.

        Args:
            quantized: Q of the step before.
            out: ``W − Q`` of that; its memory takes the result.
        """
        if self._kind in ("nearest", "feedback"):
            return self._round(torch.addmm(self._weight, b, a, alpha=-1, out=out), self._h, out, quantized)
        assert self._h is not None
        h = deflated(a, self._h)
        if self._kind == "shaped":
            assert not isinstance(h, Downdate)
            return self._round(self._weight, h, out, None)
        quantized = self._kernels.descend(self._weight, quantized, h, self._quant, fitted=self._fitted, residual=out)
        return quantized, out

    def _round(
        self, target: Tensor, h: Tensor | None, out: Tensor | None, earlier: Quantized | None
    ) -> tuple[Quantized, Tensor]:
        if h is None or h.ndim == 1:  # no column can make up for what another leaves
            return self._kernels.quantize_residual(
                target, self._weight, self._quant, out, fitted=self._fitted, earlier=earlier
            )
        quantized = self._kernels.feedback(target, h, self._quant, fitted=self._fitted)
        return quantized, self._residual(quantized, out)

    def _residual(self, quantized: Quantized, out: Tensor | None) -> Tensor:
        return torch.sub(self._weight, dequantize(quantized, self._quant), out=out)
