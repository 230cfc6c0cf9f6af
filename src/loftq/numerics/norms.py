"""Norms of matrices, without copies in another dtype, and without overflow of squares in float32."""

import math

import torch
from torch import Tensor


def frobenius(matrix: Tensor) -> float:
    """Frobenius norm: rows in float32, their sum in float64; all in float64 if squares leave float32's range."""
    rows = torch.linalg.vector_norm(matrix, dim=1, dtype=torch.promote_types(matrix.dtype, torch.float32))
    norm = torch.linalg.vector_norm(rows.double()).item()
    return norm if 1e-12 < norm < math.inf else torch.linalg.vector_norm(matrix, dtype=torch.float64).item()


def product_square(b: Tensor, a: Tensor) -> float:
    """``||B A||_F²`` from the factors' Gram matrices, in float64, without the product."""
    b, a = b.double(), a.double()
    return ((b.T @ b) * (a @ a.T)).sum().item()
