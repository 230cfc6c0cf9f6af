"""The application that the verbs register with."""

from typing import Annotated, Any

import typer
import typer.core

from loftq.formats.regular import check_not_empty
from loftq.version import __version__

TEXTS = ("prompt", "system")  # options that may be empty: what is said to a model
VERBS = {  # verb -> its panel of the help, in the order in which a newcomer needs them
    **dict.fromkeys(("plan", "quantize", "inspect", "status", "verify", "calibrate", "start"), "Quantize"),
    **dict.fromkeys(("train", "evaluate", "compare"), "Train"),
    **dict.fromkeys(("generate", "merge", "export"), "After training"),
}


class Verb(typer.core.TyperCommand):
    """A command no argument or option of which may be empty: typer makes the current directory of an empty path."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given, *_ = self.make_parser(ctx).parse_args(args=list(args))
        for parameter in self.params:
            value = given.get(parameter.name)
            what = (
                parameter.opts[0]
                if parameter.opts[0].startswith("-")
                else parameter.metavar or parameter.opts[0].upper()
            )
            if isinstance(value, (str, list)) and parameter.name not in TEXTS:
                for one in [value] if isinstance(value, str) else value:
                    check_not_empty(what, one, "a value")
        return super().parse_args(ctx, args)


class _Verbs(typer.core.TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)


class _App(typer.Typer):
    """An application whose commands are verbs."""

    def command(self, *args: Any, **options: Any) -> Any:
        def register(verb: Any) -> Any:
            panel = VERBS[verb.__name__]
            return super(_App, self).command(*args, cls=Verb, rich_help_panel=panel, **options)(verb)

        return register


app = _App(
    name="loftq",
    cls=_Verbs,
    help="LoftQ: quantize a Hugging Face model to 1 to 8 bits, and initialize LoRA to cancel the error.",
    epilog="Begin with: loftq plan MODEL --bits 2",
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
