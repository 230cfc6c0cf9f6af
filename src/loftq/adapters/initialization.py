"""``LoraConfig(init_lora_weights="loftq")`` on a packed model: the initialization of its directory.

PEFT, or TRL, then make the adapter, with the user's ``lora_alpha``, dropout and task. The initialization's ``B`` is
divided by the ratio of the two scalings, so that ``s · B @ A`` is what was solved for.
"""

import copy
import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft.tuners.lora.config import LoraConfig
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.other import _get_input_embeddings_name, get_pattern_key
from torch import Tensor, nn

from loftq.adapters.bases import fetched
from loftq.adapters.placement import filled_from_elsewhere, is_filled_from_elsewhere, module_of, rename_targets
from loftq.errors import InputError, UsageError, listed, one_line, option, quoted, warn
from loftq.nn.experts import PackedExperts
from loftq.nn.hf import origin
from loftq.nn.layers import PackedWeight, has_packed
from loftq.patching import patches

FOLDER = "loftq_init"


@dataclass(frozen=True)
class Start:
    """The initialization of a directory, for the modules that a model has."""

    config: LoraConfig
    factors: dict[str, tuple[Tensor, Tensor]]  # module -> B (out, rank), A (rank, in); of a stack as PEFT has them
    experts: dict[str, int]  # stack -> how many

    def rank(self, module: str) -> int:
        return len(self.factors[module][1]) // self.experts.get(module, 1)

    def scaling(self, module: str) -> float:
        """LoRA's scaling ``s`` that the factors were stored for."""
        rank = self.rank(module)
        return self.config.lora_alpha / (rank**0.5 if self.config.use_rslora else rank)

    def complete(self, config: LoraConfig) -> LoraConfig:
        """A copy of ``config`` for PEFT's usual initialization, with our modules and ranks where it names none."""
        config = copy.copy(config)
        config.init_lora_weights, config.loftq_config = True, {}
        if config.target_modules is None:
            config.target_modules = set(self.config.target_modules or ())  # type: ignore[arg-type]
            config.exclude_modules = config.exclude_modules or self.config.exclude_modules
        if config.target_parameters is None and self.config.target_parameters:
            config.target_parameters = list(self.config.target_parameters)
        if not config.rank_pattern:
            config.rank_pattern = dict(self.config.rank_pattern or {})
        return config

    def check(self, config: Any, model: nn.Module) -> None:
        """UsageError if ``config`` has another rank, or leaves out a module that was solved for."""
        chosen = {name for name, _ in model.named_modules() if name and check_target_module_exists(config, name)}
        endings = tuple(f".{target}" for target in config.target_parameters or ())
        chosen |= {stack for stack in self.experts if f".{stack}".endswith(endings)}
        refuse_trained_whole(self.factors, config, model)
        if config.layer_replication and config.rank_pattern:
            raise UsageError(
                "layer_replication: the LoftQ initialization has ranks by the numbers of the layers, which this "
                "changes; quantize with one rank for all layers, or leave layer_replication out"
            )
        left = [module for module in self.factors if module not in chosen]
        if left:
            raise UsageError(
                f"target_modules leaves out {listed(left, 3)}: the LoftQ initialization corrects these too; leave "
                "target_modules out and it is that of the initialization"
            )
        alphas = [config.lora_alpha, *config.alpha_pattern.values()]
        if not min(alphas) > 0:
            raise UsageError(f"init_lora_weights='loftq': the scaling is {min(alphas)}; set lora_alpha above 0")
        other = []
        for module in self.factors:
            rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), module), config.r)
            if rank != self.rank(module):
                other.append(f"{module} ({rank}, the initialization has {self.rank(module)})")
        if other:
            raise UsageError(
                f"the LoftQ initialization has other ranks than LoraConfig: {listed(other, 3)}; give r={self.config.r} "
                f"and no rank_pattern, or quantize with another {option('rank')}"
            )

    def replicated(self, model: nn.Module, sources: dict[int, str]) -> "Start":
        """With the factors of every layer that shares its weight with one of ``sources``: of layers that PEFT repeats.

        Args:
            sources: module by the identity of its packed weight, before layers were repeated.
        """
        found = {}
        for name, module in model.named_modules():
            if isinstance(module, BaseTunerLayer) and isinstance(module.get_base_layer(), PackedWeight):
                source = sources.get(id(module.get_base_layer().weight), "")
                found.update({name: self.factors[source]} if source in self.factors else {})
        return replace(self, factors=found)

    def fill(self, model: nn.Module, adapter: str) -> None:
        """Put the factors into the layers of ``adapter``, for the scaling that these have."""
        from loftq.adapters.experts import wrapper_of
        from loftq.adapters.lora import factors, write

        for module, (b, a) in self.factors.items():
            layer: Any = wrapper_of(model, module) if module in self.experts else model.get_submodule(module)
            if adapter not in getattr(layer, "scaling", {}):
                raise InputError(
                    f"{quoted(module)} got no adapter for its LoftQ initialization; leave target_modules out"
                )
            rows = len(factors(layer, adapter)[0])
            if rows != len(b):
                raise UsageError(
                    f"{quoted(module)} has {rows} rows, its LoftQ initialization {len(b)}; use loftq.load_start "
                    "for a table that was resized"
                )
            write(layer, adapter, b.float() * (self.scaling(module) / layer.scaling[adapter]), a)


