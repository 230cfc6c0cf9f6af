"""The verbs of the command line as Python calls: plan, inspect, verify, status, start, merge, generate; train,
evaluate, compare.

Those that make or calibrate something in memory are in :mod:`loftq.api`. Options have the command line's names.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import Unpack

from loftq.api import as_path, optional, statistics_from, with_paths
from loftq.checkpoint.budget import check_budget, within_budget
from loftq.checkpoint.estimate import estimate as estimated
from loftq.checkpoint.manifest import read_manifest
from loftq.checkpoint.status import status as _status
from loftq.checkpoint.verify import verify as _verify
from loftq.errors import UsageError, checks_names, extra, option
from loftq.formats.remote import directory_of
from loftq.formats.statistics import Statistics
from loftq.frozen.start import start as _start
from loftq.frozen.start import start_options
from loftq.options import Plans, Starting, check_choice, check_whole, default, fields_of, keywords
from loftq.planning import Plan, make_policy
from loftq.report.bars import Bar, MatrixBar, RunBar, showing
from loftq.report.inspect import inspection
from loftq.report.report import Report, of_checkpoint, of_start
from loftq.report.status import line as status_line
from loftq.serving.merge import MergeOptions
from loftq.serving.merge import merge as _merge
from loftq.serving.options import Exporting, Generating, Merging
from loftq.serving.output import LARGEST_FILE
from loftq.sources.checkpoint import open_source, resolve
from loftq.spec import check_statistics
from loftq.spelled import spell_size

if TYPE_CHECKING:
    from loftq.finetune.comparison import Comparison
    from loftq.finetune.evaluate import Evaluation
    from loftq.finetune.recipe import Recipe
    from loftq.finetune.run import RunResult


@checks_names
@keywords
def plan(
    model: str | Path,
    *,
    calibration: Statistics | str | Path | None = None,
    curves: str | Path | None = None,
    estimate: bool = False,
    tokens: int = 2048,
    workers: int = default("workers"),
    revision: str | None = None,
    progress: bool = True,
    **options: Unpack[Plans],
) -> Plan:
    """Say how every tensor of a checkpoint would be quantized, or why not. Reads no weights, except with a budget.

    Args:
        model: a local directory, a hub id, or a URL such as ``s3://bucket/name``.
        calibration: with a budget: statistics of the model, or their directory. Errors are then those of the outputs.
        curves: with a budget: a JSON file of measured errors; errors of the same model in it are used again.
        estimate: also forecast time and memory of quantizing and training, as the plan's ``estimate``.
        tokens: with an estimate: number of tokens of a training batch, all sequences together.
        workers: with a budget: number of matrices measured at a time; with an estimate: number to forecast for. 0: as
            many as CPUs and memory allow.
        revision: branch, tag or commit of a hub id.
        options: of the plan, and of the solver.

    Raises: UsageError for options that do not fit; InputError if ``model`` is no full-precision checkpoint.

    Example:
        >>> plan = loftq.plan("org/model", bits=2, rank=8)
        >>> plan.coverage, {matrix.name: matrix.quant.bits for matrix in plan.matrices}
        >>> loftq.plan("org/model", budget="300MB").budget["chosen"]["error"]
        >>> loftq.plan("org/model", bits=2, estimate=True, tokens=4096).estimate["train"]["total"]
    """
    check_whole(option("workers"), workers, 0)
    policy, model = make_policy(options, calibrated=calibration is not None), as_path("model", model)
    check_whole("tokens", tokens, 1)
    source = open_source(model, policy, revision)
    statistics = statistics_from(calibration, source.directory)
    check_statistics(policy.solve, statistics and statistics.kind)
    if policy.budget:
        keep = None if curves is None else Path(as_path("curves", curves))
        check_budget(source, policy, keep)
        with MatrixBar("measuring", shown=progress) as bar:
            source = within_budget(source, policy, keep, statistics, workers=workers, begin=bar.begin)
    elif curves is not None or calibration is not None:
        raise UsageError(f"calibration and curves need a budget here; give one: {option('budget', 2.5)}")
    forecast = estimated(source, tokens, workers, statistics is not None) if estimate else None
    return replace(source.plan, estimate=forecast)


@checks_names
def inspect(directory: str | Path) -> Report:
    """Describe a LoftQ checkpoint: ``matrices`` (shape, bits, rank, bytes, errors, step), ``totals``, ``warnings``.

    The directory may be given by its URL.

    Raises: InputError for a directory that `loftq quantize` did not finish.
    """
    return of_checkpoint(inspection(read_manifest(directory_of("the directory", as_path("directory", directory)))))


@checks_names
def verify(directory: str | Path, *, progress: bool = True) -> Report:
    """Check a LoftQ checkpoint: the hashes of all files, the shapes of all tensors, and that all values are finite.

    The directory may be given by its URL; every file is then read once or twice.

    Returns: its manifest.

    Raises: InputError that lists everything that is wrong.
    """
    with Bar("verify", "read", shown=progress, delay=1) as bar:
        manifest = _verify(directory_of("the directory", as_path("directory", directory)), bar.begin)
    return of_checkpoint(manifest, f"{len(manifest['files'])} files, all good")


@checks_names
def status(directory: str | Path) -> Report:
    """Show the progress of a run of :func:`quantize` that other processes work on, or that was stopped.

    Args:
        directory: the run's output.

    Returns: ``state``, ``units`` and ``matrices`` (``done`` of ``all``), ``workers`` (``host``, ``pid``, ``state``, …)
        and ``seconds_left``. If processes share the work, the call takes some seconds, to see which are alive.

    Raises: InputError for a directory without a run.
    """
    found = _status(Path(as_path("directory", directory)))
    return Report(found, status_line(found))


@checks_names
@keywords
def start(
    base: str | Path,
    weights: str | Path,
    output: str | Path,
    *,
    calibration: Statistics | str | Path | None = None,
    base_revision: str | None = None,
    progress: bool = True,
    **options: Unpack[Starting],
) -> Report:
    """Initialize a LoRA adapter for a base that is quantized already, to cancel its quantization error.

    For a model in memory see :func:`replace_lora_weights`.

    Args:
        base: the quantized model, a directory or a hub id: by bitsandbytes, GPTQ, AWQ, HQQ, loftq, …
        weights: the full-precision model that ``base`` was made from, a directory or a hub id.
        output: the directory to create, for the adapter.
        calibration: statistics of the original, or their directory, to minimize the error of the outputs.
        base_revision: branch, tag or commit of ``base``, if it is a hub id; ``revision`` is that of ``weights``.
        options: of the adapter, and of the run.

    Returns: ``layers``, with the errors of each one before and after; ``error_before`` and ``error`` of all together.

    Raises: ConflictError if ``output`` is taken; InputError if ``weights`` is not the original of ``base``.
    """
    original = as_path("weights", weights)
    statistics = None
    if calibration is not None:
        statistics = statistics_from(calibration, resolve(original, options.get("revision")))
    asked = start_options(options, statistics, base_revision)
    place = Path(as_path("output", output))
    with MatrixBar(shown=progress) as bar:
        return of_start(_start(as_path("base", base), original, place, asked, bar.begin))


@checks_names
@keywords
def merge(
    directory: str | Path,
    output: str | Path,
    *,
    max_shard_bytes: int = LARGEST_FILE,
    progress: bool = True,
    **options: Unpack[Merging],
) -> Report:
    """Merge an adapter into the quantized weights, as a plain dense checkpoint of ``Q + s · B @ A``.

    One matrix is in memory at a time.

    Args:
        directory: made by :func:`quantize`, in any format.
        output: the directory to create.
        max_shard_bytes: size of the largest file.
        options: of the adapter, and of what is written.

    Returns: ``files``, with sizes and hashes, and ``identity``: what they were made of.

    Raises: InputError for an adapter of another model, or one that is more than LoRA; NumericalError for a value
        beyond ``dtype``; ConflictError if ``output`` is taken.
    """
    given = fields_of(MergeOptions, with_paths(options, "adapter"))
    asked = MergeOptions(max_shard_bytes=max_shard_bytes, **given)
    with Bar("merge", "tensor", shown=progress) as bar:
        made = _merge(Path(as_path("directory", directory)), Path(as_path("output", output)), asked, bar.begin)
    return Report(made, f"{_sizes(made)}, {asked.dtype}")


def _sizes(made: Mapping[str, Any]) -> str:
    size = sum(f["size"] for f in made["files"].values())
    return f"{len(made['files'])} files, {spell_size(size)}"


@checks_names
@keywords
def export(
    directory: str | Path,
    output: str | Path,
    *,
    to: str,
    progress: bool = True,
    **options: Unpack[Exporting],
) -> Report:
    """Write the files of other software with exactly the directory's codes, and the adapter in a file of its own.

    Args:
        directory: made by :func:`quantize` with ``serve``, which chooses codes that the files store exactly.
        output: the directory to create.
        to: ``gguf``, for llama.cpp and Ollama; ``compressed-tensors``, for vLLM and transformers; ``mlx``, for mlx-lm;
            ``onnx``, for ONNX Runtime; ``lora-for-original``: what training added, as an adapter of the original
            model; ``per-expert``: the adapter alone, with LoRA on each expert, as vLLM and SGLang read it.
        options: of the adapter, and of what is written.

    Returns: ``files``, ``identity``, and the ``commands`` that run the files, from inside the directory.

    Raises: InputError for a code, a model family or an adapter that the files cannot store exactly.
    """
    from loftq.serving.export import ExportOptions
    from loftq.serving.export import export as run

    asked = ExportOptions(to=to, **fields_of(ExportOptions, with_paths(options, "adapter", "converter")))
    with Bar("export", "tensor", shown=progress) as bar:
        made = run(Path(as_path("directory", directory)), Path(as_path("output", output)), asked, bar.begin)
    return Report(made, _sizes(made))


@checks_names
@keywords
def generate(
    target: str | Path,
    prompt: str | Sequence[Mapping[str, str]],
    *,
    told: Callable[[str], object] | None = None,
    **options: Unpack[Generating],
) -> str:
    """Generate the continuation of a text, or the answer to a chat.

    Args:
        target: a quantized directory, a run of :func:`train`, a trained adapter, or a dense model.
        prompt: a text to continue; or the messages of a chat, ``{"role": "user", "content": "…"}``.
        told: called with every piece of the text as it is generated.
        options: of the adapter, and of the sampling.

    Raises: UsageError for a chat without a template; InputError for an adapter of another base.
    """
    from loftq.serving.generate import GenerateOptions, Writer

    asked = GenerateOptions(**fields_of(GenerateOptions, options))
    writer = Writer(as_path("target", target), optional("adapter", options.get("adapter")), options.get("device"))
    return writer.write(prompt if isinstance(prompt, str) else [dict(m) for m in prompt], asked, told)


@checks_names
def train(
    recipe: str | Path | Mapping[str, Any],
    *,
    overrides: Mapping[str, Any] | None = None,
    output: str | Path | None = None,
    restart: bool = False,
    progress: bool = True,
) -> "RunResult":
    """Quantize if the recipe's method needs it, fine-tune, and evaluate. The same call continues a stopped run.

    Args:
        recipe: a YAML file, or its content as a mapping.
        overrides: values that replace the recipe's, by dotted key: ``{"seed": 1, "lora.rank": 8}``.
        output: directory of the run, instead of the recipe's.
        restart: begin again instead of continuing.

    Returns: metrics, losses, time and bytes, as in ``metrics.json``.

    Raises: UsageError and InputError for what does not fit, before anything is trained; ConflictError if the output
        belongs to another recipe; NumericalError if the loss is not finite.
    """
    asked = _recipe(recipe, overrides, output)
    from loftq.finetune.train import finetune

    with showing(progress), MatrixBar(shown=progress) as bar:
        return finetune(asked, resume=not restart, begin=bar.begin)


@checks_names
def evaluate(
    target: str | Path,
    *,
    task: str | Mapping[str, Any] | None = None,
    data: str | Path | None = None,
    splits: Sequence[str] = (),
    adapter: str | Path | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    sampling: str | None = None,
    progress: bool = True,
) -> "Evaluation":
    """Evaluate a run of :func:`train`, a dense model, or a quantized directory on a task.

    Args:
        target: a directory, or a hub id.
        task: a task's name, or a mapping: a task as in a recipe, or a recipe, whose data and lengths are used too. A
            run has its own.
        data: a directory with files named by split, instead of the task's or the run's data.
        splits: those to report on; by default the task's.
        adapter: a trained adapter to put on ``target``.
        batch_size: rows at a time; by default the run's, or 32.
        max_length: tokens of an input; by default the run's or the task's.
        sampling: how answers are written: ``greedy``, or ``paper`` (GSM8K's sampling).
        progress: whether to show a bar.

    Raises: InputError for a model that was never trained for the task.
    """
    if sampling is not None:
        check_choice(option("sampling"), sampling, ("greedy", "paper"))
    for name, count in (("batch_size", batch_size), ("max_length", max_length)):
        check_whole(option(name), 1 if count is None else count, 1)
    with extra("train"):
        from loftq.finetune.evaluate import evaluate as run
    with showing(progress):
        return run(
            as_path("target", target),
            task=dict(task) if isinstance(task, Mapping) else task,
            data=optional("data", data),
            splits=splits,
            adapter=None if adapter is None else Path(as_path("adapter", adapter)),
            batch_size=batch_size,
            max_length=max_length,
            generation=sampling,
        )


@checks_names
def compare(
    recipe: str | Path | Mapping[str, Any],
    *,
    overrides: Mapping[str, Any] | None = None,
    output: str | Path | None = None,
    progress: bool = True,
) -> "Comparison":
    """Fine-tune every arm of a recipe's section ``compare``. The same call continues a stopped comparison.

    Args:
        recipe, overrides: as :func:`train` takes them.
        output: directory of the comparison, instead of the recipe's.

    Returns: a row for every run; a notebook shows them as a table.

    Raises: as :func:`train`; a loss that is not finite is a result, and none of them.
    """
    asked = _recipe(recipe, overrides, output)
    from loftq.finetune.compare import compare as run
    from loftq.finetune.comparison import Comparison

    with showing(progress), RunBar(shown=progress) as bar:
        return Comparison(run(asked, bar.begin))


def _recipe(
    recipe: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None, output: str | Path | None
) -> "Recipe":
    with extra("train"):
        from loftq.finetune.recipe import KEYS, parse, read_mapping
    changes = {**(overrides or {}), **({} if output is None else {"output": as_path("output", output)})}
    if isinstance(recipe, Mapping):
        return parse(recipe, changes=changes)
    path = as_path("recipe", recipe)
    return parse(read_mapping(path, KEYS), path, changes)
