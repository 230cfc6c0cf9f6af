"""A model that is already loaded: packed layers and a LoftQ initialization, in place, in one call."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from loftq import planning
from loftq.adapters.start import refuse_not_dense, wrap
from loftq.architecture import skeleton
from loftq.architecture.adapter import adapter_config, adapter_tensors, stacked_adapter
from loftq.errors import UsageError, command, listed, naming, option
from loftq.formats.statistics import Statistics
from loftq.formats.tensorfile import dtype_name
from loftq.nn.experts import pack_experts
from loftq.nn.hf import mark_quantized
from loftq.nn.layers import pack_like, replace_module
from loftq.numerics import encode, oriented
from loftq.planning import Matrix, Plan, Policy
from loftq.solver import Solution, check_finite, ordered_map, solve, workers_for
from loftq.spec import check_statistics

# Of the adapter's configuration, what PEFT does not set itself.
FIELDS = (
    *("r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "target_parameters", "rank_pattern"),
    "init_lora_weights",
)


def convert(
    model: nn.Module,
    policy: Policy,
    workers: int | None,
    progress: Callable[[Matrix, Solution], object] | None,
    statistics: Statistics | None = None,
) -> tuple[nn.Module, Plan]:
    """Replace the planned layers of ``model`` by packed ones; wrap it with the LoftQ initialization as ``default``.

    Raises: UsageError for a model that cannot be converted; what :func:`loftq.planning.make` raises; NumericalError for
        weights that are not finite. ``model`` is then unchanged; not if a matrix cannot be solved.
    """
    _check_model(model)
    check_statistics(
        policy.solve, statistics and statistics.kind, "calibration=loftq.calibrate(model, texts, tokenizer)"
    )
    if policy.budget:
        raise UsageError(
            "a budget works on checkpoints, not on models in memory: use loftq.quantize, and load its output"
        )
    if (policy.dtype, policy.adapter_dtype) != (Policy.dtype, Policy.adapter_dtype):
        raise UsageError("dtype and adapter_dtype are for files: a model in memory keeps its dtype")
    roles = skeleton.parameter_roles(model)
    parameters = {name: model.get_parameter(name) for name in roles}
    plan = planning.make({n: (dtype_name(p.dtype), tuple(p.shape)) for n, p in parameters.items()}, roles, policy)
    if statistics and not {m.module for m in plan.matrices} & {*statistics.modules, *statistics.routed}:
        raise UsageError("the statistics are of another model: they have none of this model's matrices")
    for matrix in plan.matrices:
        with naming(matrix.name, matrix.shape):
            check_finite(parameters[matrix.name].detach())
    config = _adapter_config(plan, model)
    start: dict[str, torch.Tensor] = {}
    device = str(parameters[plan.matrices[0].name].device)
    members = [member for matrix in plan.matrices for member in matrix.members]
    sizes = [(m.shape, m.quant) for m in members]
    workers = workers or workers_for(sizes, plan.solve, device, statistics is not None)
    del parameters  # a dense weight is freed when its layer is replaced
    solutions = ordered_map(lambda matrix: _solve(model, matrix, plan, statistics), members, workers)
    for matrix in plan.matrices:
        factors, stored = [], []
        for member, solution in zip(matrix.members, solutions, strict=False):
            stored.append(encode(solution.quantized, matrix.quant))
            factors.append(adapter_tensors(member, *solution.factors(plan.scaling(matrix))))
            if progress:
                progress(member, solution)
        _replace(model, matrix, stored)
        start.update(stacked_adapter(matrix, factors) if matrix.experts else factors[0])
    mark_quantized(model, planning.nominal_bits(policy.bits, plan))
    wrapped = wrap(model, config, start)
    # Not the dense checkpoint: with that under it, the initialization would be added to weights that need none.
    wrapped.peft_config["default"].base_model_name_or_path = ""
    return wrapped, plan


def _check_model(model: nn.Module) -> None:
    instead = ", or give this one an adapter by loftq.replace_lora_weights or loftq.load_start"
    refuse_not_dense(model, instead)
    away = [name for name, p in model.named_parameters() if p.device.type == "meta"]
    if away:
        raise UsageError(
            f"the model has parameters on the meta device or on disk ({listed(away, 3)}); load it fully, or use "
            f"{command('quantize', 'MODEL', output='DIR')}"
        )


def _solve(model: nn.Module, matrix: Matrix, plan: Plan, statistics: Statistics | None) -> Solution:
    with naming(matrix.name, matrix.shape, option("workers")):
        stack, _, number = matrix.name.rpartition(".")
        weight = model.get_parameter(stack)[int(number)] if number.isdecimal() else model.get_parameter(matrix.name)
        weight = oriented(matrix.kind, weight.detach())
        moments = statistics and statistics.moments(matrix.module)
        return solve(weight, matrix.quant, matrix.rank, plan.solve, matrix.name, moments)


def _replace(model: nn.Module, matrix: Matrix, stored: list[dict[str, torch.Tensor]]) -> None:
    """A packed layer with the solved codes in the place of the dense one, whose bias it keeps."""
    if matrix.experts:
        owner, _, stack = matrix.module.rpartition(".")
        packed = pack_experts(model.get_submodule(owner), stack, matrix.quant, model.get_parameter(matrix.name).device)
        for e, tensors in enumerate(stored):
            packed.load_expert(stack, e, tensors)
        return
    dense: Any = model.get_submodule(matrix.module)
    packed = pack_like(dense, matrix.quant, device=dense.weight.device)
    packed.load_stored(stored[0])
    if getattr(dense, "bias", None) is not None:
        packed.bias = dense.bias
    replace_module(model, matrix.module, packed)


def _adapter_config(plan: Plan, model: Any) -> Any:
    """PEFT's configuration of the initialization. Made first of all: not every model can have one."""
    from peft import LoraConfig

    chosen = {matrix.module for matrix in plan.matrices}
    others = [name for name, _ in model.named_modules() if name not in chosen]
    parameters = [name for name, _ in model.named_parameters()]
    fields = adapter_config(plan, others, str(model.base_model_prefix), "", None, parameters=parameters)
    return LoraConfig(**{k: fields[k] for k in FIELDS})
