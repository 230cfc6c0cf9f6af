"""LoRA on packed layers: merging, and clear refusals where PEFT would read codes as if they were weights.

PEFT wraps our layers by its ordinary dispatch (they are Linears and Embeddings). Only merging needs a layer of
ours: the merged weight is dense, so it replaces the packed one until it is unmerged.
"""

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora import layer as lora
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from loftq.adapters import guard, initialization
from loftq.adapters.experts import ParamWrapper, take_ranks_of_stacks
from loftq.errors import UsageError
from loftq.nn import ops
from loftq.nn.experts import PackedExperts
from loftq.nn.hf import forget_unpacked
from loftq.nn.layers import LoftQEmbedding, LoftQLinear, Packed, PackedWeight, has_packed
from loftq.numerics.machine import SLOW_DTYPES
from loftq.patching import patches

READ_NO_WEIGHT = (True, False, "gaussian", "eva")  # initialisations that need no dense weight


PLAIN = (LoftQLinear, nn.Linear, nn.Identity, nn.Dropout)


def _is_plain(module: nn.Module) -> bool:
    """Whether calling the module is its class's ``forward`` and no more: no hook, and no other ``forward`` put over."""
    held = module.__dict__
    hooked = held["_forward_hooks"] or held["_forward_pre_hooks"] or "forward" in held
    return type(module) in PLAIN and not hooked


class MergesDense:
    """Merging for a LoRA layer over a packed one. A mixin of the two layers below."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put ``decode(Q) + s·BA`` in the place of the packed weight; :meth:`unmerge` puts the packed one back."""
        packed = self.base_layer  # type: ignore[attr-defined]
        if isinstance(packed, (LoftQLinear, LoftQEmbedding)):
            self.base_layer = packed.to_dense(packed.compute_dtype)
            self.__dict__["_packed"] = packed
        try:
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)  # type: ignore[misc]
        finally:
            self._restore()

    def unmerge(self) -> None:
        super().unmerge()  # type: ignore[misc]
        self._restore()

    def _restore(self) -> None:
        if not self.merged and "_packed" in self.__dict__:  # type: ignore[attr-defined]
            self.base_layer = self.__dict__.pop("_packed")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MergesDense":
        """The packed layer that waits for :meth:`unmerge` moves along."""
        if "_packed" in self.__dict__:
            self.__dict__["_packed"]._apply(fn, recurse)
        return super()._apply(fn, recurse)  # type: ignore[misc]


class LoftQLoraLinear(MergesDense, lora.Linear):
    """LoRA over a :class:`LoftQLinear`. Its name ends in Linear, as PEFT's ``all-linear`` expects."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fan_in_fan_out = self.base_layer.conv1d  # of the dense weight to merge into, whatever the config says

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's; in inference by one operator, for PEFT's own take as long as the product of a small layer.

        Under autocast to a dtype that this CPU has no fast products in, the adapter is multiplied in its own.
        """
        dtype = ops.autocast_dtype(x)
        if dtype in SLOW_DTYPES and x.device.type == "cpu" and self.cast_input_dtype_enabled:
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.to(dtype), *args, **kwargs)
        usual = torch.is_grad_enabled() or torch.compiler.is_compiling() or dtype is not None
        factors = None if usual or args or kwargs else self._factors()
        if factors is None:
            return super().forward(x, *args, **kwargs)
        base: Any = self.base_layer
        return ops.lora_linear(x, *base.operands, *factors)

    def _factors(self) -> tuple[list[Tensor], list[Tensor], list[float]] | None:
        """A, B and scaling of the active adapters; None where a call does more than to multiply by them and add."""
        found: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
        if (
            self.merged_adapters
            or self.lora_variant
            or not self.cast_input_dtype_enabled
            or not _is_plain(self.base_layer)
        ):
            return None
        lora_a, lora_b, dropouts = self.lora_A, self.lora_B, self.lora_dropout
        for name in () if self._disable_adapters else self.active_adapters:
            if name not in lora_a:
                continue
            a, b, dropout = lora_a[name], lora_b[name], dropouts[name]
            drops = dropout.training and type(dropout) is not nn.Identity
            if drops or b.bias is not None or not (_is_plain(a) and _is_plain(b) and _is_plain(dropout)):
                return None
            for values, value in zip(found, (a.weight, b.weight, self.scaling[name]), strict=True):
                values.append(value)
        return found


