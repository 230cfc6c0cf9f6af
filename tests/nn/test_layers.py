"""One packed layer: what it computes, what it keeps for backward, how it moves, copies and saves."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from loftq.errors import UsageError
from loftq.nn import ops
from loftq.nn.layers import LoftQEmbedding, LoftQLinear, can_pack, pack_like, replace_module
from loftq.numerics import decode, encode, quantize
from loftq.spec import QuantSpec
from models import same

SPECS = [
    QuantSpec(bits=2),
    QuantSpec(bits=3, block_size=16, scale_dtype="float32"),
    QuantSpec(bits=4, double_quant=True),
    QuantSpec(bits=8, scale_dtype="float16"),
    QuantSpec(bits=4, code="affine"),
    QuantSpec(bits=3, code="uniform"),
    QuantSpec(bits=3, code="lloyd"),
    QuantSpec(bits=2, code="lloyd", double_quant=True),
    QuantSpec(bits=2, code="uniform-tensor", scale_dtype="float32"),
]
EACH = pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.code}{s.bits}{'dq' if s.double_quant else ''}")
COLUMNS, ROWS = 72, 20


def linear(spec=SPECS[0], bias=True, columns=COLUMNS, rows=ROWS):
    """A packed layer, and the dense weight it stands for."""
    layer = LoftQLinear(columns, rows, bias, spec)
    layer.load_stored(encode(quantize(torch.randn(rows, columns), spec), spec))
    if bias:
        nn.init.normal_(layer.bias)
    return layer, decode(dict(layer.named_parameters()), spec, columns)


def embedding(spec=SPECS[0], rows=30, columns=COLUMNS, **options):
    layer = LoftQEmbedding(rows, columns, spec, **options)
    layer.load_stored(encode(quantize(torch.randn(rows, columns), spec), spec))
    return layer, decode(dict(layer.named_parameters()), spec, columns)


def rounding(x, weight):
    """What two orders of a float32 sum may differ by: a few roundings of its largest possible partial sum."""
    sizes = x.detach().abs() @ weight.abs().T
    return 4 * torch.finfo(torch.float32).eps * sizes.max().item() if sizes.numel() else 0.0


@pytest.mark.sampled(5)
@EACH
@pytest.mark.parametrize("shape", [(COLUMNS,), (3, COLUMNS), (2, 3, COLUMNS), (0, COLUMNS)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_backward_are_those_of_the_decoded_weight(spec, shape, bias):
    layer, weight = linear(spec, bias)
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    atol = rounding(x, weight)
    assert_close(y, F.linear(x, weight, layer.bias), rtol=1e-6, atol=atol)
    wanted = [x, layer.bias] if bias else [x]
    got = torch.autograd.grad(y.square().sum(), wanted)
    room = 1e-5 + 2 * atol * max(1.0, weight.abs().sum(0).max().item())  # an output enters the gradient as 2 y W
    assert_close(got, torch.autograd.grad(F.linear(x, weight, layer.bias).square().sum(), wanted), rtol=2e-6, atol=room)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(COLUMNS,), (3, COLUMNS), (2, 3, COLUMNS)], ids=str)
def test_the_result_may_be_changed_in_place(shape, dtype):
    layer, weight = linear()
    layer.to(dtype)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    y = layer(x)
    y += 1
    y.mul_(2).sum().backward()
    assert_close(x.grad, (2 * weight.sum(0)).to(dtype).expand(shape), rtol=2e-2, atol=2e-2)
    table, _ = embedding()
    looked_up = table(torch.tensor([[1, 2]])).requires_grad_()  # as enable_input_require_grads does
    (looked_up * 1).add_(1).sum().backward()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("columns", [1, 7, 63, 64, 65, 128, 130])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_any_width_of_the_input(columns, bits):
    layer, weight = linear(QuantSpec(bits=bits), columns=columns, rows=3)
    x = torch.randn(2, columns)
    assert_close(layer(x), F.linear(x, weight, layer.bias), rtol=1e-6, atol=rounding(x, weight))


@EACH
def test_embedding_looks_up_decoded_rows(spec):
    layer, table = embedding(spec, padding_idx=0)
    words = torch.tensor([[3, 0, 29], [3, 3, 7]])
    assert torch.equal(layer(words), table[words])
    assert layer(words[:0]).shape == (0, 3, COLUMNS)
    assert torch.equal(layer(torch.tensor(5)), table[5])
    for index in (-1, 30):
        with pytest.raises((IndexError, RuntimeError), match="out of range"):
            layer(torch.tensor([2, index]))


@pytest.mark.parametrize(
    "spec", [s if s in SPECS[:3] else pytest.param(s, marks=pytest.mark.slow) for s in SPECS], ids=str
)
def test_operators_keep_their_contract(spec):
    """Of another code only shapes and dtypes are others."""
    layer, _ = linear(spec)
    x, grad = torch.randn(3, COLUMNS, requires_grad=True), torch.randn(3, ROWS, requires_grad=True)
    key = ops.spec_key(spec)
    less = {} if spec in SPECS[:3] else {"test_utils": ("test_schema", "test_faketensor")}
    check = functools.partial(torch.library.opcheck, **less)
    check(ops.linear, (x, layer.stored, key, COLUMNS, layer.bias))
    check(ops.linear, (x, layer.stored, key, COLUMNS, None))
    check(ops.linear_grad_input, (grad, layer.stored, key, COLUMNS))
    check(ops.dequantize, (layer.stored, key, COLUMNS, torch.float32))
    lora = [torch.randn(2, COLUMNS)], [torch.randn(ROWS, 2)], [0.5]
    check(ops.lora_linear, (x.detach(), layer.stored, key, COLUMNS, layer.bias.detach(), *lora))
    check(ops.lookup, (torch.tensor([[1, 2]]), layer.stored, key, COLUMNS, torch.bfloat16))


def test_second_derivatives():
    layer, weight = linear()
    weight, bias = weight.double(), layer.bias.detach().double()
    x = torch.randn(3, COLUMNS, requires_grad=True)
    (first,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    other = x.detach().double().requires_grad_()
    (first,) = torch.autograd.grad(F.linear(other, weight, bias).pow(3).sum(), other, create_graph=True)
    (wanted,) = torch.autograd.grad(first.square().sum(), other)
    assert_close(second.double(), wanted, rtol=1e-4, atol=1e-2)


@EACH
def test_nothing_dense_is_kept_for_backward(spec):
    layer, _ = linear(spec)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(3, COLUMNS, requires_grad=True))
    stored = {t.data_ptr() for t in layer.stored}
    assert kept
    assert {t.data_ptr() for t in kept} == stored


@EACH
@pytest.mark.parametrize(
    "convert",
    [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double(), lambda m: m.to("cpu", torch.float16)],
    ids=["bfloat16", "half", "double", "to"],
)
def test_no_conversion_touches_what_is_stored(spec, convert):
    for layer, _ in (linear(spec), embedding(spec)):
        before = {n: t.clone() for n, t in layer.state_dict().items() if n != "bias"}
        model = convert(nn.Sequential(layer))
        after = {n: t for n, t in layer.state_dict().items() if n != "bias"}
        assert same(before, after)
        assert layer.compute_dtype == (
            layer.bias.dtype if isinstance(layer, LoftQLinear) else layer(torch.tensor([1])).dtype
        )
        assert not any(p.requires_grad for n, p in model[0].named_parameters() if n != "bias")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_result_has_the_dtype_of_the_input(dtype):
    layer, weight = linear()
    layer.to(dtype)
    x = torch.randn(3, COLUMNS, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    exact = F.linear(x.double(), weight.double(), layer.bias.double())
    plain = F.linear(x, weight.to(dtype), layer.bias)
    assert (y.double() - exact).abs().max() <= (plain.double() - exact).abs().max()


def test_autocast_computes_in_its_dtype_and_keeps_the_gradient_of_the_input():
    layer, weight = linear()
    x = torch.randn(3, COLUMNS, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == F.linear(x, weight, layer.bias).dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert_close(x.grad, weight.sum(0).expand(3, -1), rtol=0.02, atol=0.1)


@EACH
def test_copies_are_equal_and_independent(spec):
    for (layer, _), x in ((linear(spec), torch.randn(2, COLUMNS)), (embedding(spec), torch.tensor([1, 2]))):
        wanted = layer(x)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert same(twin.state_dict(), layer.state_dict())
            twin.weight.data.zero_()
            assert torch.equal(layer(x), wanted)


def test_replicas_compute_the_same():
    """As ``nn.DataParallel`` makes them on two GPUs: with tensors as plain attributes, and no Parameters."""
    for (layer, _), x in ((linear(), torch.randn(2, COLUMNS)), (embedding(), torch.tensor([1, 2]))):
        replica = layer._replicate_for_data_parallel()
        for name, parameter in layer.named_parameters():
            setattr(replica, name, parameter.detach())
        assert torch.equal(replica(x), layer(x))


@EACH
def test_a_state_dict_loads_into_an_empty_layer(spec):
    for layer, _ in (linear(spec), embedding(spec)):
        like = nn.Linear(COLUMNS, ROWS) if isinstance(layer, LoftQLinear) else nn.Embedding(30, COLUMNS)
        empty = pack_like(like, spec, device="meta").to_empty(device="cpu")
        empty.load_state_dict(layer.state_dict())
        assert same(empty.state_dict(), layer.state_dict())
        assert list(empty.state_dict()) == list(layer.state_dict())


def test_widened_scales_compute_the_same_and_are_saved_as_they_were():
    layer, _ = linear()
    x, wanted, before = torch.randn(2, COLUMNS), None, layer.state_dict()
    wanted = layer(x)
    layer.weight_scale.data = layer.weight_scale.data.float()  # as PEFT's prepare_model_for_kbit_training does
    assert torch.equal(layer(x), wanted)
    assert same(layer.state_dict(), before)


@pytest.mark.parametrize(
    ("spec", "name", "dtype"),
    [
        (SPECS[1], "weight_scale", torch.bfloat16),
        (SPECS[3], "weight_scale", torch.bfloat16),
        (SPECS[2], "weight_scale_mean", torch.float16),
        (SPECS[0], "weight", torch.float32),
    ],
)
def test_rounded_or_cast_tensors_are_refused(spec, name, dtype):
    layer, _ = linear(spec)
    layer.get_parameter(name).data = layer.get_parameter(name).data.to(dtype)
    with pytest.raises(UsageError, match=rf"{name} of a packed layer is {dtype}, stored as .*scale_dtype='bfloat16'"):
        layer(torch.randn(2, COLUMNS))


def test_dense_twins_are_exact():
    layer, weight = linear()
    dense = layer.to_dense(torch.float32)
    assert torch.equal(dense.weight, weight)
    assert torch.equal(dense.bias, layer.bias)
    layer.conv1d = True
    dense = layer.to_dense(torch.float32)
    assert isinstance(dense, Conv1D)
    assert torch.equal(dense.weight, weight.T)
    assert torch.equal(dense.bias, layer.bias)
    table, values = embedding(padding_idx=3)
    assert torch.equal(table.to_dense(torch.float32).weight, values)
    assert table.to_dense(torch.bfloat16).weight.dtype == torch.bfloat16
    assert table.to_dense(torch.float32).padding_idx == 3


def test_a_dense_twin_draws_no_random_numbers():
    layer, _ = linear()
    before = torch.get_rng_state()
    layer.to_dense(torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dense", [nn.Linear(6, 4, bias=False), Conv1D(4, 6), nn.Embedding(4, 6)], ids=repr)
def test_a_packed_layer_has_the_shape_of_the_one_it_replaces(dense):
    model = nn.ModuleDict({"a": dense}).eval()
    assert can_pack(dense)
    replace_module(model, "a", pack_like(dense, SPECS[0]))
    assert model["a"].weight.shape == (4, 2)
    assert not model["a"].training
    assert isinstance(model["a"], nn.Embedding if isinstance(dense, nn.Embedding) else nn.Linear)


def test_others_cannot_be_packed():
    assert not can_pack(nn.LayerNorm(3))
    assert not can_pack(nn.Conv1d(3, 3, 1))


def test_a_layer_prints_what_it_is():
    assert repr(linear(QuantSpec(bits=3))[0]) == (
        "LoftQLinear(in_features=72, out_features=20, bias=True, bits=3, code=nf, block_size=64)"
    )
    assert repr(embedding()[0]) == "LoftQEmbedding(30, 72, bits=2, code=nf, block_size=64)"


def test_compiled_in_one_graph_it_computes_the_same():
    layer, _ = linear()
    table, _ = embedding()
    x, words = torch.randn(3, COLUMNS, requires_grad=True), torch.tensor([[1, 2]])
    model = nn.Sequential(table, layer)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(words), model(words))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    compiled(x).square().sum().backward()
    grad, x.grad = x.grad, None
    layer(x).square().sum().backward()
    assert torch.equal(grad, x.grad)


def test_on_the_meta_device_it_has_a_shape():
    layer = LoftQLinear(72, 40, False, QuantSpec(bits=2), device="meta", dtype=torch.float32)
    assert layer(torch.empty(3, 72, device="meta")).shape == (3, 40)
