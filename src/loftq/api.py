"""The calls for people in Python; the command line makes the same ones."""

import dataclasses
import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from loftq.adapters.convert import convert
from loftq.checkpoint.quantize import QuantizeOptions, quantize_options
from loftq.checkpoint.quantize import quantize as _quantize
from loftq.errors import UsageError, check_names, checks_names
from loftq.formats.statistics import Statistics
from loftq.frozen.replace import FitOptions, replace
from loftq.numerics import Moments
from loftq.options import check_whole
from loftq.planning import Matrix, Policy, make_policy
from loftq.report.report import Report, of_checkpoint, of_start
from loftq.solver import Solution, checked, solve
from loftq.sources.checkpoint import resolve
from loftq.spec import QuantSpec, SolveSpec, check_statistics, code_for, solve_spec

SOLVER = tuple(field.name for field in dataclasses.fields(SolveSpec))
POLICY = ("preset", *SOLVER, *(field.name for field in dataclasses.fields(Policy) if field.name != "solve"))


def quantize_weight(
    weight: Tensor | np.ndarray,
    *,
    bits: int = 4,
    rank: int = 16,
    code: str = "auto",
    block_size: int = 64,
    scale_dtype: str = "bfloat16",
    double_quant: bool = False,
    preset: str | None = None,
    moments: Moments | Tensor | np.ndarray | None = None,
    **solver: Any,
) -> Solution:
    """LoftQ of one matrix ``(out, in)``: ``weight ≈ solution.dequantize() + solution.b @ solution.a``.

    >>> solution = quantize_weight(torch.randn(256, 512), bits=2, rank=16)
    >>> solution.error < solution.errors[0]
    True

    Args:
        weight: ``(out_features, in_features)``, of any floating-point type; a numpy array is copied.
        preset: a method by its name, of :data:`loftq.spec.PRESETS`; None: ``fitted``, with moments ``descent``.
        moments: of the matrix's inputs, for presets that are calibrated: what ``statistics.moments(name)`` gives, or
            second moments of your own, ``H = E[x xᵀ]`` of shape ``(in, in)``, as :meth:`Moments.of` takes them.
        solver: fields of :class:`loftq.spec.SolveSpec` that are to differ from the preset's: ``steps=10, seed=1``.

    Raises: UsageError for options that do not fit, or what is no matrix of floating-point numbers; NumericalError for
        values that are not finite.
    """
    check_names("quantize_weight", solver, (*named(quantize_weight), *SOLVER))
    weight = checked(_tensor(weight), rank)
    moments = _moments(moments, weight.shape[1])
    spec = solve_spec(preset, calibrated=moments is not None, code=code, **solver)
    quant = QuantSpec(
        bits=bits,
        code=code_for(code, bits, spec.scales),
        block_size=block_size,
        scale_dtype=scale_dtype,
        double_quant=double_quant,
    )
    check_statistics(
        spec, moments and moments.fit.kind, "moments=loftq.calibrate(model, texts, tokenizer).moments(name)"
    )
    return solve(weight, quant, rank, spec, moments=moments)


def _tensor(array: Any) -> Any:
    """A numpy array as a tensor; all else as it is."""
    if not isinstance(array, np.ndarray):
        return array
    try:
        return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))
    except TypeError as e:
        raise UsageError(f"wanted a matrix of floating-point numbers, got a numpy array of {array.dtype}") from e


def _moments(given: Any, columns: int) -> Moments | None:
    """Moments as they are, or made from second moments of the caller's own."""
    given = _tensor(given)
    if given is None or isinstance(given, Moments):
        return given
    shape = tuple(given.shape) if isinstance(given, Tensor) else None
    if shape != (columns, columns):
        got = type(given).__name__ if shape is None else f"shape {shape}"
        wanted = f"second moments of shape ({columns}, {columns})"
        raise UsageError(f"moments: wanted what statistics.moments(name) gives, or {wanted}, got {got}")
    return Moments.of(given)