def refuse_trained_whole(modules: Iterable[str], config: Any, model: nn.Module) -> None:
    """UsageError if ``config`` trains a module, or tokens of it, that has factors: PEFT trains one or the other."""
    tokens: Any = config.trainable_token_indices
    tables = tokens or () if tokens is None or isinstance(tokens, dict) else [_get_input_embeddings_name(model)]
    for field, names in (("modules_to_save", config.modules_to_save or ()), ("trainable_token_indices", tables)):
        both = [module for module in modules if f".{module}".endswith(tuple(f".{name}" for name in names))]
        if both:
            raise UsageError(
                f"{field} trains {listed(both, 3)}, and so does the adapter of the LoftQ initialization; leave it out "
                f"of {field}, or quantize with this layer dense"
            )


def read_start(model: Any) -> Start:
    """The initialization in the directory, or hub repository, that ``model`` was loaded from.

    Raises: UsageError if there is none; InputError if a packed layer is without.
    """
    from peft import PeftConfig
    from peft.utils.save_and_load import load_peft_weights

    name, folder = origin(model)
    try:
        directory = fetched(name, posixpath.join(folder, FOLDER), getattr(model.config, "_commit_hash", None))
        config = PeftConfig.from_pretrained(directory)
        mapping = model.__dict__.get("_checkpoint_conversion_mapping")
        tensors = load_peft_weights(directory, device="cpu", key_mapping=mapping)
    except Exception as e:  # whatever PEFT, the hub and the network raise
        raise UsageError(
            f"init_lora_weights='loftq': no LoftQ initialization in {quoted(name or 'a model from no directory')} "
            f"({one_line(e)}); load the model from a directory that `loftq quantize` made"
        ) from e
    if not isinstance(config, LoraConfig):
        raise InputError(f"{quoted(name)}/{FOLDER}: not a LoRA adapter")
    rename_targets(config, model)
    there = dict(model.named_modules())
    mixtures = {n.removesuffix(".base_layer"): m for n, m in there.items() if isinstance(m, PackedExperts)}
    factors, experts = {}, {}
    for module, pair in _pairs(tensors).items():
        owner, depth = module.removesuffix(".base_layer"), module.endswith(".base_layer")
        if owner in mixtures:
            stack = mixtures[owner].stacks[-1 - depth]
            factors[f"{owner}.{stack}"] = pair
            experts[f"{owner}.{stack}"] = mixtures[owner].banks[stack].experts
        elif module in there:
            factors[module] = pair
    packed = [name for name, _ in _packed_layers(model)]
    packed += [f"{owner}.{stack}" for owner, m in mixtures.items() for stack in m.stacks]
    without = [n for n in packed if n not in factors]
    if without:
        raise InputError(f"{quoted(name)}: no LoftQ initialization for {listed(without, 3)}; is it of another model?")
    return Start(config, factors, experts)


