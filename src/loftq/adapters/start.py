"""Load the LoftQ initialization on a model of any class, also one with a new head that is trained too."""

from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.save_and_load import load_peft_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from loftq.adapters.bases import fetched, refuse_no_weights
from loftq.adapters.initialization import refuse_trained_whole
from loftq.adapters.origins import identity, refuse_other
from loftq.adapters.placement import check_placed, filled_from_elsewhere, module_of
from loftq.architecture.adapter import task_type
from loftq.architecture.loading import guarded
from loftq.errors import InputError, UsageError, checks_names, listed, one_line, quoted
from loftq.nn.hf import origin
from loftq.nn.layers import has_packed
from loftq.planning import HEADS

# Tasks whose heads are seldom part of a checkpoint: PEFT trains and saves them with the adapter.
HEADED_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


@checks_names
def load_start(
    model: nn.Module,
    directory: str | Path,
    *,
    lora_dropout: float = 0.0,
    modules_to_save: list[str] | None = None,
    subfolder: str = "loftq_init",
) -> PeftModel:
    """Put the LoftQ adapter on a packed model of any class, and make a new head trainable.

    It does what ``PeftModel.from_pretrained(model, directory, subfolder="loftq_init", is_trainable=True)`` does for the
    class that was quantized. PEFT's call fails for other classes, such as a classifier on a causal language model.

    Args:
        model: a packed model.
        directory: the LoftQ checkpoint, or its hub id.
        lora_dropout: for training; the initialization has none.
        modules_to_save: modules that are trained and saved with the adapter. By default the whole head of a classifier
            or of question answering, and all modules that the checkpoint has no weights for.

    Raises: UsageError for a model without packed layers, with an adapter already, or offloaded; InputError if a packed
        layer has no initialization, or the directory is of another model.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"wanted a packed model, got {type(model).__name__}; load it with from_pretrained first")
    if not has_packed(model):
        raise UsageError(f"{type(model).__name__} has no packed layers; load the directory with from_pretrained first")
    refuse_adapted(model)
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise UsageError("a part of the model is offloaded; an adapter is trained on a model in memory, load all of it")
    local = Path(directory).is_dir()
    name, _ = origin(model)
    if local and subfolder and identity(name) is not None:
        refuse_other(Path(directory) / subfolder, Path(name))
    try:
        with guarded() if local else nullcontext():
            adapter = fetched(directory, subfolder)
            config = PeftConfig.from_pretrained(adapter)
    except (OSError, ValueError) as e:
        where = f"{quoted(directory, 400)}/{quoted(subfolder)}"
        why = "" if local else f" ({one_line(e)})"
        raise InputError(f"{where}: no adapter is there; name the directory that `loftq quantize` made{why}") from e
    refuse_no_weights(adapter)
    if not isinstance(config, LoraConfig):
        raise InputError(f"{quoted(directory)}/{quoted(subfolder)}: not a LoRA adapter")
    mapping: dict[str, str] | None = model.__dict__.get("_checkpoint_conversion_mapping")
    with guarded() if local else nullcontext():
        factors = load_peft_weights(adapter, device="cpu", key_mapping=mapping)
    config.base_model_name_or_path, config.lora_dropout, config.modules_to_save = None, lora_dropout, modules_to_save
    return wrap(model, config, factors)


def refuse_adapted(model: nn.Module) -> None:
    """UsageError for a model that has a PEFT adapter already; transformers may have loaded it."""
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise UsageError("the model has an adapter already; merge or unload it first, and give the model under it")


def refuse_not_dense(model: Any, instead: str = "") -> None:
    """UsageError unless ``model`` is a transformers model in full precision.

    Args:
        instead: what else may be done with one that is quantized.
    """
    if isinstance(model, nn.Module):
        refuse_adapted(model)
    if not isinstance(model, PreTrainedModel):
        raise UsageError(
            f"wanted a model of transformers, got {type(model).__name__}; load one with from_pretrained first"
        )
    method: Any = getattr(model, "quantization_method", None)
    if method is not None or has_packed(model):
        method = quoted(getattr(method, "value", method) or "loftq")
        raise UsageError(f"the model is quantized already ({method}); load it in full precision{instead}")


def wrap(model: Any, config: LoraConfig, factors: dict[str, Tensor]) -> PeftModel:
    """:func:`new_adapter` over a packed model, filled with ``factors``; a head keeps the values it has."""
    refuse_trained_whole({module_of(name) for name in factors if ".lora_" in name}, config, model)
    with filled_from_elsewhere():
        wrapped: Any = new_adapter(model, config, model.hf_quantizer.new_modules)
    fresh = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    missing = [name for name in fresh if ".lora_" in name and name not in factors]
    if missing:
        raise InputError(f"no LoftQ initialization for {listed(missing)}; is it of another model?")
    check_placed(model, "the LoftQ initialization", [], [name for name in factors if name not in fresh])
    filled = {name: _resized(name, t, fresh[name]) for name, t in factors.items() if name in fresh}
    set_peft_model_state_dict(wrapped, {**fresh, **filled})
    return wrapped


def _resized(name: str, factor: Tensor, place: Tensor) -> Tensor:
    """An embedding's factor for a table that was resized since: new rows need no correction, removed ones have none."""
    if ".lora_embedding_A" not in name or factor.shape[0] != place.shape[0]:
        return factor
    resized = torch.zeros_like(place)
    columns = min(factor.shape[1], place.shape[1])
    resized[:, :columns] = factor[:, :columns]
    return resized


def new_adapter(model: Any, config: LoraConfig, new_modules: Iterable[str]) -> PeftModel:
    """PEFT's model over ``model``, trainable. Unless ``config`` says which, heads and new modules are trained whole.

    Args:
        new_modules: those that the checkpoint had no weights for.
    """
    architecture = type(model).__name__
    headed = next((task for ending, task in HEADED_TASKS.items() if architecture.endswith(ending)), None)
    if config.modules_to_save is None:
        heads = _heads(model) if headed or architecture.endswith("Classification") else []
        new = [n for n in new_modules if not n.startswith(tuple(f"{head}." for head in heads))]
        config.modules_to_save = sorted({*heads, *new}) or None
    config.task_type, config.inference_mode = headed or task_type(model), False  # type: ignore[assignment]
    wrapped: Any = get_peft_model(model, config)
    return wrapped


def _heads(model: nn.Module) -> list[str]:
    """What lies beside the backbone and has weights: DeBERTa's pooler too, not only its classifier."""
    children = dict(model.named_children())
    beside = children.keys() - {model.base_model_prefix} if model.base_model_prefix in children else HEADS
    return [name for name, child in children.items() if name in beside and any(True for _ in child.parameters())]