def named(function: Callable[..., Any]) -> list[str]:
    """The options that a function names in its signature."""
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]


def get_peft_model(
    model: nn.Module,
    *,
    calibration: Statistics | str | Path | None = None,
    workers: int | None = None,
    progress: bool = True,
    **options: Any,
) -> nn.Module:
    """A loaded full-precision model becomes a ``PeftModel`` with packed layers and the LoftQ initialization.

    The model is changed in place, layer by layer, so that little more memory is needed than it has already.

    Args:
        model: a transformers model, its weights in memory.
        calibration: what :func:`calibrate` found out about this model, or the directory where `loftq calibrate` put it;
            only names and shapes tell whether it is of this model.
        workers: matrices solved at a time; default as many as CPUs and memory allow, on a GPU one.
        options: fields of :class:`Policy` and the solver's: ``bits=2, rank=16, alpha=32, preset="cloq", …``.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained("org/model")
        >>> model = loftq.get_peft_model(model, bits=2, rank=16)
        >>> model.print_trainable_parameters()
    """
    check_names("get_peft_model", options, (*named(get_peft_model), *POLICY))
    check_whole("workers", workers or 0, 0)
    policy, statistics = make_policy(options, calibrated=calibration is not None), statistics_from(calibration)
    errors: list[float] = []
    with tqdm(desc="LoftQ", unit=" matrices", disable=not progress) as bar:

        def advance(_: Matrix, solution: Solution) -> None:
            errors.append((solution.output_errors or solution.errors)[solution.kept])
            of = "output error" if statistics else "error"
            bar.set_postfix_str(f"mean {of} {sum(errors) / len(errors):.4f}", refresh=False)
            bar.update()

        wrapped, _ = convert(model, policy, workers, advance, statistics)
    return wrapped


@checks_names
def calibrate(
    model: nn.Module,
    data: str | Path | Iterable[str] | Iterable[Mapping[str, Any]],
    tokenizer: Any = None,
    *,
    kind: str = "full",
    samples: int = 128,
    max_length: int = 0,
    column: str | None = None,
    progress: bool = True,
) -> Statistics:
    """Statistics of what the matrices of a loaded model are given, in memory.

    Args:
        model: a transformers model in full precision.
        data: a file or data set as ``loftq calibrate --data`` takes it; or texts; or batches with ``input_ids`` and, if
            there is padding, ``attention_mask``, as a ``DataLoader`` gives them.
        tokenizer: for texts; batches need none.
        kind: ``full``, ``diagonal`` or ``fisher``.
        samples, max_length, column: as on the command line.

    Example:
        >>> statistics = loftq.calibrate(model, "notes.txt", tokenizer, samples=64)
        >>> statistics.moments("model.layers.0.mlp.down_proj").tokens
        24576
    """
    from loftq.calibration.calibrate import CalibrateOptions, calibrate_loaded

    options = CalibrateOptions(data="", kind=kind, samples=samples, max_length=max_length, column=column)
    with tqdm(desc="calibrate", unit="step", disable=not progress) as bar:

        def begin(total: int) -> Any:
            bar.reset(total)
            return bar.update

        return calibrate_loaded(model, data, tokenizer, options, begin)


def quantize(model: str | Path, output: str | Path, *, format: str = "loftq", **options: Any) -> Report:
    """What ``loftq quantize`` does: stream a checkpoint from disk into a LoftQ checkpoint; its manifest.

    Args:
        model: a local directory or a hub id.
        output: the directory to be made.
        format: ``loftq``, ``dense`` or ``bnb``.
        options: fields of :class:`Policy`; ``preset``, ``steps``, ``order``, ``svd``, ``seed``, ``scales``; and
            ``calibrate``, ``calibration_samples``, ``workers``, ``device``, ``overwrite``, ``max_shard_bytes``,
            ``curves`` (a :class:`pathlib.Path`).
    """
    names = {f.name for f in dataclasses.fields(QuantizeOptions)} - {"policy", "format"}
    check_names("quantize", options, (*named(quantize), *sorted(names), *POLICY))
    if isinstance(model, nn.Module):
        raise UsageError(
            "model: wanted a directory or a hub id; a model in memory is quantized by loftq.get_peft_model"
        )
    model, output = as_path("model", model), Path(as_path("output", output))
    if isinstance(options.get("calibrate"), Statistics):
        raise UsageError("calibrate: wanted a file of texts or a directory of statistics, got statistics in memory")
    paths = {k: as_path(k, options[k]) for k in ("calibrate", "curves", "statistics") if options.get(k) is not None}
    paths = {name: path if name == "calibrate" else Path(path) for name, path in paths.items()}
    return of_checkpoint(_quantize(model, output, quantize_options({**options, **paths, "format": format})))


