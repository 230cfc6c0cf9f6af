"""The matrix of a frozen layer is that which its forward multiplies with."""

import pytest
import torch
from bases import BASES, OnlyForward, bitsandbytes
from torch import nn
from transformers.pytorch_utils import Conv1D

from loftq.adapters.convert import pack_like
from loftq.errors import UsageError
from loftq.frozen.layers import dequantized
from loftq.numerics import encode, quantize
from loftq.spec import QuantSpec


def forward_in_training(layer, x):
    """Without the bias, on inputs that have a gradient, as between other layers."""
    out = layer.train()(x.requires_grad_())
    return out if layer.bias is None else out - layer.bias


@pytest.mark.parametrize("base", [b for b in BASES if "int8" not in b])
def test_bitsandbytes_four_bits(source, base):
    model = bitsandbytes(source, **BASES[base])
    layer = model.model.layers[0].mlp.up_proj
    assert type(layer).__name__ == "Linear4bit"
    assert layer.weight.quant_state.nested == (base == "nested")
    weight = dequantized(layer)
    assert weight.shape == (96, 64)
    assert weight.dtype == torch.float32
    x = torch.randn(5, 64)
    if "bfloat16" in base:
        assert torch.equal(weight, weight.bfloat16().float()), "the product is in bfloat16"
        x = x.bfloat16()
        assert torch.equal(forward_in_training(layer, x), nn.functional.linear(x, weight.bfloat16()))
    else:
        assert torch.equal(forward_in_training(layer, x), nn.functional.linear(x, weight))


def test_bitsandbytes_four_bits_after_an_evaluation(source):
    """On some CPUs bitsandbytes repacks the weight then, and rounds its scales; what it then uses is what counts."""
    layer = bitsandbytes(source, **BASES["nf4"]).model.layers[0].mlp.up_proj
    before = dequantized(layer)
    with torch.no_grad():
        layer.eval()(torch.zeros(1, 64))
    after, x = dequantized(layer), torch.randn(5, 64)
    assert (after - before).norm() < 0.01 * before.norm()
    with torch.no_grad():
        assert (layer(x) - x @ after.T).norm() < 0.01 * (x @ after.T).norm()


def test_bitsandbytes_int8_without_the_rounding_of_inputs(source):
    model = bitsandbytes(source, load_in_8bit=True)
    layer, dense = model.model.layers[0].mlp.up_proj, {}
    for moment in ("before", "after"):
        dense[moment] = dequantized(layer)
        forward_in_training(layer, torch.randn(5, 64).half())
    assert torch.equal(dense["before"], dense["after"])
    one = torch.eye(64)[3:4]  # exact in 8 bits
    torch.testing.assert_close(layer(one.half()).float(), dense["after"][:, 3][None], rtol=2e-3, atol=1e-5)
    scales = layer.state.SCB
    assert torch.equal((dense["after"] * 127 / scales[:, None]).round().to(torch.int8), layer.weight.data)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("spec", [QuantSpec(bits=2), QuantSpec(bits=3, code="affine", double_quant=True)])
def test_a_packed_layer_multiplies_by_what_it_decodes(spec):
    dense = nn.Linear(40, 24)
    layer = pack_like(dense, spec)
    layer.load_stored(encode(quantize(dense.weight.detach(), spec), spec))
    layer.bias = dense.bias
    x = torch.randn(3, 40)
    torch.testing.assert_close(layer(x) - layer.bias, x @ dequantized(layer).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dense_layers_give_their_own_weight(dtype):
    linear, conv, table = nn.Linear(6, 4).to(dtype), Conv1D(4, 6).to(dtype), nn.Embedding(9, 5).to(dtype)
    assert torch.equal(dequantized(linear), linear.weight.float())
    assert torch.equal(dequantized(conv), conv.weight.float().T)
    assert torch.equal(dequantized(table), table.weight.float())


@pytest.mark.parametrize("columns", [40, 1500])
def test_any_layer_by_its_forward(columns):
    """To the bit, though only half precision is allowed and the bias is a thousand times as large as the weights."""
    dense = nn.Linear(columns, 24)
    nn.init.normal_(dense.bias, std=100)
    layer = OnlyForward(dense)
    bias = layer.bias.clone()
    assert torch.equal(dequantized(layer), layer.exact())
    assert torch.equal(layer.bias, bias)
    assert layer.read == columns + 1


def test_a_subclass_of_linear_with_a_forward_of_its_own():
    class Doubling(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    layer = Doubling(6, 4)
    assert torch.equal(dequantized(layer), 2 * layer.weight)


def test_refusals():
    with pytest.raises(UsageError, match="offloaded"):
        dequantized(nn.Linear(6, 4, device="meta"))
    with pytest.raises(UsageError, match="in_features"):
        dequantized(nn.LayerNorm(4))
    broken = OnlyForward(nn.Linear(6, 4))
    broken.scales = broken.scales.float()  # its kernel then gets float32
    bias = broken.bias.clone()
    with pytest.raises(UsageError, match=r"OnlyForward does not run on cpu in torch\.float32: a kernel of half"):
        dequantized(broken)
    assert torch.equal(broken.bias, bias)


def test_not_quantized_yet():
    bnb = pytest.importorskip("bitsandbytes")
    with pytest.raises(UsageError, match="not quantized yet"):
        dequantized(bnb.nn.Linear4bit(64, 32))
    with pytest.raises(UsageError, match="not quantized yet"):
        dequantized(bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False))
