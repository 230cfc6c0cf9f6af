"""Python calls: one matrix, models in memory, ``quantize``, ``calibrate``. Other verbs are in ``loftq.verbs``."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from loftq.adapters.convert import convert
from loftq.checkpoint.quantize import quantize as _quantize
from loftq.checkpoint.quantize import quantize_options
from loftq.errors import UsageError, checks_names, listed
from loftq.formats.regular import check_not_empty
from loftq.formats.statistics import Statistics
from loftq.frozen.replace import replace
from loftq.numerics import Moments
from loftq.options import Collecting, OneMatrix, Plans, Quantizing, check_whole, default, fields_of, keywords
from loftq.planning import Matrix, make_policy
from loftq.report.bars import Bar, MatrixBar
from loftq.report.report import Report, of_checkpoint, of_start
from loftq.solver import Solution, checked, solve
from loftq.sources.checkpoint import resolve
from loftq.spec import QuantSpec, SolveSpec, check_statistics, quant_spec, solve_spec
from loftq.spelled import spell_error


@checks_names
@keywords
def quantize_weight(
    weight: Tensor | np.ndarray,
    *,
    bits: float = int(default("bits")),
    rank: int = int(default("rank")),
    moments: Moments | Tensor | np.ndarray | None = None,
    **options: Unpack[OneMatrix],
) -> Solution:
    """LoftQ for one matrix ``(out, in)``: ``weight ≈ solution.dequantize() + solution.b @ solution.a``.

    >>> solution = quantize_weight(torch.randn(256, 512), bits=2, rank=16)
    >>> solution.error < solution.errors[0]
    True

    Args:
        weight: ``(out_features, in_features)``, of any floating-point type; a numpy array is copied.
        bits: 2, 3, 4 or 8; of code ``trellis`` a multiple of 1/16 from 1 to 4.
        rank: of the adapter.
        moments: second moments of the matrix's inputs, for calibrated presets: the result of
            ``statistics.moments(name)``, or your own ``H = E[x xᵀ]`` of shape ``(in, in)``, as :meth:`Moments.of`
            takes it.
        options: of the code, and of the solver.

    Raises: UsageError for options that do not fit, or if ``weight`` is no matrix of floating-point numbers;
        NumericalError for values that are not finite.
    """
    weight = checked(_tensor(weight), rank)
    moments = _moments(moments, weight.shape[1])
    code = options.get("code") or default("code")
    spec = solve_spec(options.get("preset"), calibrated=moments is not None, code=code, **fields_of(SolveSpec, options))
    quant = quant_spec(spec, **{**fields_of(QuantSpec, options), "bits": bits, "code": code})
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


@checks_names
@keywords
def get_peft_model(
    model: nn.Module,
    *,
    calibration: Statistics | str | Path | None = None,
    workers: int | None = None,
    progress: bool = True,
    **options: Unpack[Plans],
) -> nn.Module:
    """Turn a loaded full-precision model into a ``PeftModel`` with packed layers and the LoftQ initialization.

    The model is changed in place, layer by layer, so little memory is needed beside its own.

    Args:
        model: a transformers model, its weights in memory.
        calibration: statistics of this model, made by :func:`calibrate`, or their directory. Only names and shapes are
            compared with the model.
        workers: number of matrices solved at a time; by default as many as CPUs and memory allow, on a GPU one.
        options: of the plan, and of the solver.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained("org/model")
        >>> model = loftq.get_peft_model(model, bits=2, rank=16)
        >>> model.print_trainable_parameters()
    """
    check_whole("workers", workers or 0, 0)
    policy, statistics = make_policy(options, calibrated=calibration is not None), statistics_from(calibration)
    errors: list[float] = []
    with Bar(shown=progress) as bar:
        step = bar.begin(None)

        def advance(_: Matrix, solution: Solution) -> None:
            errors.append((solution.output_errors or solution.errors)[solution.kept])
            of = "output error" if statistics else "error"
            step(f"mean {of} {spell_error(sum(errors) / len(errors))}")

        wrapped, _ = convert(model, policy, workers, advance, statistics)
    return wrapped


@checks_names
@keywords
def calibrate(
    model: nn.Module | str | Path,
    data: str | Path | Iterable[str] | Iterable[Mapping[str, Any]],
    tokenizer: Any = None,
    *,
    output: str | Path | None = None,
    progress: bool = True,
    **options: Unpack[Collecting],
) -> Statistics:
    """Run texts through a model, and collect statistics of the inputs of its matrices.

    Statistics of a loaded model are kept in memory, those of a checkpoint in a directory.

    Args:
        model: a transformers model in full precision; or the local directory or hub id of a checkpoint, of which one
            block at a time is loaded.
        data: a file or data set as ``loftq calibrate --data`` takes it. For a loaded model also texts; or batches with
            ``input_ids`` and, if there is padding, ``attention_mask``, as a ``DataLoader`` gives them.
        tokenizer: for texts and a loaded model. Batches need none; a checkpoint has its own.
        output: only for a checkpoint: the directory to create. Statistics that the same call made earlier are kept.
        options: of the collection; ``device`` and ``revision`` only for a checkpoint.

    Example:
        >>> statistics = loftq.calibrate(model, "notes.txt", tokenizer, samples=64)
        >>> statistics.moments("model.layers.0.mlp.down_proj").tokens
        24576
        >>> statistics = loftq.calibrate("org/model", "notes.txt", output="STATS")
    """
    from loftq.calibration.calibrate import CalibrateOptions, calibrate_loaded, open_statistics
    from loftq.calibration.calibrate import calibrate as run

    loaded = not isinstance(model, (str, os.PathLike))
    if loaded and (
        odd := [name for name in ("output", "revision", "device") if {"output": output, **options}.get(name)]
    ):
        raise UsageError(f"{listed(odd)}: only for a checkpoint on disk, and this model is in memory; leave it out")
    if not loaded and (output is None or tokenizer is not None):
        raise UsageError(f"{model} is a checkpoint: give output=DIR for its statistics, and no tokenizer")
    chosen = CalibrateOptions(data="" if loaded else as_path("data", data), **fields_of(CalibrateOptions, options))
    with Bar("calibrate", "step", shown=progress) as bar:
        if loaded:
            return calibrate_loaded(model, data, tokenizer, chosen, bar.begin)
        place = Path(as_path("output", output))
        run(as_path("model", model), place, chosen, bar.begin)
        return open_statistics(place)


@checks_names
@keywords
def quantize(
    model: str | Path,
    output: str | Path,
    *,
    max_shard_bytes: int = 10**9,
    statistics: str | Path | None = None,
    progress: bool = True,
    **options: Unpack[Quantizing],
) -> Report:
    """Quantize a checkpoint and initialize its LoRA adapter, one matrix in memory at a time.

    The same call continues a stopped run.

    Args:
        model: a local directory, a hub id, or a URL that fsspec opens, such as ``s3://bucket/name``.
        output: the directory to create, or its URL.
        max_shard_bytes: size of the largest file of the backbone; 0: by the size of the model.
        statistics: directory to keep collected statistics in; by default each block's are dropped when it is solved.
        progress: whether to show bars.
        options: of the plan, the solver and the run.

    Returns: the manifest of the checkpoint.
    """
    if isinstance(model, nn.Module):
        raise UsageError(
            "model: wanted a directory or a hub id; a model in memory is quantized by loftq.get_peft_model"
        )
    model, output = as_path("model", model), Path(as_path("output", output))
    if isinstance(options.get("calibrate"), Statistics):
        raise UsageError("calibrate: wanted a file of texts or a directory of statistics, got statistics in memory")
    given = {**options, "max_shard_bytes": max_shard_bytes, "statistics": statistics}
    asked = quantize_options(with_paths(given, "calibrate", "curves", "statistics"))
    with Bar("calibrate", "step", shown=progress) as collecting, MatrixBar(shown=progress) as bar:
        return of_checkpoint(_quantize(model, output, asked, bar.begin, collecting.begin))


@checks_names
def replace_lora_weights(
    model: nn.Module,
    weights: str | Path,
    *,
    adapter_name: str = "default",
    calibration: Statistics | str | Path | None = None,
    svd: str = default("svd"),
    seed: int = default("seed"),
    revision: str | None = None,
    progress: bool = True,
) -> Report:
    """Initialize the LoRA layers of a ``PeftModel`` to cancel the quantization error of its frozen base.

    For each layer, ``s · B @ A`` becomes the best rank-r approximation of ``W - Q``: ``W`` is the original weight,
    ``Q`` what the frozen layer multiplies with, and ``s`` the layer's scaling. Earlier values of ``B`` and ``A`` are
    lost. The original is read one matrix at a time. All layers are replaced, or none if an error is raised.

    Args:
        model: made by ``peft.get_peft_model`` over a model that is quantized, or rounded, or pruned: by bitsandbytes,
            HQQ, GPTQ, AWQ, ``loftq`` or others whose layers run on their present device.
        weights: the full-precision checkpoint, a local directory or a hub id.
        adapter_name: the adapter to initialize; others keep their values.
        calibration: statistics of the original model, made by :func:`calibrate`, or their directory. Matrices without
            statistics are solved by the error of their weights.
        svd: ``auto``, ``exact`` or ``randomized``.
        seed: of the randomized SVD; each tensor's name is mixed into it.
        revision: branch, tag or commit of a hub id.
        progress: whether to show a bar.

    Returns: ``layers``, for each one ``name``, ``tensor``, ``shape``, ``rank``, ``scaling``, ``norm``, ``errors``
        (before and after, relative, with the values that the adapter now holds), ``kept`` (0 where B is zero, with a
        ``reason``); ``skipped``, modules that kept their adapter, and why; ``error_before`` and ``error`` of all layers
        together.

    Raises: UsageError for a model without plain LoRA layers; InputError if the weights are not the model's original.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained("org/model", quantization_config=BitsAndBytesConfig(...))
        >>> model = peft.get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
        >>> loftq.replace_lora_weights(model, "org/model")["error"]
    """
    original = resolve(as_path("weights", weights), revision)
    spec, statistics = SolveSpec(svd=svd, seed=seed), statistics_from(calibration, original)
    with MatrixBar(shown=progress) as bar:
        return of_start(replace(model, original, adapter_name, spec, statistics, bar.begin))


def statistics_from(calibration: Statistics | str | Path | None, original: Path | None = None) -> Statistics | None:
    """Statistics as they are, or those of a directory, which then have to be of the model in ``original``."""
    from loftq.calibration.calibrate import open_statistics, statistics_of

    if calibration is None or isinstance(calibration, Statistics):
        return calibration
    directory = Path(as_path("calibration", calibration))
    return statistics_of(directory, original) if original else open_statistics(directory)


def as_path(what: str, value: Any) -> str:
    """A path as it was written: a hub id looks like one, and ``./org/name`` is none."""
    if isinstance(value, nn.Module):
        raise UsageError(f"{what}: wanted a path, got {type(value).__name__} in memory; this call reads files")
    if not isinstance(value, (str, os.PathLike)):
        raise UsageError(f"{what}: wanted a path, got {type(value).__name__}")
    check_not_empty(what, os.fspath(value))
    return os.fspath(value)


def with_paths(given: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Options, those of them that are paths as :func:`as_path` gives them."""
    return {**given, **{name: as_path(name, given[name]) for name in names if given.get(name) is not None}}


def optional(what: str, value: Any) -> str | None:
    """:func:`as_path` for a path that may be left out."""
    return None if value is None else as_path(what, value)