@checks_names
def replace_lora_weights(
    model: nn.Module,
    weights: str | Path,
    *,
    adapter_name: str = "default",
    calibration: Statistics | str | Path | None = None,
    svd: str = "auto",
    seed: int = 0,
    revision: str | None = None,
    progress: bool = True,
) -> Report:
    """Give the LoRA layers of a ``PeftModel`` over any frozen base LoftQ's initialization for its quantization.

    Each layer's ``B`` and ``A`` become the best low-rank term between the original weight and what the frozen layer
    multiplies with, whatever quantized it, with the layer's scaling divided out; what they held before is lost. The
    original is read one matrix at a time. All layers are replaced, or none if an error is raised.

    Args:
        model: made by ``peft.get_peft_model`` over a model that is quantized, or rounded, or pruned: by bitsandbytes,
            HQQ, GPTQ, AWQ, ``loftq`` or others whose layers run on the device that they are on.
        weights: the full-precision checkpoint, a local directory or a hub id.
        adapter_name: the adapter to fill; others keep their values.
        calibration: what :func:`calibrate` found out about the original model, or the directory where it is; without
            it, or where it has nothing, the weights' own norm is used.
        svd: ``auto``, ``exact`` or ``randomized``.
        seed: of the randomized SVD, together with each tensor's name.
        revision: branch, tag or commit of a hub id.
        progress: whether to show a bar.

    Returns: ``layers``, for each one ``name``, ``tensor``, ``shape``, ``rank``, ``scaling``, ``norm``, ``errors``
        (before and after, relative, with the values that the adapter now holds), ``kept`` (0 where B is zero, with a
        ``reason``); ``skipped``, modules that kept their adapter, and why; ``error_before`` and ``error``, of all.

    Raises: UsageError for a model without plain LoRA layers; InputError if the weights are not the model's original.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained("org/model", quantization_config=BitsAndBytesConfig(...))
        >>> model = peft.get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
        >>> loftq.replace_lora_weights(model, "org/model")["error"]
    """
    original = resolve(as_path("weights", weights), revision)
    options = FitOptions(statistics=statistics_from(calibration, original), svd=svd, seed=seed)
    with tqdm(desc="LoftQ", unit="matrix", disable=not progress) as bar:

        def begin(total: int, done: int) -> Callable[[dict[str, Any]], object]:
            bar.reset(total)
            return lambda report: bar.update()

        return of_start(replace(model, str(original), adapter_name, options, None, begin))


def statistics_from(calibration: Statistics | str | Path | None, original: Path | None = None) -> Statistics | None:
    """Statistics as they are, or those of a directory, which then have to be of the model in ``original``."""
    from loftq.calibration.calibrate import open_statistics, statistics_of

    if calibration is None or isinstance(calibration, Statistics):
        return calibration
    directory = Path(as_path("calibration", calibration))
    return statistics_of(directory, original) if original else open_statistics(directory)


def as_path(what: str, value: Any) -> str:
    """A path as it was written: a hub id looks like one, and ``./org/name`` is none."""
    if not isinstance(value, (str, os.PathLike)):
        raise UsageError(f"{what}: wanted a path, got {type(value).__name__}")
    return os.fspath(value)
