"""Check that an adapter is placed on every module that it was made for."""

import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

from torch import nn

from loftq.errors import InputError, listed, quoted
from loftq.nn.layers import has_packed
from loftq.patching import inside, patches

_filled: ContextVar[bool] = ContextVar("filled", default=False)


def keep_real_targets(conversion: Any) -> None:
    """Let PEFT rename only those targets that name no linear layer.

    For models with fused experts, PEFT takes every target that ends in ``gate_proj``, ``up_proj`` or ``down_proj`` for
    an expert of old and turns it into a target parameter. Shared experts and dense layers have linear layers of these
    names. A target of several parts (``mlp.gate_proj``) that ends the name of a linear layer means that layer.

    Args:
        conversion: the module ``peft.utils.transformers_weight_conversion``.
    """

    @patches(conversion, "convert_peft_config_for_transformers")
    def convert_the_others(convert: Any, peft_config: Any, model: nn.Module, conversions: Any) -> None:
        targets: Any = getattr(peft_config, "target_modules", None)
        real = set() if targets is None or isinstance(targets, str) else _real(targets, model)
        if not real:
            return convert(peft_config, model, conversions)
        peft_config.target_modules = set(targets or ()) - real
        convert(peft_config, model, conversions)
        others: Any = peft_config.target_modules
        peft_config.target_modules = real | set(others)

    _keep_placed_keys(conversion)


def _keep_placed_keys(conversion: Any) -> None:
    """Let PEFT rename an adapter's weights only if no layer has their present name.

    PEFT takes transformers' patterns for checkpoints of old, and they fit names of today too: ``mlp.shared_expert.``,
    where the dot is any letter, makes ``mlp.shared_experts..up_proj`` of ``mlp.shared_experts.up_proj``.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    @patches(conversion, "convert_peft_adapter_state_dict_for_transformers")
    def convert_the_others(
        convert: Any, model: Any, peft_config: Any, adapter_state_dict: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        layers = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
        bare = {name.removeprefix("base_model.model.") for name in layers}
        placed = {key: value for key, value in adapter_state_dict.items() if module_of(key) in bare}
        others = {key: value for key, value in adapter_state_dict.items() if key not in placed}
        return placed | convert(model, peft_config, others, *args, **kwargs)


def _real(targets: Iterable[str], model: nn.Module) -> set[str]:
    """The targets of several parts that end the name of a linear layer, one with an adapter included."""
    dotted = {target for target in targets if "." in target}
    found: set[str] = set()
    for name, module in model.named_modules() if dotted else ():
        if isinstance(getattr(module, "base_layer", module), nn.Linear):
            parts = name.split(".")
            found.update(dotted.intersection(".".join(parts[i:]) for i in range(len(parts))))
    return found


def filled_from_elsewhere() -> AbstractContextManager[None]:
    """Context in which a new adapter needs no initialization: its values come from a file or from the solver."""
    return inside(_filled)


def is_filled_from_elsewhere() -> bool:
    return _filled.get()


def rename_targets(config: Any, model: Any) -> None:
    """Let an adapter from a file name modules as this class does, where its weights are renamed on loading too."""
    mapping: dict[str, str] = model.__dict__.get("_checkpoint_conversion_mapping") or {}
    for pattern, new in mapping.items():
        for field in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
            names = getattr(config, field, None)
            if isinstance(names, dict):
                setattr(config, field, {re.sub(pattern, new, name): value for name, value in names.items()})
            elif isinstance(names, (list, set, tuple)):
                setattr(config, field, {re.sub(pattern, new, name) for name in names})


def check_loading(peft_model: Any) -> None:
    """Let ``PeftModel`` refuse LoRA weights that are not all there, or not all placed, on a packed model.

    PEFT warns of the first, and says nothing of the second; either way the model is another one than was meant.

    Args:
        peft_model: the module ``peft.peft_model``.
    """
    model_class = peft_model.PeftModel

    @patches(model_class, "from_pretrained")
    def from_pretrained_in_full(from_pretrained: Any, cls: Any, *args: Any, **kwargs: Any) -> Any:
        with filled_from_elsewhere():
            return from_pretrained(cls, *args, **kwargs)

    @patches(model_class, "load_adapter")
    def load_adapter_in_full(
        load_adapter: Any, self: Any, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> Any:
        with filled_from_elsewhere():
            result = load_adapter(self, model_id, adapter_name, *args, **kwargs)
        missing = _of_adapter(result.missing_keys, adapter_name)
        mixed = not hasattr(self, "get_base_model")  # a PeftMixedModel, which calls this method of PeftModel
        model = self.base_model.model if mixed else self.get_base_model()
        check_placed(model, model_id, missing, result.unexpected_keys)
        return result


def load_in_mixed_models(mixed_model: Any) -> None:
    """Let ``PeftMixedModel`` know that an adapter from a file needs no initialization.

    Args:
        mixed_model: the module ``peft.mixed_model``.
    """

    @patches(mixed_model.PeftMixedModel, "from_pretrained")
    def from_pretrained_as_filled(from_pretrained: Any, cls: Any, *args: Any, **kwargs: Any) -> Any:
        with filled_from_elsewhere():
            return from_pretrained(cls, *args, **kwargs)


def check_loading_into(integration: Any) -> None:
    """Let ``model.load_adapter`` of transformers refuse the same; it only logs what is missing.

    Args:
        integration: the module ``transformers.integrations.peft``.
    """

    @patches(integration.PeftAdapterMixin, "load_adapter")
    def load_adapter(
        load: Any, self: Any, peft_model_id: Any = None, adapter_name: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        with filled_from_elsewhere():
            found = load(self, peft_model_id, adapter_name, *args, **kwargs)
        if found is not None:
            missing = _of_adapter(found.missing_keys, adapter_name or "default")
            check_placed(self, peft_model_id or "the adapter", missing, found.unexpected_keys)
        return found


def check_placed(model: nn.Module, source: object, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """InputError if LoRA layers of a packed model got no weights, or weights of its modules got no layer.

    Weights of modules that the model does not have are no error: those of a head that this class lacks.
    """
    if not has_packed(model):
        return
    empty = sorted({module_of(key) for key in missing if ".lora_" in key})
    there = {name for name, _ in model.named_modules()}
    left = sorted({module_of(key) for key in unexpected if ".lora_" in key} & there)
    if empty or left:
        what = [f"no weights for the adapter on {listed(empty, 3)}"] if empty else []
        what += [f"no adapter on {listed(left, 3)} for its weights"] if left else []
        raise InputError(
            f"{quoted(source)}: {' and '.join(what)}; is it of another model? "
            "Load the model again, and the adapter that was made or trained for it"
        )


def _of_adapter(keys: Iterable[str], adapter: str) -> list[str]:
    """The LoRA tensors of one adapter. PEFT takes every name that has the adapter's in it, such as "b" in "base"."""
    return [key for key in keys if key.partition(".lora_")[2].split(".")[1:2] == [adapter]]


def module_of(key: str) -> str:
    """The module of a tensor of an adapter, by its name in the model under PEFT."""
    return key.removeprefix("base_model.model.").partition(".lora_")[0]
