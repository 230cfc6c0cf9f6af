"""Verbs on checkpoints: plan, quantize, inspect, verify."""

import json
from pathlib import Path
from typing import Annotated

import typer

from loftq.cli.app import app
from loftq.cli.bars import Bar, StepBar
from loftq.cli.options import (
    Alpha,
    Bits,
    BlockSize,
    Code,
    Directory,
    DoubleQuant,
    Embeddings,
    Json,
    MinCoverage,
    Model,
    Rank,
    RankPolicy,
    Revision,
    RsLora,
    ScaleDtype,
    at_least,
    check_device,
    choice,
    parse_bytes,
    policy,
    quiet,
)
from loftq.errors import quoted


@app.command()
def plan(
    model: Model,
    bits: Bits = "4",
    rank: Rank = "16",
    alpha: Alpha = None,
    code: Code = "auto",
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

    asked = policy(
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
    source = open_source(model, asked, revision)
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
    code: Code = "auto",
    block_size: BlockSize = 64,
    scale_dtype: ScaleDtype = None,
    double_quant: DoubleQuant = False,
    steps: Annotated[
        int | None, typer.Option(help="Alternations T; the best step is kept. [default: the preset's, 5 for loftq]")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            "--method",
            help="loftq, descent, svd (one step), qlora (quantize, zero start); with --calibrate also qera-diag, "
            "qera-full, eora, cloq, projq, srr, lq-lora. [default: loftq; descent with --calibrate]",
        ),
    ] = None,
    order: Annotated[
        str | None, typer.Option(help="quantize-first, or svd-first (the paper's ablation). [default: the preset's]")
    ] = None,
    svd: Annotated[str, typer.Option(help="auto, exact or randomized.")] = "auto",
    scales: Annotated[
        str | None,
        typer.Option(
            help="By the code's formula (absmax), or fitted to the least error at the same bytes. "
            "[default: formula; with descent fitted]"
        ),
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|FILE|DATASET",
            help="Statistics made by `loftq calibrate`, or texts to make them from: a file, or ORG/NAME of the hub.",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Rows of text to calibrate on.")] = 128,
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
    from loftq.spec import PRESETS, solve_spec
    from loftq.workflows.quantize import QuantizeOptions
    from loftq.workflows.quantize import quantize as run

    if preset is not None:
        choice("--preset", preset, tuple(PRESETS))
    choice("--format", format, tuple(LAYOUTS))
    check_device(device)
    solver = solve_spec(preset, calibrate is not None, steps=steps, order=order, svd=svd, seed=seed, scales=scales)
    asked = policy(
        bits=bits,
        rank=rank,
        alpha=alpha,
        code="nf" if (format, code) == ("bnb", "auto") else code,
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
        policy=asked,
        format=format,
        workers=at_least("--workers", workers, 0),
        device=device,
        max_shard_bytes=parse_bytes(max_shard_size),
        overwrite=overwrite,
        revision=revision,
        task_type=task_type,
        calibrate=calibrate,
        calibration_samples=at_least("--samples", samples, 4),
    )
    quiet()
    with StepBar() as steps_bar, Bar() as bar:
        manifest = run(model, output, options, bar.begin, steps_bar.begin)
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
def verify(directory: Directory) -> None:
    """Check hashes, shapes and finiteness of every file, without loading the model."""
    from loftq.workflows.check import verify as run

    manifest = run(directory)
    size = sum(f["size"] for f in manifest["files"].values()) / 1e6
    counts = f"{len(manifest['files'])} files, {size:.1f} MB, {len(manifest['matrices'])} matrices"
    print(f"{quoted(directory, 400)}: {counts}: all good")
