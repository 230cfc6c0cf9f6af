"""The application that the verbs register with."""

from typing import Annotated

import typer

from loftq.version import __version__

app = typer.Typer(
    name="loftq",
    help="LoftQ: quantize a Hugging Face model to 2, 3, 4 or 8 bits, with a LoRA initialization that makes up for it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"loftq {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and leave.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass
