"""LoRA on packed stacks of experts: PEFT's ``target_parameters``, without the dense stacks that it would read.

PEFT adds ``s · B_e @ A_e`` to all experts before each call. Here the factors go along with the call, and only experts
that tokens are routed to use them. What is stored, and all else, is PEFT's.
"""

import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora import layer as lora
from torch import Tensor, nn

from loftq.nn.experts import PackedExperts, StackFactors, repack_experts, unpack_experts
from loftq.patching import patches


class ParamWrapper(lora.ParamWrapper):
    """LoRA over one stack of a :class:`PackedExperts`. PEFT nests wrappers that have this name, and no others."""

    def get_param(self) -> Tensor:
        """The dense stack; where it is packed, its shape and dtype."""
        experts: Any = self.get_base_layer()
        if not isinstance(experts, PackedExperts):
            return super().get_param()
        bank = experts.banks[self.parameter_name]
        return torch.empty(bank.dense_shape, dtype=experts.compute_dtype, device="meta")

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        experts: Any = self.get_base_layer()
        device = experts.get_parameter(self.parameter_name).device
        for factors in (self.lora_A, self.lora_B):
            if adapter_name in factors and factors[adapter_name].weight.device.type != "meta":
                factors[adapter_name] = factors[adapter_name].to(device)

    def forward(self, x: Tensor, *args: Any, lora: Any = None, **kwargs: Any) -> Tensor:
        """As PEFT's; ``lora`` is what wrappers further out add to other stacks of the same experts."""
        given = {} if lora is None else {"lora": lora}
        if self.disable_adapters or self.merged or not isinstance(self.get_base_layer(), PackedExperts):
            return super().forward(x, *args, **given, **kwargs)
        self._check_forward_args(x, *args, **kwargs)
        mine = [self._factors(name) for name in self.active_adapters if name in self.lora_A]
        return self.base_layer(x, *args, lora={**(lora or {}), self.parameter_name: mine}, **kwargs)

    def _factors(self, adapter: str) -> StackFactors:
        """A lies expert after expert, B rank after rank; of reversed stacks they are our B.T and A.T."""
        factors: Any = self.lora_A[adapter], self.lora_B[adapter]
        a, b = (linear.weight for linear in factors)
        a = a.reshape(self.num_experts, -1, a.shape[1])
        b = b.reshape(len(b), -1, self.num_experts).permute(2, 0, 1)
        experts: Any = self.get_base_layer()
        a, b = (b.transpose(1, 2), a.transpose(1, 2)) if experts.is_reversed else (a, b)
        return StackFactors(a, b, self.scaling[adapter])

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> Tensor:
        experts: Any = self.get_base_layer()
        if not isinstance(experts, PackedExperts):
            return super().get_delta_weight(adapter_name, *args, **kwargs)
        a, b, s = self._factors(adapter_name)
        delta = s * b @ a
        return delta.transpose(1, 2) if experts.banks[self.parameter_name].transposed else delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """PEFT's, into dense stacks that take the places of all packed ones; :meth:`unmerge` puts these back."""
        experts: Any = self.get_base_layer()
        if isinstance(experts, PackedExperts):
            experts.__dict__["_packed"] = unpack_experts(experts, experts.compute_dtype)
            experts.__dict__["_merged"] = set()
        try:
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
        finally:
            self._restore()

    def unmerge(self) -> None:
        super().unmerge()
        self._restore()

    def _restore(self) -> None:
        """Pack the stacks again if none of them has anything merged into it."""
        experts: Any = self.get_base_layer()
        merged: set[str] = experts.__dict__.get("_merged", set())
        (merged.add if self.merged else merged.discard)(self.parameter_name)
        if not merged and "_packed" in experts.__dict__:
            del experts.__dict__["_merged"]
            repack_experts(experts, experts.__dict__.pop("_packed"))

    def unload_and_optionally_merge_module(self, *args: Any, **kwargs: Any) -> nn.Module:
        experts = super().unload_and_optionally_merge_module(*args, **kwargs)
        for name in ("_packed", "_merged"):
            experts.__dict__.pop(name, None)
        return experts

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ParamWrapper":
        """The packed experts that wait for :meth:`unmerge` move along."""
        twin = self.base_layer.__dict__.get("_packed")
        if twin is not None:
            twin._apply(fn, recurse)
        return super()._apply(fn, recurse)


def take_ranks_of_stacks(lora_model: Any) -> None:
    """Silence PEFT's warning about ranks of stacks: it applies them, but looks for their names among modules only.

    Args:
        lora_model: PEFT's ``LoraModel``.
    """

    @patches(lora_model, "inject_adapter")
    def inject_adapter(inject: Any, self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        endings = tuple(f".{target}" for target in getattr(config, "target_parameters", None) or ())
        ranks = getattr(config, "rank_pattern", None) or {}
        stacks = sorted(key for key in ranks if endings and f".{key}".endswith(endings))
        with warnings.catch_warnings():
            if stacks:
                warnings.filterwarnings("ignore", f".*rank_pattern keys did not match.*: {re.escape(str(stacks))}")
            inject(self, model, adapter_name, *args, **kwargs)


def wrapper_of(model: nn.Module, stack: str) -> Any:
    """PEFT's layer over a stack, by the name of its Parameter; None if it has none."""
    owner, _, name = stack.rpartition(".")
    layer: Any = model.get_submodule(owner)
    while isinstance(layer, lora.ParamWrapper):
        if layer.parameter_name == name:
            return layer
        layer = layer.base_layer
    return None
