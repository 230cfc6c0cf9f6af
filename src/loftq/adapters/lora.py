"""PEFT's LoRA layers of a model: which ones can get an initialization, and how it is written into them."""

from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention, ParamWrapper, _ConvNd
from torch import Tensor

from loftq.errors import UsageError, listed, quoted

NO_MATRIX = (MultiheadAttention, ParamWrapper, _ConvNd)  # LoRA on what is no Linear, Conv1D or Embedding


def lora_layers(model: Any, adapter: str) -> tuple[dict[str, LoraLayer], dict[str, str]]:
    """The LoRA layers of ``adapter`` by their names in the base model, and the skipped ones with the reason.

    Raises: UsageError for what is no LoRA adapter, or one whose product is not ``s · B @ A`` on an unmerged base.
    """
    if not isinstance(model, PeftModel):
        raise UsageError(f"wanted a PeftModel, got {type(model).__name__}; call peft.get_peft_model on it first")
    config = model.peft_config.get(adapter)
    if config is None:
        raise UsageError(f"no adapter {quoted(repr(adapter))}; the model has {listed(model.peft_config)}")
    if not isinstance(config, LoraConfig):
        raise UsageError(
            f"adapter {quoted(repr(adapter))} is {type(config).__name__}; only LoRA has such an initialization"
        )
    layers, skipped = {}, {}
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer) or adapter not in layer.r:
            continue
        _refuse(name, layer, adapter)
        if isinstance(layer, NO_MATRIX):
            skipped[name] = f"{type(layer).__name__}: not a Linear, Conv1D or Embedding"
        else:
            layers[name] = layer
    if not layers:
        raise UsageError(f"adapter {quoted(repr(adapter))} has no LoRA layer on a Linear, Conv1D or Embedding")
    return layers, skipped


def _refuse(name: str, layer: Any, adapter: str) -> None:
    if adapter in layer.lora_variant:
        kind = type(layer.lora_variant[adapter]).__name__.removesuffix("Variant")
        raise UsageError(
            f"{quoted(name)}: {kind} multiplies by more than s · B @ A; only plain LoRA has such an initialization"
        )
    if layer.merged:
        raise UsageError(f"{quoted(name)}: an adapter is merged into the base; call unmerge_adapter() first")
    if not layer.scaling[adapter] > 0:
        raise UsageError(f"{quoted(name)}: the scaling is {layer.scaling[adapter]}; set lora_alpha above 0")
    if any(parameter.device.type == "meta" for parameter in factors(layer, adapter)):
        raise UsageError(f"{quoted(name)}: the adapter is on the meta device; load all of the model into memory")


def factors(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """PEFT's own parameters, in the orientation of ``W ≈ Q + s · B @ A``: views of ``B (out, rank)``, ``A (rank, in)``.

    An embedding adds ``(B_e @ A_e).T`` to its table ``(rows, width)``, so that ``B = A_e.T`` and ``A = B_e.T``.
    """
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter].T, layer.lora_embedding_B[adapter].T
    return layer.lora_B[adapter].weight, layer.lora_A[adapter].weight


def write(layer: Any, adapter: str, b: Tensor, a: Tensor) -> None:
    """Put ``B`` and ``A`` into the layer, in the dtype and on the device of its parameters."""
    with torch.no_grad():
        for parameter, value in zip(factors(layer, adapter), (b, a), strict=True):
            parameter.copy_(value)
