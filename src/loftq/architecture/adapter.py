"""The LoftQ initialization as a plain PEFT adapter: its configuration, and the names and shapes of its tensors."""

import inspect
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from loftq.errors import InputError, UsageError, listed, option, quoted
from loftq.numerics import SWAPPED
from loftq.planning import Matrix, Plan, target_suffixes

# What PEFT's model of a task hands on by name, whether the user gave it or not, and the class must know.
HANDED_ON = {
    "CAUSAL_LM": ("input_ids", "attention_mask", "inputs_embeds", "labels"),
    "SEQ_2_SEQ_LM": (
        *("input_ids", "attention_mask", "inputs_embeds", "labels"),
        *("decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds"),
    ),
}
FLAGS = ("output_attentions", "output_hidden_states", "return_dict")  # handed on too; ``**kwargs`` may take them

_CLASS = ("base_model_class", "parent_library")  # as PEFT's ``auto_mapping`` has them


def task_type(model: nn.Module) -> str | None:
    """PEFT's task type of a model that generates from text; None for any other, which PEFT then calls as it is.

    PEFT's models of these tasks have a signature of their own. They fit where the model's first input is text and its
    ``forward`` names all that they hand on: a speech model without ``input_ids`` passes an empty one down to its
    decoder, beside the decoder's own.
    """
    config: Any = model.config
    if getattr(model, "main_input_name", None) != "input_ids" or not _generates(model):
        return None
    task = "SEQ_2_SEQ_LM" if getattr(config, "is_encoder_decoder", False) else "CAUSAL_LM"
    return task if _takes(model, task) else None


def text_tasks(model: nn.Module) -> set[str]:
    """The tasks of :data:`HANDED_ON` that PEFT can run with a model, or with another class of its weights."""
    if _generates(model):
        return {task for task in HANDED_ON if _takes(model, task)}
    return {*HANDED_ON} if getattr(model, "main_input_name", None) == "input_ids" else set()


def chosen_task(asked: str | None, own: str | None, fitting: Collection[str], name: str) -> str | None:
    """The task type that was asked for, or else the model's own.

    Args:
        fitting: :func:`text_tasks` of the model.
        name: of its class.

    Raises: UsageError for a task whose inputs the model does not take.
    """
    if asked in HANDED_ON and asked not in fitting:
        handed = ", ".join(HANDED_ON[asked])
        raise UsageError(f"{option('task_type', asked)}: PEFT passes {handed}; {name} does not take all; leave it out")
    return asked or own


def _takes(model: nn.Module, task: str) -> bool:
    known = inspect.signature(model.forward).parameters
    swallows = any(parameter.kind == parameter.VAR_KEYWORD for parameter in known.values())
    return known.keys() >= set(HANDED_ON[task]) and (swallows or known.keys() >= set(FLAGS))


def _generates(model: Any) -> bool:
    return hasattr(model, "can_generate") and bool(model.can_generate())


def adapter_config(
    plan: Plan,
    others: list[str],
    prefix: str,
    base: str,
    task_type: str | None,
    transposed: bool = False,
    parameters: Iterable[str] = (),
    model_class: tuple[str, str] | None = None,
) -> dict[str, Any]:
    """``adapter_config.json``: LoRA on exactly the quantized modules, and stacks of experts.

    Args:
        others: all other modules of the model, also those that hold the quantized ones.
        prefix: the base model's prefix; dropped from names, so that a model without a head finds them too.
        base: where the frozen model is; what begins with ``..`` is seen from the adapter (:mod:`loftq.adapters.bases`).
        task_type: PEFT's name of the task, or None.
        transposed: PEFT's ``fan_in_fan_out``: whether the weights under the adapter lie as ``(in, out)``.
        parameters: all Parameters of the model, where some of them are stacks of experts.
        model_class: name and module, which PEFT's ``AutoPeftModel`` reads where no task tells it.

    Raises: UsageError for a task that PEFT does not know.
    """
    from peft import LoraConfig

    stacks = [m.module.removeprefix(f"{prefix}.") for m in plan.matrices if m.experts]
    modules = [m.module.removeprefix(f"{prefix}.") for m in plan.matrices if not m.experts]
    ranks = {m.module.removeprefix(f"{prefix}."): m.rank for m in plan.matrices if m.rank != plan.rank}
    targets, excluded = target_suffixes(modules, [o.removeprefix(f"{prefix}.") for o in others])
    alpha, named = plan.lora_alpha, model_class and dict(zip(_CLASS, model_class, strict=True))
    stacked = _stack_suffixes(stacks, {p.removeprefix(f"{prefix}.") for p in parameters}.difference(stacks))
    try:
        made = LoraConfig(
            r=plan.rank,
            lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # type: ignore[arg-type]
            use_rslora=plan.use_rslora,
            target_modules=targets,
            exclude_modules=excluded or None,
            target_parameters=stacked or None,
            rank_pattern=ranks,
            init_lora_weights=True,
            task_type=task_type,  # type: ignore[arg-type]
            auto_mapping=None if task_type else named,
            base_model_name_or_path=base,
            inference_mode=True,
            fan_in_fan_out=transposed,
        )
    except ValueError as e:
        raise UsageError(f"{option('task_type')} {task_type!r}: {e}") from e
    config = made.to_dict()
    config["target_modules"] = sorted(config["target_modules"])
    config["exclude_modules"] = excluded or None
    return config


