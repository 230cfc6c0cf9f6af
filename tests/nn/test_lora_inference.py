"""LoRA on packed layers in inference, by one operator: PEFT's result, and PEFT's own way where it does more."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from loftq.adapters.peft import LoftQLoraLinear
from loftq.kernels import products
from loftq.nn import ops


def adapted(made: Any, **options: Any) -> tuple[Any, LoftQLoraLinear]:
    """A model with two LoRAs that are not zero, the first one active; a layer of it."""
    model = made("llama", bits=2).load()
    config = LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", lora_dropout=0.5, **options)
    model = get_peft_model(model, config)
    model.add_adapter("other", config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(std=0.2)
    layer = next(m for m in model.modules() if isinstance(m, LoftQLoraLinear))
    return model.eval(), layer


def refused(*args: Any) -> None:
    raise AssertionError("went the other way")


@pytest.mark.parametrize("tokens", [1, 3, products.FEW_TOKENS + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_it_computes_what_peft_does(made, dtype, tokens, monkeypatch):
    """Up to the order of additions in float32, and a rounding that falls the other way for it."""
    _, layer = adapted(made)
    x = torch.randn(1, tokens, layer.in_features).to(dtype)
    for active in (["default"], ["default", "other"], ["other", "absent"]):
        layer._active_adapter = active
        wanted = Linear.forward(layer, x)
        with monkeypatch.context() as patched:
            patched.setattr(Linear, "forward", refused)
            got = layer(x)
            got.add_(0)  # no view of what nobody may change
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_adapters_in_half_precision_round_as_peft_does(made, dtype):
    model, layer = adapted(made)
    model.to(dtype)
    x = torch.randn(2, layer.in_features).to(dtype)
    assert torch.equal(layer(x), Linear.forward(layer, x))


def hooked(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)


def with_bias(layer: Any) -> None:
    layer.lora_B["default"].bias = nn.Parameter(torch.ones(layer.out_features))


def replaced(layer: Any) -> None:
    forward = layer.base_layer.forward
    layer.base_layer.forward = lambda x: forward(x) + 1


MORE: dict[str, Callable[[Any], object]] = {
    "dropout": lambda layer: layer.train(),
    "hook on A": lambda layer: hooked(layer.lora_A["default"]),
    "hook on the base": lambda layer: hooked(layer.base_layer),
    "forward replaced": replaced,
    "bias of LoRA": with_bias,
    "merged": lambda layer: layer.merge(),
}


@pytest.mark.parametrize("change", MORE.values(), ids=MORE)
@torch.no_grad()
def test_what_is_more_than_products_goes_by_peft(made, change, monkeypatch):
    _, layer = adapted(made)
    change(layer)
    monkeypatch.setattr(ops, "lora_linear", refused)
    x = torch.randn(2, layer.in_features)
    torch.manual_seed(0)
    got = layer(x)
    torch.manual_seed(0)
    assert torch.equal(got, Linear.forward(layer, x))


def test_training_autocast_and_mixed_batches_go_by_peft(made, monkeypatch):
    model, layer = adapted(made)
    monkeypatch.setattr(ops, "lora_linear", refused)
    x = torch.randn(2, layer.in_features)
    layer(x).sum().backward()
    assert layer.lora_B["default"].weight.grad.any()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        both = layer(x, adapter_names=["default", "__base__"])
        assert torch.equal(both[1], layer.base_layer(x)[1])
        with disable_input_dtype_casting(model):
            layer(x)


@pytest.mark.parametrize("slow", [(), (torch.bfloat16,)], ids=["fast", "slow"])
def test_under_autocast_whatever_the_processor_multiplies(made, slow, monkeypatch):
    """The result and the gradients are those of float32, as exactly as bfloat16 can tell."""
    monkeypatch.setattr("loftq.adapters.peft.SLOW_DTYPES", slow)
    monkeypatch.setattr("loftq.kernels.products.IN_FLOAT32", (torch.float32, *slow))
    _, layer = adapted(made)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x, grad = torch.randn(20, layer.in_features), torch.randn(20, layer.out_features)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            inner = x.clone().requires_grad_()
            y = layer(inner)
        assert y.dtype == (torch.bfloat16 if enabled else torch.float32)
        results.append((y.float(), *torch.autograd.grad(y, (inner, a, b), grad.to(y.dtype))))
    for wanted, got in zip(*results, strict=True):
        assert got.dtype == torch.float32
        assert (got - wanted).norm() < 0.01 * wanted.norm()


@torch.no_grad()
def test_compiled_it_is_one_graph(made):
    _, layer = adapted(made)

    def twice(x: Tensor) -> Tensor:
        return layer(2 * x)

    x = torch.randn(2, layer.in_features)
    compiled = torch.compile(twice, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), twice(x), rtol=1e-5, atol=1e-5)
