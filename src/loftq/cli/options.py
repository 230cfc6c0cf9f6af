"""Options that several verbs have, and the checks of their values."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loftq.errors import UsageError

if TYPE_CHECKING:
    from loftq.planning import Policy

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
    float | None, typer.Option(help="lora_alpha; the rank if not given. The initialization does not depend on it.")
]
Code = Annotated[
    str,
    typer.Option(
        help="nf, lloyd (2 to 4 bits), uniform, uniform-tensor, affine; auto: nf, at 2 bits with fitted scales lloyd."
    ),
]
BlockSize = Annotated[int, typer.Option(help="Weights of a row that share a scale.")]
ScaleDtype = Annotated[str | None, typer.Option(help="bfloat16, float16 or float32. Default: bfloat16; bnb: float32.")]
DoubleQuant = Annotated[bool, typer.Option("--double-quant", help="Quantize the scales too, as bitsandbytes does.")]
RankPolicy = Annotated[str, typer.Option(help="A rank too large for a matrix: refuse or clamp.")]
RsLora = Annotated[bool, typer.Option("--rslora", help="Scale by alpha / sqrt(rank).")]
Embeddings = Annotated[bool, typer.Option("--embeddings", help="Quantize embedding tables too.")]
Dtype = Annotated[
    str,
    typer.Option(
        help="Of what is not packed: auto (16 bits where the source has 32: bfloat16), bfloat16, float16, or source."
    ),
]
AdapterDtype = Annotated[str, typer.Option(help="Of the adapter's files: bfloat16, float16 or float32.")]
MinCoverage = Annotated[float, typer.Option(help="Refuse if less of the layers' weights would be quantized.")]
Preset = Annotated[
    str | None,
    typer.Option(
        "--preset",
        "--method",
        help="loftq (the paper's), fitted, descent, svd (one step), qlora (quantize, zero initialization); with "
        "--calibrate also qera-diag, qera-full, eora, cloq, projq, srr, lq-lora. Default: fitted; "
        "with --calibrate descent.",
        show_default=False,
    ),
]
Scales = Annotated[
    str | None,
    typer.Option(
        help="By the code's formula (absmax), or fitted to the least error at the same bytes. Default: the preset's; "
        "fitted for fitted and descent.",
        show_default=False,
    ),
]
Calibrate = Annotated[
    str | None,
    typer.Option(
        metavar="DIR|FILE|DATASET",
        help="Statistics made by `loftq calibrate`, or texts to make them from: a file, or ORG/NAME of the hub.",
        show_default=False,
    ),
]
Workers = Annotated[
    int,
    typer.Option(
        help="Matrices worked on at a time. Default: as many as CPUs and memory allow; on a GPU one.",
        show_default=False,
    ),
]
Budget = Annotated[
    str,
    typer.Option(
        help="What to spend: 2.5 (average stored bits of a quantized weight, scales included) or 300MB (all tensors, "
        "with the adapter). Bits and block of every matrix are chosen for the least error in all, which is measured "
        "first, on the weights. Of --bits only patterns count.",
        show_default=False,
    ),
]
BudgetRanks = Annotated[
    str, typer.Option(help="Ranks that a budget may choose too, beside --rank: 8,32.", show_default=False)
]
BudgetSolver = Annotated[str, typer.Option(help="greedy, or milp: the optimum, by SciPy.")]
Curves = Annotated[
    Path | None,
    typer.Option(help="JSON file of the errors measured for a budget; what it has of the same model is used again."),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="A recipe.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Instead of what the recipe says: seed=1 lora.rank=8.", show_default=False
    ),
]


OF_POLICY = (
    *("bits", "rank", "alpha", "code", "block_size", "scale_dtype", "double_quant", "rank_policy", "rslora"),
    *("embeddings", "dtype", "adapter_dtype", "min_coverage", "budget", "budget_ranks", "budget_solver"),
)


def policy(given: dict[str, Any], **more: Any) -> "Policy":
    """The policy of a verb's options, checked. What it leaves open is what its format, if it has one, can hold."""
    from loftq.formats import layouts
    from loftq.planning import Policy

    options = {**{name: given[name] for name in OF_POLICY if name in given}, **more}
    options = layouts.get(given["format"]).filled(options) if "format" in given else options
    return Policy(**{name: value for name, value in options.items() if value is not None})


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
