"""The packed products: as accurate as dense ones, whatever the shape, and gradients through the layers."""

from collections.abc import Iterator

import pytest
import torch
from backends import Backend, backend, interpreted, stored
from torch import Tensor

import loftq.kernels
from loftq.kernels import gpu_products, products, reference
from loftq.nn.layers import LoftQEmbedding, LoftQLinear
from loftq.numerics import levels, unpack
from loftq.numerics.blockwise import scale_and_zero
from loftq.spec import BITS, QuantSpec

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PRODUCTS = ("linear", "linear_grad_input")
SPECS = (
    QuantSpec(bits=2),
    QuantSpec(bits=3, code="affine", block_size=7),
    QuantSpec(bits=4, double_quant=True),
    QuantSpec(bits=8, code="uniform", scale_dtype="float16", block_size=1000),
    QuantSpec(bits=4, code="uniform-tensor"),
)


def exact_weight(tensors: dict[str, Tensor], spec: QuantSpec, columns: int) -> Tensor:
    """The weight in float64, from the format's formula."""
    scale, zero = (None if t is None else t.double() for t in scale_and_zero(tensors))
    assert scale is not None
    values = levels(spec.code, spec.bits).double()[unpack(tensors["weight"], spec.bits, columns).int()]
    block = torch.arange(columns) // (columns if spec.code == "uniform-tensor" else spec.block_size)
    return (values - (0 if zero is None else zero[:, block])) * scale[:, block]


def assert_accurate(got: Tensor, x: Tensor, exact: Tensor, dense: Tensor, factor: float = 2) -> None:
    """Against float64, the error is at most twice that of the dense product in the same dtype.

    In float32, where all error is the order of additions, four times: BLAS adds in blocks, a kernel along its tile.
    Where a sum is one term, the dense product can be exact by luck; then two roundings are allowed.
    """
    factor = 4 if x.dtype == torch.float32 else factor
    oracle = x.double() @ exact
    plain = (x.to(dense.device) @ dense).cpu().double()
    lucky = torch.finfo(x.dtype).eps * oracle.norm() if len(exact) == 1 else 0
    assert got.dtype == x.dtype
    assert got.shape == plain.shape
    assert (got.double() - oracle).norm() <= max(factor * (plain - oracle).norm(), lucky)


def check(
    kernels: Backend, product: str, spec: QuantSpec, shape: tuple[int, int], x: Tensor, factor: float = 2
) -> None:
    tensors = stored(spec, *shape)
    exact = exact_weight(tensors, spec, shape[1])
    exact = exact if product == "linear_grad_input" else exact.T
    dense = reference.dequantize(tensors, spec, shape[1], x.dtype)
    dense = (dense if product == "linear_grad_input" else dense.T).to(kernels.device)
    assert_accurate(kernels(product, x, tensors, spec, shape[1]), x, exact, dense, factor)


