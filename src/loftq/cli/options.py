"""Options that several verbs have, and the checks of their values."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loftq.errors import UsageError

if TYPE_CHECKING:
    from loftq.plan import Policy

Model = Annotated[str, typer.Argument(help="A local model directory, or a hub id like org/name.", show_default=False)]
Directory = Annotated[Path, typer.Argument(help="A directory made by `loftq quantize`.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Bits = Annotated[
    str,
    typer.Option(
        help="2, 3, 4 or 8; an average between 2.0 and 4.0 (first layers 4 bits, the rest 2, as in the paper: 2.25, "
        "2.5, 3.0); or patterns with a default, 'layers.0-3=4,2'. 16 leaves a module dense."
    ),
]
Rank = Annotated[str, typer.Option(help="Rank of the adapter, or patterns with a default: 'mlp=32,16'.")]
Alpha = Annotated[
    float | None, typer.Option(help="lora_alpha; the rank if not given. The start does not depend on it.")
]
Code = Annotated[
    str,
    typer.Option(help="nf, lloyd (2 to 4 bits), uniform, uniform-tensor, affine; auto: nf, with fitted scales lloyd."),
]
BlockSize = Annotated[int, typer.Option(help="Weights of a row that share a scale.")]
ScaleDtype = Annotated[str | None, typer.Option(help="bfloat16, float16 or float32. [default: bfloat16; bnb: float32]")]
DoubleQuant = Annotated[bool, typer.Option("--double-quant", help="Quantize the scales too, as bitsandbytes does.")]
RankPolicy = Annotated[str, typer.Option(help="A rank too large for a matrix: refuse or clamp.")]
RsLora = Annotated[bool, typer.Option("--rslora", help="Scale by alpha / sqrt(rank).")]
Embeddings = Annotated[bool, typer.Option("--embeddings", help="Quantize embedding tables too.")]
MinCoverage = Annotated[float, typer.Option(help="Refuse if less of the layers' weights would be quantized.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="A recipe.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Instead of what the recipe says: seed=1 lora.rank=8.", show_default=False
    ),
]


def policy(**options: Any) -> "Policy":
    from loftq.plan import Policy
    from loftq.spec import QuantSpec

    choice("--rank-policy", options["rank_policy"], ("refuse", "clamp"))
    if not 0 <= options["min_coverage"] <= 1:
        raise UsageError(f"--min-coverage: {options['min_coverage']} is not between 0 and 1")
    if options["alpha"] is not None and not math.isfinite(options["alpha"]):
        raise UsageError(f"--alpha: {options['alpha']} is not a number to scale by")
    stored = {k: options[k] for k in ("code", "block_size", "scale_dtype", "double_quant") if k in options}
    QuantSpec(bits=2, **{k: v for k, v in stored.items() if v != "auto"})
    return Policy(**options)


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Around imports of packages that come with an extra."""
    try:
        yield
    except ModuleNotFoundError as e:
        if (e.name or "").partition(".")[0] == "loftq":
            raise
        raise UsageError(f"this verb needs {e.name}, which is not installed: pip install 'loftq[{name}]'") from e


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


def choice(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{option}: {value!r} is not one of {', '.join(allowed)}")


def at_least(option: str, value: int, low: int) -> int:
    if value < low:
        raise UsageError(f"{option}: {value} is less than {low}")
    return value


def check_device(device: str) -> None:
    import torch

    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise UsageError(f"--device {device!r} cannot be used: {str(e).splitlines()[0]}") from e


def parse_bytes(text: str) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = text[:-2], text[-2:].upper()
    if unit not in units or not number.replace(".", "", 1).isdecimal() or float(number) <= 0:
        raise UsageError(f"--max-shard-size: {text!r} is not a size like 500MB or 2GB")
    return int(float(number) * units[unit])
