"""Try an adapter on a few packed layers, to see whether it works, before the model is changed.

PEFT has some forty tuners, and more with every release. Many only add to what a layer computes, and do not care how it
holds its weight; others read the weight, or train a copy, and would take codes for weights. Which is which is not
asked of a list. The tuner is put on one packed layer of every kind that it is meant for, and on its dense twin; outputs
and gradients of the two must be equal.
"""

import copy
import warnings
from contextvars import ContextVar
from typing import Any

import torch
from peft.tuners.lora.config import LoraConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils.integrations import skip_init_on_device
from torch import Tensor, nn

from loftq.errors import LoftqError, UsageError, quoted
from loftq.nn.experts import PackedExperts
from loftq.nn.layers import LoftQEmbedding, LoftQLinear, Packed, PackedWeight, has_packed
from loftq.numerics.device import seeded
from loftq.patching import inside, patches

NOT_TRIED = ("modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication")
TOLERANCE = 1e-3  # of the largest value; codes in the place of weights are off by more than 1, rounding by 1e-6
ROWS = 3  # inputs of a trial

# Whether new tuners are not tried: those of a trial, and one that was tried already.
_settled: ContextVar[bool] = ContextVar("settled", default=False)

Result = dict[str, Tensor]  # outputs, gradients by parameter, and what the tuner keeps


def install() -> None:
    """Try every tuner of PEFT before it changes a model: when it is made, and when it gets another adapter."""

    @patches(BaseTuner, "__init__")
    def checked(make, self, model, peft_config, adapter_name, *args, **kwargs):  # type: ignore[no-untyped-def]
        if not _settled.get():
            config = peft_config[adapter_name] if isinstance(peft_config, dict) else peft_config
            nn.Module.__init__(self)
            self.model = model
            check_tuner(self, config, model)
        with inside(_settled):
            make(self, model, peft_config, adapter_name, *args, **kwargs)

    @patches(BaseTuner, "inject_adapter")
    def inject_adapter(inject, self, model, adapter_name, *args, **kwargs):  # type: ignore[no-untyped-def]
        if not _settled.get():
            check_tuner(self, self.peft_config[adapter_name], model)
        inject(self, model, adapter_name, *args, **kwargs)


@skip_init_on_device  # low_cpu_mem_usage=True makes the adapter without storage, and the trial needs values
def check_tuner(tuner: BaseTuner, config: Any, model: nn.Module) -> None:
    """UsageError if the tuner does not work over a packed layer that ``config`` names, or wraps a block of them.

    What fails over a dense layer too is left to PEFT, which has its own words for it.
    """
    _refuse_parameters(config, model)
    layers = _targets(tuner, config, model)
    if not layers:
        return
    found: dict[str, Result] = {}
    failure: Exception | None = None
    try:
        found = _try(tuner, config, {name: _packed_twin(layer) for name, layer in layers.items()})
    except LoftqError:
        raise
    except Exception as e:  # whatever a tuner does with codes
        failure = e
    try:
        wanted = _try(tuner, config, {name: _dense_twin(layer) for name, layer in layers.items()})
    except Exception:
        return
    wrong = [name for name in layers if failure is not None or not _equal(found[name], wanted[name])]
    if wrong:
        raise UsageError(
            f"{type(config).__name__} with these options needs a dense weight, and {quoted(wrong[0])} is packed at "
            f"{layers[wrong[0]].spec.bits} bits; use plain LoRA, or call dequantize() on the model first"
        ) from failure


def _targets(tuner: BaseTuner, config: Any, model: nn.Module) -> dict[str, Any]:
    """One packed layer of every kind and width that the tuner would wrap, the smallest, by its name."""
    config = _plain(config)
    try:
        config = tuner._prepare_adapter_config(config, tuner.get_model_config(model))
        config = _maybe_include_all_linear_layers(config, model)
    except ValueError:  # no target modules: PEFT says so
        return {}
    if getattr(config, "target_modules", None) is None:
        return {}
    found: dict[tuple[type, float], tuple[str, Any]] = {}
    inside = ""
    for name, module in model.named_modules():
        if not name or (inside and name.startswith(inside)) or not tuner._check_target_module_exists(config, name):
            continue
        layer: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if isinstance(module, BaseTunerLayer):
            inside = f"{name}."
        if not isinstance(layer, PackedWeight):
            _refuse_block(config, name, layer)
        elif layer.weight.device.type != "meta":
            kind = (type(layer), layer.spec.bits)
            if kind not in found or layer.weight_count < found[kind][1].weight_count:
                found[kind] = name, layer
    return dict(found.values())


