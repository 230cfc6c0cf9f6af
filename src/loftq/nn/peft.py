"""LoRA on packed layers: merging, and clear refusals where PEFT would read codes as if they were weights.

PEFT wraps our layers by its ordinary dispatch (they are Linears and Embeddings). Only merging needs a layer of
ours: the merged weight is dense, so it replaces the packed one until it is unmerged.
"""

import functools
from typing import Any

from peft.tuners.lora import layer as lora
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.model import LoraModel
from torch import nn

from loftq.errors import UsageError
from loftq.nn.layers import LoftQEmbedding, LoftQLinear, PackedWeight

READ_NO_WEIGHT = (True, False, "gaussian", "orthogonal")  # initialisations that need no dense weight


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


class LoftQLoraLinear(MergesDense, lora.Linear):
    """LoRA over a :class:`LoftQLinear`. Its name ends in Linear, as PEFT's ``all-linear`` expects."""


class LoftQLoraEmbedding(MergesDense, lora.Embedding):
    """LoRA over a :class:`LoftQEmbedding`."""


def _new_layer(config: LoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module | None:
    """Our LoRA layer for a packed target; None leaves the choice to PEFT."""
    if not isinstance(target, PackedWeight) or kwargs.get("parameter_name"):
        return None
    if config.use_dora:
        raise UsageError("DoRA needs the norms of a dense weight and does not work on a packed one; use_dora=False")
    if config.init_lora_weights not in READ_NO_WEIGHT:
        raise UsageError(
            f"init_lora_weights={config.init_lora_weights!r} reads a dense weight, and this one is packed; use True "
            "(the LoftQ start is loaded from the checkpoint's loftq_init folder)"
        )
    kwargs.pop("parameter_name", None)
    kwargs.pop("device_map", None)
    kwargs.pop("fan_in_fan_out", None)
    if isinstance(target, LoftQEmbedding):
        return LoftQLoraEmbedding(target, adapter_name, config=config, **kwargs)
    return LoftQLoraLinear(target, adapter_name, config=config, **kwargs)


def install() -> None:
    """Let PEFT's LoraModel make our layers and forget the quantization once nothing packed is left."""
    create, unload = LoraModel._create_new_module, LoraModel._unload_and_optionally_merge

    @functools.wraps(create)
    def create_new_module(lora_config, adapter_name, target, **kwargs):  # type: ignore[no-untyped-def]
        ours = _new_layer(lora_config, adapter_name, target, **kwargs)
        return create(lora_config, adapter_name, target, **kwargs) if ours is None else ours

    @functools.wraps(unload)
    def unload_and_optionally_merge(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        model = unload(self, *args, **kwargs)
        quantizer = getattr(model, "hf_quantizer", None)
        packed_left = any(isinstance(m, PackedWeight) for m in model.modules())
        if quantizer is not None and quantizer.quantization_config.quant_method == "loftq" and not packed_left:
            quantizer.remove_quantization_config(model)
        return model

    LoraModel._create_new_module = staticmethod(create_new_module)
    LoraModel._unload_and_optionally_merge = unload_and_optionally_merge
