"""The verb on statistics: calibrate."""

import json
from typing import Annotated, Any

import typer

from loftq.cli.app import app
from loftq.cli.bars import StepBar
from loftq.cli.options import Json, Model, Output, quiet, takes
from loftq.errors import extra
from loftq.options import check, check_choice, check_whole, default


@app.command()
@takes("device", "revision")
def calibrate(
    model: Model,
    output: Output,
    data: Annotated[
        str,
        typer.Option(
            help="Texts: .txt, .jsonl, .json, .csv or .parquet, also with .gz; or a data set of the hub: "
            "ORG/NAME[:CONFIG].",
            show_default=False,
        ),
    ],
    samples: Annotated[
        int, typer.Option(help="Rows of text, evenly from the whole; one in four is held out.")
    ] = default("calibration_samples"),
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
    as_json: Json = False,
    **given: Any,
) -> None:
    """Run texts through a model, block by block, and keep statistics of what its matrices are given."""
    with extra("train"):
        from loftq.calibration.calibrate import CalibrateOptions
        from loftq.calibration.calibrate import calibrate as run
        from loftq.formats.statistics import KINDS
        from loftq.report.calibration import print_statistics, summary
    check_choice("--kind", kind, KINDS)
    check("calibration_samples", samples, "--samples")
    check_whole("--max-length", max_length, 0)
    quiet()
    options = CalibrateOptions(
        data=data,
        kind=kind,
        samples=samples,
        max_length=max_length,
        column=column,
        **given,
    )
    with StepBar() as bar:
        made = summary(run(model, output, options, bar.begin))
    if as_json:
        print(json.dumps(made, indent=2))
    else:
        print_statistics(output, made, bar.began)