def _refuse_parameters(config: Any, model: nn.Module) -> None:
    """UsageError if ``config`` names a tensor of a packed layer as a parameter to adapt.

    LoRA may name stacks of experts; not with dropout, which would have to come between the input and each expert.
    """
    wanted = tuple(f".{name}" for name in getattr(config, "target_parameters", None) or ())
    for name, module in model.named_modules() if wanted else ():
        stacks = module.stacks if isinstance(module, PackedExperts) and isinstance(config, LoraConfig) else []
        for own in module._parameters if isinstance(module, Packed) else ():
            parameter = f"{name.replace('.base_layer', '')}.{own}"
            if not f".{parameter}".endswith(wanted):
                continue
            if own in stacks and config.lora_dropout:
                raise UsageError(
                    f"lora_dropout is {config.lora_dropout}: PEFT has no dropout for stacks of experts, such "
                    f"as {parameter}; set it to 0"
                )
            if own not in stacks and not own.endswith("_bias"):
                raise UsageError(f"target_parameters names {parameter}, and its layer is packed; use target_modules")


def _refuse_block(config: Any, name: str, block: nn.Module) -> None:
    if has_packed(block):
        raise UsageError(
            f"{type(config).__name__} would wrap {quoted(name)}, a {type(block).__name__} of packed layers, and may "
            "read their weights; name layers in target_modules, or call dequantize() on the model first"
        )


def _plain(config: Any) -> Any:
    config = copy.deepcopy(config)
    for field in NOT_TRIED:
        if hasattr(config, field):
            setattr(config, field, None)
    if getattr(config, "init_lora_weights", None) == "loftq":  # the initialization comes later, and reads no weight
        config.init_lora_weights = True
    return config


def _try(tuner: BaseTuner, config: Any, layers: dict[str, nn.Module]) -> dict[str, Result]:
    """Outputs and gradients of ``layers`` under a tuner of the same class, all its parameters moved off their start."""
    model = nn.Module()
    for name, layer in layers.items():
        _place(model, name, layer)
    devices = [parameter.device for parameter in model.parameters()]  # device_map may spread them
    with inside(_settled), seeded(0, devices), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = type(tuner)(model, {"trial": _plain(config)}, "trial").train()  # type: ignore[arg-type]
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
        results = {}
        for name, layer in layers.items():
            tuned.zero_grad()
            output = tuned.model.get_submodule(name)(_inputs(layer))
            (output * torch.randn_like(output)).sum().backward()
            gradients = {f"gradient {n}": p.grad.clone() for n, p in tuned.named_parameters() if p.grad is not None}
            results[name] = {"output": output.detach(), **gradients, **_kept(tuned)}
    return results


def _kept(tuned: nn.Module) -> Result:
    """The tuner's own tensors: one in the dtype of codes is rounded to nothing, where a dense layer has fractions."""
    everything = (*tuned.named_parameters(), *tuned.named_buffers())
    return {name: tensor.detach() for name, tensor in everything if "base_layer" not in name}


def _place(model: nn.Module, name: str, layer: nn.Module) -> None:
    *path, leaf = name.split(".")
    for part in path:
        if part not in model._modules:
            model.add_module(part, nn.Module())
        model = model.get_submodule(part)
    model.add_module(leaf, layer)


def _inputs(layer: Any) -> Tensor:
    device = layer.weight.device
    if isinstance(layer, nn.Embedding):
        return torch.arange(ROWS, device=device) % layer.num_embeddings
    columns = getattr(layer, "in_features", None) or layer.weight.shape[0]  # a Conv1D holds (in, out)
    return torch.randn(1, ROWS, columns, device=device)


def _dense_twin(layer: Any) -> nn.Module:
    return copy.deepcopy(layer.to_dense(torch.float32))  # its bias may be the layer's own


def _packed_twin(layer: Any) -> PackedWeight:
    """A layer of the same values, in float32, that shares nothing with this one: a tuner may write into it."""
    stored = {name: tensor.detach().clone() for name, tensor in zip(layer.layout(), layer.stored, strict=True)}
    device = layer.weight.device
    if isinstance(layer, LoftQEmbedding):
        shape = (layer.num_embeddings, layer.embedding_dim)
        twin: Any = LoftQEmbedding(*shape, layer.spec, layer.padding_idx, device, torch.float32)
    else:
        bias = layer.bias is not None
        twin = LoftQLinear(layer.in_features, layer.out_features, bias, layer.spec, device, torch.float32, layer.conv1d)
        if bias:
            twin.bias = nn.Parameter(layer.bias.detach().float().clone())
    twin.load_stored(stored)
    return twin


def _equal(found: Result, wanted: Result) -> bool:
    return found.keys() == wanted.keys() and all(_close(found[name], wanted[name]) for name in wanted)


def _close(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.numel() == 0 or not a.is_floating_point():
        return torch.equal(a, b)
    return bool((a - b).abs().max() <= TOLERANCE * b.abs().max())
