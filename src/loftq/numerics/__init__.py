"""Tensor in, tensor out: code books, blockwise quantization, bit packing, truncated SVD.

Plain torch, written to be read: this is the oracle that every faster path is compared with.
"""

from loftq.codes import levels, normal_float
from loftq.numerics.blockwise import (
    Quantized,
    decode_rows,
    fit_scales,
    nearest,
    scale_and_zero,
    store_scales,
)
from loftq.numerics.codebooks import dynamic_8bit
from loftq.numerics.fitting import fitted_scales
from loftq.numerics.forms import decode, dequantize, descend, encode, feedback, quantize
from loftq.numerics.lowrank import truncated_svd
from loftq.numerics.metric import (
    ENOUGH,
    Downdate,
    Metric,
    Moments,
    best_factors,
    deflated,
    towards_diagonal,
)
from loftq.numerics.norms import frobenius, product_square
from loftq.numerics.orientation import SWAPPED, oriented, oriented_shape
from loftq.numerics.packing import pack, packed_shape, unpack
