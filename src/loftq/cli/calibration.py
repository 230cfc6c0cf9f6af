"""The verb on statistics: calibrate."""

from dataclasses import replace
from typing import Annotated, Any

import typer

from loftq.cli.app import app
from loftq.cli.options import Json, Model, Output, print_json, quiet, takes
from loftq.errors import extra
from loftq.options import Collecting, fields_of
from loftq.report.bars import Bar


@app.command()
@takes(Collecting)
def calibrate(
    model: Model,
    output: Output,
    data: Annotated[
        str,
        typer.Option(
            help="Texts: a file (.txt, .jsonl, .json, .csv, .parquet, also with .gz), or a data set on the hub: "
            "ORG/NAME[:CONFIG].",
            show_default=False,
        ),
    ],
    as_json: Json = False,
    **given: Any,
) -> None:
    """Run texts through a model, block by block, and store statistics of the inputs of its matrices."""
    with extra("train"):
        from loftq.calibration.calibrate import CalibrateOptions
        from loftq.calibration.calibrate import calibrate as run
        from loftq.calibration.processes import begun
        from loftq.report.calibration import print_statistics, summary
    quiet()
    options = CalibrateOptions(data=data, **fields_of(CalibrateOptions, given))
    processes = begun(options.device)
    if processes is not None:
        options = replace(options, device=processes.device)
    first = processes is None or processes.rank == 0
    with Bar("calibrate", "step", shown=first) as bar:
        made = summary(run(model, output, options, bar.begin, processes))
    if not first:
        return
    if as_json:
        print_json(made)
    else:
        print_statistics(output, made, bar.began)
