"""The command line: a verb is a signature, a call and a print."""

import contextlib
import dataclasses
import json
import logging
import math
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from loftq.errors import Interrupted, LoftqError, StorageError, UsageError, quoted

if TYPE_CHECKING:
    from loftq.plan import Policy

app = typer.Typer(
    name="loftq",
    help="LoftQ: quantize a Hugging Face model to 2, 3, 4 or 8 bits, with the LoRA start that makes up for it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Argument(help="A local model directory, or a hub id like org/name.", show_default=False)]
Directory = Annotated[Path, typer.Argument(help="A directory made by `loftq quantize`.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Bits = Annotated[
    str,
    typer.Option(
        help="2, 3, 4 or 8; an average between 2.0 and 4.0 (first layers 4 bits, the rest 2, as in the paper: 2.25, "
        "2.5, 3.0); or patterns with a default, 'layers.0-3=4,2'. 16 leaves a module dense."
    ),
]
Rank = Annotated[str, typer.Option(help="Rank of the adapter, or patterns with a default: 'mlp=32,16'.")]
Alpha = Annotated[
    float | None, typer.Option(help="lora_alpha; the rank if not given. The start does not depend on it.")
]
Code = Annotated[str, typer.Option(help="nf, lloyd (2 to 4 bits), uniform, uniform-tensor or affine.")]
BlockSize = Annotated[int, typer.Option(help="Weights of a row that share a scale.")]
ScaleDtype = Annotated[str | None, typer.Option(help="bfloat16, float16 or float32. [default: bfloat16; bnb: float32]")]
DoubleQuant = Annotated[bool, typer.Option("--double-quant", help="Quantize the scales too, as bitsandbytes does.")]
RankPolicy = Annotated[str, typer.Option(help="A rank too large for a matrix: refuse or clamp.")]
RsLora = Annotated[bool, typer.Option("--rslora", help="Scale by alpha / sqrt(rank).")]
Embeddings = Annotated[bool, typer.Option("--embeddings", help="Quantize embedding tables too.")]
MinCoverage = Annotated[float, typer.Option(help="Refuse if less of the layers' weights would be quantized.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="A recipe.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Instead of what the recipe says: seed=1 lora.rank=8.", show_default=False
    ),
]


@app.command()
def plan(
    model: Model,
    bits: Bits = "4",
    rank: Rank = "16",
    alpha: Alpha = None,
    code: Code = "nf",
    block_size: BlockSize = 64,
    scale_dtype: ScaleDtype = None,
    double_quant: DoubleQuant = False,
    rank_policy: RankPolicy = "refuse",
    rslora: RsLora = False,
    embeddings: Embeddings = False,
    min_coverage: MinCoverage = 0.5,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Show, for every tensor, how it would be quantized or why not. Reads no weights."""
    from loftq.report.tables import print_plan
    from loftq.workflows.source import open_source, plan_table

    policy = _policy(
        bits=bits,
        rank=rank,
        alpha=alpha,
        code=code,
        block_size=block_size,
        scale_dtype=scale_dtype or "bfloat16",
        double_quant=double_quant,
        rank_policy=rank_policy,
        rslora=rslora,
        embeddings=embeddings,
        min_coverage=min_coverage,
    )
    source = open_source(model, policy, revision)
    rows = plan_table(source.plan)
    if as_json:
        print(json.dumps({"tensors": rows, "coverage": source.plan.coverage, "digest": source.plan.digest()}, indent=2))
    else:
        print_plan(rows, source.plan.coverage)


@app.command()
def quantize(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to make.", show_default=False)],
    bits: Bits = "4",
    rank: Rank = "16",
    alpha: Alpha = None,
    code: Code = "nf",
    block_size: BlockSize = 64,
    scale_dtype: ScaleDtype = None,
    double_quant: DoubleQuant = False,
    steps: Annotated[int, typer.Option(help="Alternations T; the best step is kept.")] = 5,
    method: Annotated[str, typer.Option(help="loftq, svd (one step) or qlora (quantize, zero start).")] = "loftq",
    order: Annotated[str, typer.Option(help="quantize-first, or svd-first (the paper's ablation).")] = "quantize-first",
    svd: Annotated[str, typer.Option(help="auto, exact or randomized.")] = "auto",
    scales: Annotated[
        str, typer.Option(help="By the code's formula (absmax), or fitted to the least error at the same bytes.")
    ] = "formula",
    format: Annotated[
        str, typer.Option(help="loftq (packed), bnb (bitsandbytes NF4), or dense (dequantized).")
    ] = "loftq",
    rank_policy: RankPolicy = "refuse",
    rslora: RsLora = False,
    embeddings: Embeddings = False,
    min_coverage: MinCoverage = 0.5,
    workers: Annotated[int, typer.Option(help="Matrices worked on at a time. [default: one per core]")] = 0,
    device: Annotated[str, typer.Option(help="Where to solve: cpu, cuda, cuda:1, …")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seeds random starts, together with each tensor's name.")] = 0,
    max_shard_size: Annotated[str, typer.Option(help="Largest file of the backbone: 500MB, 2GB.")] = "1GB",
    task_type: Annotated[str | None, typer.Option(help="PEFT task type to write into the adapter.")] = None,
    revision: Revision = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output of loftq.")] = False,
) -> None:
    """Make a LoftQ checkpoint: packed backbone, LoRA start, manifest, model card. Continues where it was stopped."""
    from loftq.formats.layouts import LAYOUTS
    from loftq.report.tables import print_summary
    from loftq.spec import SolveSpec
    from loftq.workflows.quantize import QuantizeOptions
    from loftq.workflows.quantize import quantize as run

    _choice("--method", method, ("loftq", "svd", "qlora"))
    _choice("--format", format, tuple(LAYOUTS))
    _check_device(device)
    solver = SolveSpec(steps={"svd": 1, "qlora": 0}.get(method, steps), order=order, svd=svd, seed=seed, scales=scales)
    policy = _policy(
        bits=bits,
        rank=rank,
        alpha=alpha,
        code=code,
        block_size=block_size,
        scale_dtype=scale_dtype or ("float32" if format == "bnb" else "bfloat16"),
        double_quant=double_quant,
        rank_policy=rank_policy,
        rslora=rslora,
        embeddings=embeddings,
        min_coverage=min_coverage,
        solve=solver,
    )
    options = QuantizeOptions(
        policy=policy,
        format=format,
        workers=_at_least("--workers", workers, 0),
        device=device,
        max_shard_bytes=_bytes(max_shard_size),
        overwrite=overwrite,
        revision=revision,
        task_type=task_type,
    )
    with _Bar() as bar:
        manifest = run(model, output, options, bar.begin)
    print_summary(output, manifest, bar.began)


@app.command()
def inspect(
    directory: Directory,
    as_json: Json = False,
    plot: Annotated[Path | None, typer.Option(help="Save a picture of the errors: errors.png.")] = None,
) -> None:
    """Show, per matrix, bits, rank, bytes, error per step and the step kept; and what the whole costs."""
    from loftq.report.inspect import inspection
    from loftq.report.inspect import plot as draw
    from loftq.report.tables import print_inspection
    from loftq.workflows.check import read_manifest

    inspected = inspection(read_manifest(directory))
    if plot:
        draw(inspected, plot)
    if as_json:
        print(json.dumps(inspected, indent=2))
    else:
        print_inspection(inspected)


@app.command()
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory of the run. [default: the recipe's]")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Begin again instead of continuing.")] = False,
    as_json: Json = False,
) -> None:
    """Fine-tune as a recipe says, and evaluate; quantizes first where the method wants it. Continues if stopped."""
    with _extra("train"):
        from loftq.recipe import read
        from loftq.report.tables import print_metrics
        from loftq.workflows.finetune import finetune
    _quiet()
    asked = read(recipe, overrides or ())
    if output is not None:
        asked = asked.changed(output=str(output))
    with _Bar() as bar:
        result = finetune(asked, resume=not restart, begin=bar.begin)
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        print(json.dumps(dataclasses.asdict(result), indent=2))
    else:
        print_metrics(f"{result.task} of {quoted(asked.output, 400)}", result.splits, result.metrics)


@app.command()
def evaluate(
    target: Annotated[
        str,
        typer.Argument(help="A run of `loftq train`, a dense model, or a quantized directory.", show_default=False),
    ],
    task: Annotated[str | None, typer.Option(help="Name of a task. [default: the run's]")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Directory with files named by split. [default: the run's or the task's data]")
    ] = None,
    split: Annotated[list[str] | None, typer.Option(help="A split to report on; may be repeated.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="A trained adapter to put on the model.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows at a time. [default: the run's, or 32]")] = 0,
    max_length: Annotated[int, typer.Option(help="Tokens of an input. [default: the run's or the task's]")] = 0,
    sampling: Annotated[
        str | None, typer.Option(help="How answers are written: greedy, or paper (GSM8K's sampling). [default: greedy]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Evaluate a run, a model or a quantized directory on a task."""
    with _extra("train"):
        from loftq.report.tables import print_metrics
        from loftq.workflows.evaluate import evaluate as run
    if sampling is not None:
        _choice("--sampling", sampling, ("greedy", "paper"))
    _quiet()
    found = run(
        target,
        task=task,
        data=None if data is None else str(data),
        splits=split or (),
        adapter=adapter,
        batch_size=_at_least("--batch-size", batch_size, 0) or None,
        max_length=_at_least("--max-length", max_length, 0) or None,
        generation=sampling,
    )
    if as_json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
    else:
        print_metrics(f"{found.task} of {quoted(target, 400)}", found.splits, found.metrics)


@app.command()
def compare(
    recipe: RecipeFile,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory of the comparison. [default: the recipe's]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Fine-tune every arm of a recipe's section compare, and show them side by side. Continues if stopped."""
    with _extra("train"):
        from loftq.recipe import read
        from loftq.report.comparison import print_comparison
        from loftq.workflows.compare import compare as run
    _quiet()
    asked = read(recipe, overrides or ())
    if output is not None:
        asked = asked.changed(output=str(output))
    with _RunBar() as bar:
        rows = run(asked, bar.begin)
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        print_comparison(rows)
        print(f"\nSaved to {quoted(asked.output, 400)}: comparison.md, losses.png, bytes.png; every run in rows.jsonl.")


@app.command()
def verify(directory: Directory) -> None:
    """Check hashes, shapes and finiteness of every file, without loading the model."""
    from loftq.workflows.check import verify as run

    manifest = run(directory)
    size = sum(f["size"] for f in manifest["files"].values()) / 1e6
    counts = f"{len(manifest['files'])} files, {size:.1f} MB, {len(manifest['matrices'])} matrices"
    print(f"{quoted(directory, 400)}: {counts}: all good")


def _policy(**options: Any) -> "Policy":
    from loftq.plan import Policy
    from loftq.spec import QuantSpec

    _choice("--rank-policy", options["rank_policy"], ("refuse", "clamp"))
    if not 0 <= options["min_coverage"] <= 1:
        raise UsageError(f"--min-coverage: {options['min_coverage']} is not between 0 and 1")
    if options["alpha"] is not None and not math.isfinite(options["alpha"]):
        raise UsageError(f"--alpha: {options['alpha']} is not a number to scale by")
    QuantSpec(bits=2, **{k: options[k] for k in ("code", "block_size", "scale_dtype", "double_quant")})
    return Policy(**options)


@contextlib.contextmanager
def _extra(name: str) -> Iterator[None]:
    """Around imports of packages that come with an extra."""
    try:
        yield
    except ModuleNotFoundError as e:
        if (e.name or "").partition(".")[0] == "loftq":
            raise
        raise UsageError(f"this verb needs {e.name}, which is not installed: pip install 'loftq[{name}]'") from e


def _quiet() -> None:
    """No bars and advice of other libraries between ours."""
    import warnings

    import datasets
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()


def _choice(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{option}: {value!r} is not one of {', '.join(allowed)}")


def _at_least(option: str, value: int, low: int) -> int:
    if value < low:
        raise UsageError(f"{option}: {value} is less than {low}")
    return value


def _check_device(device: str) -> None:
    import torch

    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise UsageError(f"--device {device!r} cannot be used: {str(e).splitlines()[0]}") from e


def _bytes(text: str) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = text[:-2], text[-2:].upper()
    if unit not in units or not number.replace(".", "", 1).isdecimal() or float(number) <= 0:
        raise UsageError(f"--max-shard-size: {text!r} is not a size like 500MB or 2GB")
    return int(float(number) * units[unit])


class _Bar:
    """A progress bar with matrices, time left, and the relative error so far."""

    def __init__(self) -> None:
        self.began = False
        self._bar: Any = None
        self._error = self._norm = 0.0

    def begin(self, total: int, done: int) -> Any:
        from tqdm.auto import tqdm

        self.began = True
        self._bar = tqdm(total=total, initial=done, unit="matrix", desc="LoftQ", dynamic_ncols=True)
        return self._advance

    def _advance(self, report: dict[str, Any]) -> None:
        self._error += (report["errors"][report["kept"]] * report["norm"]) ** 2
        self._norm += report["norm"] ** 2
        if self._norm:
            self._bar.set_postfix_str(f"error {(self._error / self._norm) ** 0.5:.4f}", refresh=False)
        self._bar.update()
        if self._bar.n >= self._bar.total:  # what follows may have a bar of its own
            self._bar.close()

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


class _RunBar:
    """A progress bar over the runs of a comparison, with the last one's result."""

    def __init__(self) -> None:
        self._bar: Any = None

    def begin(self, total: int) -> Any:
        from tqdm.auto import tqdm

        self._bar = tqdm(total=total, unit="run", desc="compare", dynamic_ncols=True)
        return self._advance

    def _advance(self, row: dict[str, Any]) -> None:
        metric = row["metric"]
        result = "N.A." if row["failed"] else f"{metric} {row['metrics'][metric]:.4g}"
        self._bar.set_postfix_str(
            f"{row['settings']['method']} {row['settings']['bits']} bits: {result}", refresh=False
        )
        self._bar.update()

    def __enter__(self) -> "_RunBar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def _stop(number: int, _: object) -> NoReturn:
    """End at once, with nothing cleaned up: whatever a killed run leaves, the same command continues from it."""
    with contextlib.suppress(OSError):
        os.write(2, b"\n")  # below the progress bar
    _say("stopped by a signal; run the same command again to continue", Interrupted.label)
    os._exit(Interrupted.exit_code)


def main() -> NoReturn:
    """Run the command line: for every error one line on stderr and an exit code; a traceback if LOFTQ_DEBUG is set."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("loftq: %(levelname)s: %(message)s"))
    logging.getLogger("loftq").addHandler(handler)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it; its advice would cut the bar in two
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, _stop)
    code = _run()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError as e:
        code = code or _failed(e)
    os._exit(code)  # a matrix that is still being solved after a failure is not waited for


def _run() -> int:
    """The exit code of the command in ``sys.argv``."""
    try:
        app(standalone_mode=False)
        return 0
    except typer.Exit as e:
        return e.exit_code
    except SystemExit:  # how rich and typer say that nobody reads their output
        return _failed(BrokenPipeError())
    except Exception as e:
        return _failed(e)


def _failed(e: Exception) -> int:
    """Say what went wrong; the exit code for it."""
    if os.environ.get("LOFTQ_DEBUG"):
        import traceback

        traceback.print_exception(e)
    if isinstance(e, LoftqError):
        kind, text = type(e), str(e)
    elif isinstance(e, BrokenPipeError):
        kind, text = Interrupted, "nobody reads the output any more; run the same command again to continue"
    elif isinstance(e, OSError):
        kind, text = StorageError, str(e)
    elif isinstance(e, MemoryError):
        kind, text = StorageError, "not enough memory; use fewer --workers"
    elif type(e).__module__.partition(".")[0] in ("click", "typer"):
        kind, text = UsageError, getattr(e, "format_message", e.__str__)() or "no command given"
    else:
        kind, text = LoftqError, f"{type(e).__name__}: {e}; this is a bug of loftq, please report it"
    _say(text, kind.label)
    return kind.exit_code


def _say(text: object, label: str) -> None:
    """One line on stderr, past Python's buffers: a signal may come while they are in use, or the reader be gone."""
    line = quoted(" ".join(str(text).split()), 4000)
    with contextlib.suppress(OSError):
        os.write(2, f"loftq: error[{label}]: {line}\n".encode("utf-8", "replace"))
