"""A model that is already loaded: packed layers and a LoftQ start, in place, in one call."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from loftq import plan as planning
from loftq.errors import LoftqError, UsageError
from loftq.formats.config import quantization_config
from loftq.formats.tensorfile import dtype_name
from loftq.nn import skeleton
from loftq.nn.adapter import adapter_config, adapter_tensors
from loftq.nn.hf import LoftQHfQuantizer, LoftQQuantizationConfig
from loftq.nn.layers import pack_like, replace_module
from loftq.numerics import encode
from loftq.plan import Matrix, Plan, Policy
from loftq.solve import Solution, ordered_map, solve


def convert(
    model: nn.Module, policy: Policy, workers: int, progress: Callable[[Matrix, Solution], None] | None
) -> tuple[nn.Module, Plan]:
    """Replace the planned layers of ``model`` by packed ones, and wrap it with the LoftQ start as ``default`` adapter."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    if any(p.device.type == "meta" for p in model.parameters()):
        raise UsageError(
            "the model has parameters on the meta device or on disk; load it fully, or use `loftq quantize`"
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tensors = {name: (dtype_name(p.dtype), tuple(p.shape)) for name, p in parameters.items()}
    plan = planning.make(tensors, skeleton.roles(model, tensors), policy)
    others = [m for m in skeleton.adaptable(model) if m not in {x.module for x in plan.matrices}]
    start: dict[str, torch.Tensor] = {}

    def work(matrix: Matrix) -> Solution:
        weight = parameters[matrix.name].detach()
        try:
            return solve(
                weight.T if matrix.kind == "conv1d" else weight,
                matrix.quant,
                matrix.rank,
                plan.solve,
                matrix.name,
            )
        except LoftqError as e:
            raise type(e)(f"{matrix.name}: {e}") from e

    for matrix, solution in zip(plan.matrices, ordered_map(work, plan.matrices, workers), strict=True):
        dense: Any = model.get_submodule(matrix.module)
        packed = pack_like(dense, matrix.quant)
        packed.load_stored(encode(solution.quantized, matrix.quant))
        if getattr(dense, "bias", None) is not None:
            packed.bias = dense.bias
        replace_module(model, matrix.module, packed)
        b, a = solution.factors(plan.scaling(matrix))
        start.update(adapter_tensors(matrix, b, a))
        if progress:
            progress(matrix, solution)

    prefix = str(getattr(model, "base_model_prefix", ""))
    _mark_quantized(model, plan, policy)
    task = planning.task_type(type(model).__name__)
    fields = adapter_config(plan, others, prefix, "", task)
    kept = (
        "r",
        "lora_alpha",
        "use_rslora",
        "target_modules",
        "rank_pattern",
        "init_lora_weights",
        "task_type",
    )
    wrapped = get_peft_model(model, LoraConfig(**{k: fields[k] for k in kept}))  # type: ignore[arg-type]
    result = set_peft_model_state_dict(wrapped, start)
    if result.unexpected_keys:
        raise LoftqError(
            f"the start does not fit the adapter PEFT made: {result.unexpected_keys[:3]}; please report this"
        )
    return wrapped, plan


def _mark_quantized(model: Any, plan: Plan, policy: Policy) -> None:
    """Make ``save_pretrained`` write a LoftQ checkpoint, and Trainer know what it trains."""
    if not hasattr(model, "config"):
        return
    written = quantization_config(((m.module, m.quant) for m in plan.matrices), plan.matrices[-1].quant.bits)
    config = LoftQQuantizationConfig(**written)
    model.config.quantization_config = config
    model.hf_quantizer = LoftQHfQuantizer(config)
    model.is_quantized, model.quantization_method = True, "loftq"
