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
            metavar="BASE",
            help="The quantized base, a directory or a hub id: by bitsandbytes, GPTQ, AWQ, HQQ, loftq, …",
            show_default=False,
        ),
    ],
    weights: Annotated[
        str, typer.Option(help="The full-precision model that the base was made from, a directory or a hub id.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory to create, for the adapter.", show_default=False)
    ],
    calibrate: Annotated[
        Path | None,
        typer.Option(help="Minimize the error of the outputs: a directory of `loftq calibrate`, of the original."),
    ] = None,
    base_revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the base on the hub.")] = None,
    **given: Any,
) -> None:
    """Initialize a LoRA adapter for a base that is quantized already, to cancel its quantization error."""
    from loftq import verbs
    from loftq.report.tables import print_start

    quiet_transformers()
    report = verbs.start(base, weights, output, calibration=calibrate, base_revision=base_revision, **given)
    print_start(output, report)