@pytest.mark.sampled(7)
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.bits}-{s.code}")
def test_few_tokens(kernels: Backend, spec: QuantSpec, dtype: torch.dtype, product: str) -> None:
    features = 37 if product == "linear_grad_input" else 72
    check(kernels, product, spec, (37, 72), torch.randn(4, features).to(dtype))


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_tokens(kernels: Backend, dtype: torch.dtype, product: str) -> None:
    tokens = max(products.FEW_TOKENS, gpu_products.FEW_TOKENS) + 1
    features = 130 if product == "linear_grad_input" else 200
    check(kernels, product, SPECS[1], (130, 200), torch.randn(tokens, features).to(dtype))


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("own", [False, True])
def test_with_and_without_products_in_16_bits(
    own: bool, dtype: torch.dtype, product: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A processor without them multiplies in float32."""
    monkeypatch.setattr(products, "IN_FLOAT32", (torch.float32,) if own else DTYPES)
    features = 130 if product == "linear_grad_input" else 200
    tokens = torch.randn(3, products.FEW_TOKENS, features).to(dtype)
    check(backend("cpu"), product, SPECS[1], (130, 200), tokens, factor=1.2)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 72), (37, 1), (130, 200)], ids=str)
def test_odd_shapes(kernels: Backend, shape: tuple[int, int], product: str) -> None:
    """One row, one column, several tiles; tokens in more than one axis, not contiguous, none at all, no batch."""
    features = shape[0] if product == "linear_grad_input" else shape[1]
    result = shape[1] if product == "linear_grad_input" else shape[0]
    spec = QuantSpec(bits=3, block_size=24)
    check(kernels, product, spec, shape, torch.randn(features, 3, 2).permute(2, 1, 0))
    tensors = stored(spec, *shape)
    none = kernels(product, torch.empty(2, 0, features), tensors, spec, shape[1])
    assert none.shape == (2, 0, result)
    one = torch.randn(features)
    torch.testing.assert_close(
        kernels(product, one, tensors, spec, shape[1]), kernels(product, one[None], tensors, spec, shape[1])[0]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [2, 70])
def test_a_bias(kernels: Backend, tokens: int, dtype: torch.dtype) -> None:
    """Added before the result is rounded, as in a dense layer; its own dtype may be another."""
    spec = QuantSpec(bits=2)
    tensors, x, bias = stored(spec, 37, 72), 20 * torch.randn(tokens, 72).to(dtype), torch.randn(37).bfloat16()
    got = kernels("linear", x, tensors, spec, 72, bias)
    as_column = torch.cat([x, torch.ones(tokens, 1).to(dtype)], 1)
    exact = torch.cat([exact_weight(tensors, spec, 72), bias.double()[:, None]], 1).T
    dense = torch.cat([reference.dequantize(tensors, spec, 72, dtype), bias.to(dtype)[:, None]], 1).T
    dense = dense.to(kernels.device)
    assert_accurate(got, as_column, exact, dense, factor=1.2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 6])
def test_adapters_beside_it(kernels: Backend, tokens: int, dtype: torch.dtype) -> None:
    """As added to the rounded product, up to the order of additions in float32."""
    spec, bias = QuantSpec(bits=2), torch.randn(37)
    tensors, x = stored(spec, 37, 72), torch.randn(tokens, 72).to(dtype)
    adapters = [(torch.randn(5, 72), torch.randn(37, 5), 0.1), (torch.randn(2, 72), torch.randn(37, 2), 2.0)]
    alone = kernels("linear", x, tensors, spec, 72, bias)
    for some in (adapters[:1], adapters, []):
        got = kernels("linear", x, tensors, spec, 72, bias, some)
        tolerance = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(got, reference.add_adapters(alone, x, some), rtol=tolerance, atol=8 * tolerance)


@pytest.mark.parametrize("product", PRODUCTS)
def test_split_sums(product: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs that walk through several tiles, and many whose parts add up in float32, and are rounded once."""
    gpu = backend("interpreted")
    features = 260 if product == "linear_grad_input" else 520
    for programs in (1, 6, 512):
        monkeypatch.setattr(gpu_products, "PROGRAMS", programs)
        check(gpu, product, QuantSpec(bits=2), (260, 520), torch.randn(17, features).bfloat16(), factor=1.2)


def test_other_dtypes_go_through_the_dense_weight(kernels: Backend) -> None:
    spec = QuantSpec(bits=4)
    tensors, x = stored(spec, 37, 72), torch.randn(2, 72).double()
    wanted = x @ reference.dequantize(tensors, spec, 72, torch.float64).T
    torch.testing.assert_close(kernels("linear", x, tensors, spec, 72), wanted)


@pytest.fixture(params=["reference", "cpu", "interpreted"])
def behind_the_operators(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """CPU tensors meet each of the back ends behind the operators."""
    module = interpreted().__name__ if request.param == "interpreted" else f"loftq.kernels.{request.param}"
    monkeypatch.setitem(loftq.kernels.MODULES, "cpu", module)
    loftq.kernels._load.cache_clear()
    yield
    loftq.kernels._load.cache_clear()


@pytest.mark.usefixtures("behind_the_operators")
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_a_layer(bits: int, dtype: torch.dtype) -> None:
    spec = QuantSpec(bits=bits, block_size=24, double_quant=bits == 3)
    tensors = stored(spec, 37, 72)
    layer = LoftQLinear(72, 37, True, spec, dtype=dtype)
    layer.load_stored(tensors)
    assert layer.bias is not None
    torch.nn.init.normal_(layer.bias)
    dense = torch.nn.Linear(72, 37, dtype=dtype)
    dense.weight, dense.bias = torch.nn.Parameter(layer.dequantize(dtype)), torch.nn.Parameter(layer.bias.detach())
    x = torch.randn(2, 3, 72, dtype=dtype)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    grad = torch.randn(2, 3, 37, dtype=dtype)
    layer(mine).backward(grad)
    dense(theirs).backward(grad)
    assert mine.grad is not None
    assert dense.bias.grad is not None
    exact, ones = exact_weight(tensors, spec, 72), torch.ones(2, 3, 1, dtype=dtype)
    assert_accurate(mine.grad, grad, exact, dense.weight.detach())
    torch.testing.assert_close(layer.bias.grad, dense.bias.grad)
    with_bias = torch.cat([dense.weight, dense.bias[:, None]], 1).detach().T  # the bias as one more column
    exact_with_bias = torch.cat([exact, layer.bias.detach().double()[:, None]], 1).T
    assert_accurate(layer(x).detach(), torch.cat([x, ones], -1), exact_with_bias, with_bias)


@pytest.mark.usefixtures("behind_the_operators")
def test_an_embedding_layer() -> None:
    spec = QuantSpec(bits=3)
    layer = LoftQEmbedding(37, 72, spec, dtype=torch.bfloat16)
    layer.load_stored(stored(spec, 37, 72))
    indices = torch.randint(37, (2, 5))
    assert torch.equal(layer(indices), layer.dequantize(torch.bfloat16)[indices])