def _stack_suffixes(stacks: list[str], others: Iterable[str]) -> list[str]:
    """Endings that select the stacks and no other Parameter, which PEFT could not exclude."""
    suffixes, excluded = target_suffixes(stacks, others)
    if excluded:
        raise InputError(
            f"{listed(excluded, 3)}: a Parameter whose name ends like that of a stack of experts; PEFT, which selects "
            f"by endings, would adapt both; leave the experts dense: {option('bits', 'experts=16,4')}"
        )
    return suffixes


def refusal(model: nn.Module, leaf: str) -> str:
    """Why PEFT takes no LoRA on modules called ``leaf`` of this model, in its own words; empty if it does."""
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    asked = (name for name in dir(LoraModel) if name.startswith("_check_target_module_compat"))
    try:
        for name in asked:
            getattr(LoraModel, name)(None, LoraConfig(), model, leaf)
    except ValueError as e:
        return f"PEFT refuses it: {quoted(str(e).partition('. ')[0], 200)}"
    return ""


def adapter_names(matrix: Matrix) -> tuple[str, str]:
    """Names of A and B in the adapter file."""
    root = f"base_model.model.{matrix.module}"
    if matrix.experts:
        root = root.rpartition(".")[0] + ".base_layer" * matrix.nested
    if matrix.kind == "embedding":
        return f"{root}.lora_embedding_A", f"{root}.lora_embedding_B"
    return f"{root}.lora_A.weight", f"{root}.lora_B.weight"


def adapter_shapes(matrix: Matrix) -> dict[str, tuple[int, int]]:
    """Tensors of a matrix's adapter: name -> shape. Some are transposed: see :func:`adapter_tensors`."""
    a, b = adapter_names(matrix)
    rows, columns = reversed(matrix.shape) if matrix.kind in SWAPPED else matrix.shape
    ranks = max(1, matrix.experts) * matrix.rank
    return {a: (ranks, columns), b: (rows, ranks)}


def adapter_tensors(matrix: Matrix, b: Tensor, a: Tensor) -> dict[str, Tensor]:
    """Factors as PEFT stores them. To :data:`SWAPPED` it adds ``(B_e @ A_e).T``, so ``A_e = B.T, B_e = A.T``."""
    name_a, name_b = adapter_names(matrix)
    if matrix.kind in SWAPPED:
        return {name_a: b.T.contiguous(), name_b: a.T.contiguous()}
    return {name_a: a.contiguous(), name_b: b.contiguous()}


def stacked_adapter(matrix: Matrix, members: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a stack's adapter from those of its experts: A expert after expert, B rank after rank."""
    pairs = [tuple(member.values()) for member in members]
    a = torch.cat([a for a, _ in pairs])
    b = torch.stack([b for _, b in pairs], -1).flatten(1)
    return dict(zip(adapter_names(matrix), (a, b), strict=True))


def adapter_product(matrix: Matrix, tensors: dict[str, Tensor]) -> Tensor:
    """``B @ A`` in float32, in the orientation of the matrix, from the tensors of the adapter file."""
    name_a, name_b = adapter_names(matrix)
    product = tensors[name_b].float() @ tensors[name_a].float()
    return product.T if matrix.kind in SWAPPED else product
