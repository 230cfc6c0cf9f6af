"""Verbs on checkpoints: quantize, inspect, verify."""

import json
from pathlib import Path
from typing import Annotated

import typer

from loftq.cli.app import app
from loftq.cli.bars import Bar, StepBar
from loftq.cli.options import (
    AdapterDtype,
    Alpha,
    Bits,
    BlockSize,
    Budget,
    BudgetRanks,
    BudgetSolver,
    Calibrate,
    Code,
    Curves,
    Directory,
    DoubleQuant,
    Dtype,
    Embeddings,
    Json,
    MinCoverage,
    Model,
    Preset,
    Rank,
    RankPolicy,
    Revision,
    RsLora,
    ScaleDtype,
    Scales,
    Workers,
    at_least,
    extra,
    policy,
    quiet,
)
from loftq.errors import UsageError, quoted


@app.command()
def quantize(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to make.", show_default=False)],
    bits: Bits = "4",
    rank: Rank = "16",
    alpha: Alpha = None,
    code: Code = "auto",
    block_size: BlockSize = 64,
    scale_dtype: ScaleDtype = None,
    double_quant: DoubleQuant = False,
    preset: Preset = None,
    calibrate: Calibrate = None,
    samples: Annotated[
        int | None,
        typer.Option(help="Rows of text, of --calibrate FILE or DATASET. Default: 128.", show_default=False),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Alternations T; the best step is kept. Default: the preset's, 5 for fitted and loftq, 6 for descent.",
            show_default=False,
        ),
    ] = None,
    order: Annotated[
        str | None,
        typer.Option(
            help="quantize-first, or svd-first (the paper's ablation). Default: the preset's.", show_default=False
        ),
    ] = None,
    svd: Annotated[str, typer.Option(help="auto, exact or randomized.")] = "auto",
    scales: Scales = None,
    format: Annotated[
        str, typer.Option(help="loftq (packed), bnb (bitsandbytes NF4), or dense (dequantized).")
    ] = "loftq",
    rank_policy: RankPolicy = "refuse",
    rslora: RsLora = False,
    embeddings: Embeddings = False,
    dtype: Dtype = "auto",
    adapter_dtype: AdapterDtype = "bfloat16",
    min_coverage: MinCoverage = 0.5,
    budget: Budget = "",
    budget_ranks: BudgetRanks = "",
    budget_solver: BudgetSolver = "greedy",
    curves: Curves = None,
    workers: Workers = 0,
    device: Annotated[str, typer.Option(help="Where to solve, and to calibrate: cpu, cuda, cuda:1, …")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of all random numbers, together with each tensor's name.")] = 0,
    max_shard_size: Annotated[str, typer.Option(help="Largest file of the backbone: 500MB, 2GB.")] = "1GB",
    task_type: Annotated[str | None, typer.Option(help="PEFT task type to write into the adapter.")] = None,
    revision: Revision = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output of loftq.")] = False,
) -> None:
    """Make a LoftQ checkpoint: packed backbone, LoRA initialization, manifest, card. Continues where it was stopped."""
    given = locals()
    from loftq.checkpoint.quantize import QuantizeOptions
    from loftq.checkpoint.quantize import quantize as run
    from loftq.planning import parse_size
    from loftq.report.tables import print_summary
    from loftq.spec import solve_spec

    own = {"steps": steps, "order": order, "svd": svd, "seed": seed, "scales": scales}
    solver = solve_spec(preset, calibrated=calibrate is not None, code=code, **own)
    options = QuantizeOptions(
        policy=policy(given, solve=solver),
        format=format,
        workers=at_least("--workers", workers, 0),
        device=device,
        max_shard_bytes=parse_size("--max-shard-size", max_shard_size),
        overwrite=overwrite,
        revision=revision,
        task_type=task_type,
        calibrate=calibrate,
        calibration_samples=at_least("--samples", 128 if samples is None else samples, 4),
        curves=curves,
    )
    _prepare_texts(calibrate, samples)
    with StepBar() as collecting, Bar() as bar:
        manifest = run(model, output, options, bar.begin, collecting.begin)
    print_summary(output, manifest, bar.began)


def _prepare_texts(calibrate: str | None, samples: int | None) -> None:
    """What reading texts needs is there, if they are read; and ``--samples`` is of them."""
    from_texts = calibrate is not None and not Path(calibrate).is_dir()
    if samples is not None and not from_texts:
        raise UsageError("--samples is of texts; give some with --calibrate, or leave it out")
    if from_texts:
        with extra("train"):
            quiet()


@app.command()
def inspect(
    directory: Directory,
    as_json: Json = False,
    plot: Annotated[Path | None, typer.Option(help="Save a picture of the errors: errors.png.")] = None,
) -> None:
    """Show, per matrix, bits, rank, bytes, error per step and the step kept; and what the whole costs."""
    from loftq.checkpoint.manifest import read_manifest
    from loftq.report.figures import check_place
    from loftq.report.inspect import inspection
    from loftq.report.inspect import plot as draw
    from loftq.report.tables import print_inspection

    if plot:
        check_place(plot)
    inspected = inspection(read_manifest(directory))
    if plot:
        draw(inspected, plot)
    if as_json:
        print(json.dumps(inspected, indent=2))
    else:
        print_inspection(inspected)


@app.command()
def verify(directory: Directory) -> None:
    """Check hashes, shapes and finiteness of every file, without loading the model."""
    from loftq.checkpoint.verify import verify as run

    manifest = run(directory)
    size = sum(f["size"] for f in manifest["files"].values()) / 1e6
    counts = f"{len(manifest['files'])} files, {size:.1f} MB, {len(manifest['matrices'])} matrices"
    print(f"{quoted(directory, 400)}: {counts}: all good")
