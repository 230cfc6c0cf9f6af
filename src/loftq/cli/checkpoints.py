"""Verbs on checkpoints: quantize, status, inspect, verify."""

from pathlib import Path
from typing import Annotated, Any

import typer

from loftq.cli.app import app
from loftq.cli.options import DirectoryOrUrl, Json, ModelOrUrl, OutputOrUrl, print_json, quiet, takes
from loftq.errors import UsageError, extra
from loftq.options import Calibration, Dtypes, Ranks, Solver, Storage, Work, check
from loftq.report.bars import Bar, MatrixBar


@app.command()
@takes("bits", Ranks, Storage, Dtypes, Solver, Calibration, Work)
def quantize(
    model: ModelOrUrl,
    output: OutputOrUrl,
    max_shard_size: Annotated[
        str, typer.Option(help="Size of the largest file of the backbone: 500MB, 2GB; auto: by the model's size.")
    ] = "1GB",
    **given: Any,
) -> None:
    """Quantize a model and initialize its LoRA adapter. The same command continues a stopped run."""
    from loftq.checkpoint.quantize import quantize as run
    from loftq.checkpoint.quantize import quantize_options
    from loftq.planning import parse_size
    from loftq.report.tables import print_summary

    if given["calibration_samples"] is not None:
        check("calibration_samples", given["calibration_samples"], "--samples")
    largest = 0 if max_shard_size == "auto" else parse_size("--max-shard-size", max_shard_size)
    options = quantize_options({**given, "max_shard_bytes": largest})
    _prepare_texts(given["calibrate"], given["calibration_samples"])
    with Bar("calibrate", "step") as collecting, MatrixBar() as bar:
        manifest = run(model, output, options, bar.begin, collecting.begin)
    print_summary(output, manifest, bar.began)


def _prepare_texts(calibrate: str | None, samples: int | None) -> None:
    """What reading texts needs is there, if they are read; and ``--samples`` is of them."""
    from_texts = calibrate is not None and not Path(calibrate).is_dir()
    if samples is not None and not from_texts:
        raise UsageError("--samples needs texts in --calibrate; give some, or leave it out")
    if from_texts:
        with extra("train"):
            quiet()


@app.command()
def status(
    directory: Annotated[
        Path, typer.Argument(metavar="DIRECTORY", help="The --output of `loftq quantize`.", show_default=False)
    ],
    as_json: Json = False,
) -> None:
    """Show the progress of a `loftq quantize`: what is done, by which processes, and how long the rest takes."""
    from loftq.checkpoint.status import status as run
    from loftq.report.status import print_status

    found = run(directory)
    if as_json:
        print_json(found)
    else:
        print_status(directory, found)


@app.command()
def inspect(
    directory: DirectoryOrUrl,
    as_json: Json = False,
    plot: Annotated[Path | None, typer.Option(help="Save a plot of the errors: errors.png.")] = None,
) -> None:
    """Show bits, rank, bytes and errors of every matrix, and the totals."""
    from loftq.checkpoint.manifest import read_manifest
    from loftq.formats.remote import directory_of
    from loftq.report.figures import check_place
    from loftq.report.inspect import inspection
    from loftq.report.inspect import plot as draw
    from loftq.report.tables import print_inspection

    if plot:
        check_place(plot)
    inspected = inspection(read_manifest(directory_of("the directory", directory)))
    if plot:
        draw(inspected, plot)
    if as_json:
        print_json(inspected)
    else:
        print_inspection(inspected)


@app.command()
def verify(directory: DirectoryOrUrl) -> None:
    """Check the hashes of all files, the shapes of all tensors, and that all values are finite."""
    from loftq.checkpoint.verify import verify as run
    from loftq.formats.regular import shown
    from loftq.formats.remote import directory_of
    from loftq.spelled import spell_size

    with Bar("verify", "read", delay=1) as bar:
        manifest = run(directory_of("the directory", directory), bar.begin)
    size = spell_size(sum(f["size"] for f in manifest["files"].values()))
    counts = f"{len(manifest['files'])} files, {size}, {len(manifest['matrices'])} matrices"
    print(f"{shown(directory)}: {counts}: all good")
