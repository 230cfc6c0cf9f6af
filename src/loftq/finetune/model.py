"""The model of a run: loaded in the class that the task wants, adapted, and written when it is trained."""

import logging
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loftq.adapters.start import load_start, new_adapter
from loftq.adapters.trained import adapted
from loftq.architecture.loading import load_config, load_weights
from loftq.errors import InputError, listed, option, quoted
from loftq.finetune.tasks import Task
from loftq.finetune.tasks.batches import padding

logger = logging.getLogger(__name__)


def load_model(
    task: Task, directory: Path, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, list[str]]:
    """A dense or packed checkpoint in the task's class, and the modules that it has no weights for.

    The model is told which token is padding: the tokenizer's, or the one that ends a text. A decoder that classifies
    would else look at the padding of a batch.

    Raises: InputError if transformers cannot make that class of it, or only with random numbers in its body; UsageError
        if the task does not fit it.
    """
    auto: Any = getattr(transformers, task.auto_class)
    task.check(load_config(directory))
    config = load_config(directory, **task.model_options())
    model, found = load_weights(auto, directory, config, dtype=dtype, output_loading_info=True)
    new = {name.rpartition(".")[0] for name in (*found["missing_keys"], *(k[0] for k in found["mismatched_keys"]))}
    _check_body(model, found["missing_keys"], directory)
    model.config.get_text_config().pad_token_id = padding(tokenizer).pad_token_id
    return model, sorted(new)


def add_lora(model: PreTrainedModel, config: LoraConfig, new_modules: Iterable[str]) -> PeftModel:
    """LoRA from zero on a dense model: the baseline."""
    return _trainable_in_float32(new_adapter(model, config, new_modules))


def add_start(model: PreTrainedModel, directory: Path, dropout: float) -> PeftModel:
    """The initialization that was made with the packed backbone in ``directory``, LoftQ's or QLoRA's."""
    return _trainable_in_float32(load_start(model, directory, lora_dropout=dropout))


def load_adapter(model: PreTrainedModel, directory: Path, new_modules: Iterable[str], base: Path) -> PeftModel:
    """A trained adapter put on ``model``, which was loaded from ``base``.

    Raises: InputError if it is no adapter for the model, was trained on another, or leaves a new module untrained.
    """
    found = adapted(model, directory)
    trained_on = Path(found.peft_config["default"].base_model_name_or_path or base)
    if trained_on.is_dir() and trained_on.resolve() != base.resolve():
        logger.warning("%s: an adapter of %s, put on %s", quoted(directory), quoted(trained_on), quoted(base))
    brought = found.peft_config["default"].modules_to_save or []
    refuse_untrained([n for n in new_modules if not any(part in brought for part in n.split("."))], directory)
    return found


def refuse_untrained(modules: Iterable[str], directory: Path) -> None:
    """InputError if there are ``modules`` that ``directory`` has no weights for: they hold random numbers."""
    names = list(modules)
    if names:
        raise InputError(
            f"{quoted(directory)}: no weights for {listed(names)}: not trained for this task; see {option('adapter')}"
        )


def precision(model: Any, arguments: Any) -> AbstractContextManager:
    """Autocast as in training: an evaluation then sees the model that training saw."""
    dtype = torch.bfloat16 if arguments.get("bf16") else torch.float16 if arguments.get("fp16") else None
    return torch.autocast(model.device.type, dtype) if dtype else nullcontext()


def save(
    model: Any, directory: Path, tokenizer: PreTrainedTokenizerBase, writing: bool, hub_id: str | None = None
) -> None:
    """What was trained: an adapter with its head, or a whole model. Every process calls it, one writes.

    Args:
        writing: whether this process is the one.
        hub_id: of an adapter's base, if it came from the hub.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    is_adapter = isinstance(model, PeftModel)
    state = {name: _whole(t) for name, t in model.state_dict().items() if not is_adapter or name in trained}
    if not writing:
        return
    options = {"save_embedding_layers": False} if is_adapter else {}
    for config in model.peft_config.values() if is_adapter else ():
        config.base_model_name_or_path = hub_id or _seen_from(directory, config.base_model_name_or_path)
    model.save_pretrained(directory, state_dict=state, **options)
    tokenizer.save_pretrained(directory)


def _seen_from(directory: Path, base: str | None) -> str | None:
    """``../backbone`` for a base that lies beside the adapter, as in a run, which can then be moved; else as it is."""
    place = Path(base).resolve() if base else None
    beside = place is not None and place.is_dir() and place.parent == directory.resolve().parent
    return f"../{place.name}" if place is not None and beside else base


def _whole(tensor: Tensor) -> Tensor:
    """``tensor`` on the CPU, put together from all processes if it is sharded."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()


def _trainable_in_float32(model: Any) -> Any:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def _check_body(model: PreTrainedModel, missing: Iterable[str], directory: Path) -> None:
    """InputError if most of what is below the head was not found: transformers would go on with random numbers."""
    prefix = f"{model.base_model_prefix}."
    sizes = {name: p.numel() for name, p in model.named_parameters() if name.startswith(prefix)}
    lost = [name for name in missing if name in sizes]
    if 2 * sum(sizes[name] for name in lost) > sum(sizes.values()):
        raise InputError(
            f"{quoted(directory)}: {len(lost)} of {len(sizes)} weights that {type(model).__name__} wants are not there "
            f"({listed(lost, 2)}); it calls them otherwise than the checkpoint does, and would begin from random ones"
        )