class LoftQLoraEmbedding(MergesDense, lora.Embedding):
    """LoRA over a :class:`LoftQEmbedding`."""


def _new_layer(config: LoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module | None:
    """Our LoRA layer for a packed target; None leaves the choice to PEFT."""
    name = kwargs.pop("parameter_name", None)
    kwargs.pop("device_map", None)
    experts = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if isinstance(experts, PackedExperts) and name in experts.banks:
        return ParamWrapper(target, adapter_name, parameter_name=name, config=config, **kwargs)
    if not isinstance(target, PackedWeight):
        return None
    if isinstance(target, LoftQEmbedding):
        return LoftQLoraEmbedding(target, adapter_name, config=config, **kwargs)
    return LoftQLoraLinear(target, adapter_name, config=config, **kwargs)


def _refuse(config: LoraConfig, target: nn.Module) -> None:
    """UsageError for an adapter that would read, or change, the dense weight that a packed layer does not have."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if not isinstance(base, Packed):
        return
    if config.use_dora:
        raise UsageError("DoRA needs the norms of a dense weight and does not work on a packed one; use_dora=False")
    if getattr(config, "kasa_config", None) is not None:  # PEFT has it since 0.21
        raise UsageError("KaSA truncates a dense weight and does not work on a packed one; kasa_config=None")
    if config.init_lora_weights not in READ_NO_WEIGHT:
        raise UsageError(
            f"init_lora_weights={config.init_lora_weights!r} reads a dense weight, and this one is packed; use "
            "'loftq', the initialization in the checkpoint's loftq_init folder, or True"
        )


def _refuse_merging(tuner: BaseTuner) -> None:
    """UsageError before anything is merged that cannot be.

    That is layers over packed ones that are not ours: IA3 would multiply 8-bit codes, others fail. And a bias of LoRA
    where the layer, and the class that would load it merged, has none.
    """
    layers: list[Any] = [m for m in tuner.model.modules() if isinstance(m, BaseTunerLayer)]
    layers = [m for m in layers if isinstance(m.get_base_layer(), Packed)]
    if not all(isinstance(layer, (MergesDense, ParamWrapper)) for layer in layers):
        raise UsageError(
            f"{type(tuner).__name__} cannot be merged into packed layers; only LoRA can. "
            "Call dequantize() on the model it wraps first"
        )
    if any(any(layer.lora_bias.values()) and getattr(layer.get_base_layer(), "bias", None) is None for layer in layers):
        raise UsageError(
            "lora_bias=True cannot be merged into layers without a bias; keep the adapter beside the model, or train "
            "it with lora_bias=False"
        )


def install(_: Any = None) -> None:
    """Let PEFT's LoRA make our layers, refuse what cannot work on them, and forget merged ones."""
    guard.install()
    initialization.install()
    initialization.take_start(LoraModel)
    initialization.ask_for_no_quantizer()
    take_ranks_of_stacks(LoraModel)

    @patches(LoraModel, "_create_and_replace")
    def create_and_replace(replace, self, lora_config, adapter_name, target, *args, **kwargs):  # type: ignore[no-untyped-def]
        _refuse(lora_config, target)
        replace(self, lora_config, adapter_name, target, *args, **kwargs)

    @patches(LoraModel, "_create_new_module")
    def create_new_module(create, lora_config, adapter_name, target, **kwargs):  # type: ignore[no-untyped-def]
        ours = _new_layer(lora_config, adapter_name, target, **kwargs)
        return create(lora_config, adapter_name, target, **kwargs) if ours is None else ours

    @patches(BaseTuner, "_unload_and_optionally_merge")
    def unload_and_optionally_merge(unload, self, *args, **kwargs):  # type: ignore[no-untyped-def]
        model = unload(self, *args, **kwargs)
        forget_unpacked(model)
        return model

    @patches(BaseTuner, "_check_merge_allowed")
    def check_merge_allowed(check, self):  # type: ignore[no-untyped-def]
        _refuse_merging(self)
        check(self)

    @patches(BaseTuner, "_get_module_names_tied_with_embedding")
    def names_tied_with_embedding(tied, self):  # type: ignore[no-untyped-def]
        try:
            return tied(self)
        except NotImplementedError:  # transformers knows no table of words in this class: nothing is tied to one
            if not has_packed(self.model):
                raise
            return []
