"""Options that several verbs have, and the checks of their values."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from loftq.formats import strict_json
from loftq.options import (
    Calibration,
    Codes,
    Coverage,
    Decomposition,
    Dtypes,
    Option,
    Place,
    Preset,
    Ranks,
    Steps,
    Widths,
    is_text,
    rows,
)

F = TypeVar("F", bound=Callable[..., Any])
PANELS = {  # option -> its panel of the help; the others stand in the first one
    **dict.fromkeys(rows(Widths, "curves", Ranks), "Bits and rank"),
    **dict.fromkeys(rows(Preset, Steps, Decomposition, Calibration), "Method"),
    **dict.fromkeys(rows(Codes, Coverage, "serve", "format", Dtypes), "Storage"),
}

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A local model directory, or a hub id like org/name.", show_default=False),
]
ModelOrUrl = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A local model directory, a hub id like org/name, or a URL like s3://bucket/name.",
        show_default=False,
    ),
]
Directory = Annotated[
    Path, typer.Argument(metavar="DIRECTORY", help="A directory made by `loftq quantize`.", show_default=False)
]
DirectoryOrUrl = Annotated[
    Path,
    typer.Argument(metavar="DIRECTORY", help="A directory made by `loftq quantize`, or its URL.", show_default=False),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Directory to create.", show_default=False)]
OutputOrUrl = Annotated[
    Path,
    typer.Option(
        "--output", "-o", help="Directory to create, or its URL, such as s3://bucket/name.", show_default=False
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="A recipe file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Values that replace the recipe's: seed=1 lora.rank=8.", show_default=False
    ),
]


def takes(*asked: Any) -> Callable[[F], F]:
    """Give a verb options of the tables, by groups and names, before its own that may be left out.

    They come as keywords. What a preset, a format or a calibration decides about is None if it is not given.
    """

    def decorate(verb: F) -> F:
        named = [p for p in inspect.signature(verb).parameters.values() if p.kind != p.VAR_KEYWORD]
        own = [p.replace(kind=p.KEYWORD_ONLY) for p in named]
        added = [_parameter(name, *row) for name, row in rows(*asked).items()]
        parameters = sorted([*added, *own], key=lambda p: (p.default is not p.empty, p in own))
        verb.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return verb

    return decorate


def _parameter(name: str, kind: Any, option: Option) -> inspect.Parameter:
    default = option.left_out
    shown = default not in (None, "") and "Default:" not in option.help
    flags = option.flags or (f"--{name.replace('_', '-')}",)
    typed: Any = str if kind == Place or is_text(kind) else kind
    told = typer.Option(
        *flags, help=option.help, metavar=option.metavar, show_default=shown, rich_help_panel=PANELS.get(name)
    )
    annotation = Annotated[typed if default is not None else typed | None, told]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def print_json(value: Any) -> None:
    """A number that is not finite becomes null, for JSON has none."""
    print(json.dumps(strict_json.finite(value), indent=2))


def quiet() -> None:
    """No bars and advice of other libraries between ours."""
    import datasets

    quiet_transformers()
    datasets.disable_progress_bars()


def quiet_transformers() -> None:
    import warnings

    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
