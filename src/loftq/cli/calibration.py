"""The verb on statistics: calibrate."""

import json
from pathlib import Path
from typing import Annotated

import typer

from loftq.cli.app import app
from loftq.cli.bars import StepBar
from loftq.cli.options import Json, Model, Revision, at_least, choice, extra, quiet


@app.command()
def calibrate(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to make.", show_default=False)],
    data: Annotated[
        str,
        typer.Option(
            help="Texts: .txt, .jsonl, .json, .csv or .parquet, also with .gz; or a data set of the hub: "
            "ORG/NAME[:CONFIG].",
            show_default=False,
        ),
    ],
    samples: Annotated[int, typer.Option(help="Rows of text, evenly from the whole; one in four is held out.")] = 128,
    max_length: Annotated[
        int, typer.Option(help="Tokens of a row; 512 if not given, or what the model takes.", show_default=False)
    ] = 0,
    kind: Annotated[
        str,
        typer.Option(
            help="full: second moments of inputs; diagonal: of every feature alone, with little memory; fisher: "
            "squared gradients of the loss, with the whole model in memory."
        ),
    ] = "full",
    column: Annotated[
        str | None, typer.Option(help="Column of the texts (text, if not given), or two, 'a,b', tokenized as a pair.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to run the model: cpu, cuda, cuda:1, …")] = "cpu",
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Run texts through a model, block by block, and keep statistics of what its matrices are given."""
    with extra("train"):
        from loftq.calibration.calibrate import CalibrateOptions
        from loftq.calibration.calibrate import calibrate as run
        from loftq.formats.statistics import KINDS
        from loftq.report.calibration import print_statistics, summary
    choice("--kind", kind, KINDS)
    quiet()
    options = CalibrateOptions(
        data=data,
        kind=kind,
        samples=at_least("--samples", samples, 4),
        max_length=at_least("--max-length", max_length, 0),
        column=column,
        revision=revision,
        device=device,
    )
    with StepBar() as bar:
        made = summary(run(model, output, options, bar.begin))
    if as_json:
        print(json.dumps(made, indent=2))
    else:
        print_statistics(output, made, bar.began)