def _pairs(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> B and A. An embedding's are stored transposed, :func:`loftq.architecture.adapter.adapter_tensors`."""
    pairs = {}
    for name, tensor in tensors.items():
        root, _, leaf = name.partition(".lora_")
        if leaf == "A.weight":
            pairs[module_of(name)] = tensors[f"{root}.lora_B.weight"], tensor
        elif leaf == "embedding_A":
            pairs[module_of(name)] = tensor.T, tensors[f"{root}.lora_embedding_B"].T
    return pairs


def has_start(model: Any) -> bool:
    """Whether the directory of ``model`` has an initialization, as far as this is known without the network."""
    name, folder = origin(model)
    if not name or Path(name).exists():
        return bool(name) and (Path(name) / FOLDER / "adapter_config.json").is_file()
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        file = posixpath.join(folder, FOLDER, "adapter_config.json")
        found = try_to_load_from_cache(name, file, revision=model.config._commit_hash)
    except HFValidationError:
        return False
    return found is None or isinstance(found, str)  # None: never asked for; every packed checkpoint is made with one


def _name_stacks(config: LoraConfig, model: nn.Module) -> None:
    """Let PEFT turn targets that named the experts of old into stacks, with the ranks that were asked for.

    It would double the rank of a stack that holds two of the old matrices, and with it ``alpha``.
    """
    from peft.utils import transformers_weight_conversion as conversion

    ranks, alphas = dict(config.rank_pattern or {}), dict(config.alpha_pattern or {})
    conversion.convert_peft_config_for_transformers(config, model, None)
    config.rank_pattern, config.alpha_pattern = ranks, alphas


def take_in_mixed_models(mixed_model: Any) -> None:
    """:func:`take_start` for the tuner of ``PeftMixedModel``.

    Args:
        mixed_model: the module ``peft.mixed_model``.
    """
    take_start(mixed_model.MixedModel)


def take_start(tuner: Any) -> None:
    """Let one of PEFT's tuners use the initialization that belongs to a packed model.

    Args:
        tuner: PEFT's ``LoraModel``, or the ``MixedModel`` that makes LoRA's layers too.
    """

    @patches(tuner, "inject_adapter")
    def inject_adapter(inject: Any, self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        if is_filled_from_elsewhere():
            rename_targets(config, model)
        if getattr(config, "init_lora_weights", None) != "loftq":
            return inject(self, model, adapter_name, *args, **kwargs)
        if type(self) is not tuner:
            return _refuse_other_tuner(config, model) or inject(self, model, adapter_name, *args, **kwargs)
        if not has_packed(model):
            if not config.loftq_config:
                raise UsageError(
                    "init_lora_weights='loftq' takes the initialization of a packed model, and this one has no packed "
                    "layers; load a directory that `loftq quantize` made, or give a loftq_config to have PEFT quantize"
                )
            return inject(self, model, adapter_name, *args, **kwargs)
        start = None if is_filled_from_elsewhere() else read_start(model)
        completed = start.complete(config) if start else copy.copy(config)
        completed.init_lora_weights, completed.loftq_config = True, {}
        if start:
            _name_stacks(completed, model)
            start.check(_maybe_include_all_linear_layers(copy.copy(completed), model), model)
        self.peft_config[adapter_name] = completed
        sources = {id(m.weight): n for n, m in _packed_layers(model)} if completed.layer_replication else {}
        with filled_from_elsewhere():
            inject(self, model, adapter_name, *args, **kwargs)
        if start:
            (start.replicated(model, sources) if sources else start).fill(model, adapter_name)
        return None


def _refuse_other_tuner(config: Any, model: nn.Module) -> None:
    """UsageError for a tuner that takes LoRA's options, and no initialization: AdaLoRA."""
    if has_packed(model) and not is_filled_from_elsewhere():
        raise UsageError(
            f"{type(config).__name__} does not take init_lora_weights='loftq'; give LoraConfig, or leave it out"
        )


def _packed_layers(model: nn.Module) -> Iterator[tuple[str, PackedWeight]]:
    """Every packed layer, by its name without those of PEFT's layers around it."""
    for name, module in model.named_modules():
        if isinstance(module, PackedWeight):
            yield name.removesuffix(".base_layer"), module


def ask_for_no_quantizer() -> None:
    """Let ``LoraConfig`` take ``init_lora_weights="loftq"`` without the options of PEFT's own quantizer."""

    @patches(LoraConfig, "__post_init__")
    def check_without_quantizer(check: Any, self: LoraConfig) -> None:
        start = self.init_lora_weights == "loftq" and not self.loftq_config
        self.init_lora_weights = True if start else self.init_lora_weights
        check(self)
        self.init_lora_weights = "loftq" if start else self.init_lora_weights


def warn_of_unused_starts(peft_model: Any) -> None:
    """Let ``PeftModel`` warn of prompts on a packed model; its tuners are heard by :func:`install`.

    Args:
        peft_model: the module ``peft.peft_model``.
    """

    @patches(peft_model.PeftModel, "add_adapter")
    def add_adapter(add: Any, self: Any, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        add(self, adapter_name, peft_config, *args, **kwargs)
        if peft_config.is_prompt_learning:
            warn_if_unused(peft_config, self.base_model)


def install() -> None:
    """Warn of a new adapter on a packed model without LoftQ's initialization, whichever call makes it.

    Not of one that is made like another that is there: it is a copy, as TRL's reference of a model in training.
    """

    @patches(BaseTuner, "inject_adapter")
    def inject_adapter(inject: Any, self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        others = [other for name, other in self.peft_config.items() if name != adapter_name]
        inject(self, model, adapter_name, *args, **kwargs)
        if config not in others:
            warn_if_unused(config, model)


def warn_if_unused(config: Any, model: Any) -> None:
    """Warn if a new adapter of this configuration left out the initialization that the model's directory has."""
    used = isinstance(config, LoraConfig) and config.init_lora_weights == "loftq"
    if not used and not is_filled_from_elsewhere() and has_packed(model) and has_start(model):
        lora = "" if isinstance(config, LoraConfig) else ", and only LoRA uses it"
        warn(
            f"the LoftQ initialization of {quoted(model.name_or_path)} is not used{lora}: this adapter begins at zero, "
            "on weights whose quantization error nothing makes up for. Give LoraConfig(init_lora_weights='loftq'), "
            "or use loftq.load_start(model, directory)"
        )
