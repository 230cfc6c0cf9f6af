"""The verb on models that are quantized already: start."""

from pathlib import Path
from typing import Annotated, Any

import typer

from loftq.cli.app import app
from loftq.cli.options import quiet_transformers, takes
from loftq.options import Starting


@app.command()
@takes(Starting)
def start(
    base: Annotated[
        str,
        typer.Argument(
            help="The quantized model, a directory or a hub id: by bitsandbytes, GPTQ, AWQ, HQQ, loftq, …",
            show_default=False,
        ),
    ],
    weights: Annotated[
        str, typer.Option(help="The full-precision model that it was made from, a directory or a hub id.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Adapter directory to make.", show_default=False)],
    calibrate: Annotated[
        Path | None, typer.Option(help="Statistics of the original, by `loftq calibrate`: least error of the outputs.")
    ] = None,
    base_revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of BASE, if a hub id.")] = None,
    **given: Any,
) -> None:
    """Make the adapter that makes up for the quantization of a model that is quantized already, by whatever method."""
    from loftq import verbs
    from loftq.report.tables import print_start

    quiet_transformers()
    report = verbs.start(base, weights, output, calibration=calibrate, base_revision=base_revision, **given)
    print_start(output, report)
