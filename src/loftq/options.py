"""Every option, once: its type, default, check and help.

From these tables are made the command line (:func:`loftq.cli.options.takes`), the keywords of the Python calls
(:func:`keywords`), the sections of recipes (:mod:`loftq.finetune.recipe`), and the defaults and checks of the
dataclasses that hold the values (:func:`default`, :func:`check_fields`). They are ``TypedDict`` classes, so that a call
names them too: ``**options: Unpack[Solver]``. No torch is imported, so that ``loftq --help`` is quick.
"""

import dataclasses
import functools
import inspect
import math
import operator
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypedDict, TypeVar

from loftq.errors import UsageError, quoted

SCALE_DTYPES = ("float32", "bfloat16", "float16")
SCALES = ("formula", "fitted")
Text = str | int | float  # a number, or patterns or a list in text; held as text
Place = str | Path


@dataclass(frozen=True)
class Option:
    """What is known of an option beside its name, its type and its help, which follows it.

    Attributes:
        default: of the dataclass that holds it. The command line names it, unless the help does.
        choices: the words that it may be; for codes and presets their registries say which.
        bounds: of a number: ``ge``, ``gt``, ``le``, ``lt``, as pydantic calls them.
        open: what decides if it is left out, and ``default`` therefore does not: ``preset``, ``format``,
            ``calibrate`` or ``budget``.
        flags: on the command line, instead of ``--name``.
        metavar: of its value in the command line's help.
        help: for the command line and the calls.
    """

    default: Any
    choices: tuple[str, ...] | tuple[int, ...] = ()
    bounds: Mapping[str, Any] = field(default_factory=dict)
    open: str = ""
    flags: tuple[str, ...] = ()
    metavar: str | None = None
    help: str = ""

    @property
    def left_out(self) -> Any:
        """What a command and a call have where it is not given: None if something else then decides."""
        return None if self.open in ("preset", "format", "calibrate") else self.default


class Widths(TypedDict, total=False):
    """How many bits every matrix gets."""

    bits: Annotated[
        Text,
        Option("4"),
        "2, 3, 4 or 8; an average between 2.0 and 4.0 (first layers 4 bits, the rest 2, as in the paper: 2.25, "
        "2.5, 3.0); a trellis's sixteenths below 2, such as 1.5, or with its code up to 4; or patterns with a default, "
        "'layers.0-3=4,2'. 16 leaves a module dense.",
    ]
    budget: Annotated[
        Text,
        Option("", open="budget"),
        "What to spend: 2.5 (average stored bits of a quantized weight, scales included) or 300MB (all tensors, "
        "with the adapter). Bits and block of every matrix are chosen for the least error in all, which is "
        "measured first, on the weights. Of --bits only patterns count.",
    ]
    budget_ranks: Annotated[
        Text | list[int] | tuple[int, ...],
        Option("", open="budget"),
        "Ranks that a budget may choose too, beside --rank: 8,32.",
    ]
    budget_solver: Annotated[
        str, Option("greedy", choices=("greedy", "milp"), open="budget"), "greedy, or milp: the optimum, by SciPy."
    ]


class Codes(TypedDict, total=False):
    """How a matrix is stored."""

    code: Annotated[
        str,
        Option("auto"),
        "nf, lloyd (2 to 4 bits), uniform, uniform-tensor, fp4 (4 bits), affine, int, iq4nl (4 bits), trellis (any "
        "sixteenth of a bit up to 4); auto: nf, at 2 bits with fitted scales lloyd, for widths that only it has "
        "trellis.",
    ]
    block_size: Annotated[int, Option(64, bounds={"ge": 1}), "Weights of a row that share a scale."]
    scale_dtype: Annotated[
        str | None,
        Option("bfloat16", choices=SCALE_DTYPES, open="format"),
        "bfloat16, float16 or float32. Default: bfloat16; bnb: float32.",
    ]
    double_quant: Annotated[bool, Option(False), "Quantize the scales too, as bitsandbytes does."]
    window: Annotated[
        int,
        Option(10, choices=(8, 10, 12)),
        "Of code trellis: bits that choose a level: 8 is quicker than 10, 12 better.",
    ]


class Coverage(TypedDict, total=False):
    """Which matrices are quantized."""

    embeddings: Annotated[bool, Option(False), "Embedding tables too."]
    min_coverage: Annotated[
        float, Option(0.5, bounds={"ge": 0, "le": 1}), "Refuse to work on less than this share of the layers' weights."
    ]


class Storage(Widths, Codes, Coverage, total=False):
    """Which matrices are quantized, and how they are stored."""

    serve: Annotated[
        str | None,
        Option(None, choices=("gguf", "compressed-tensors", "mlx", "onnx")),
        "Choose code, block and scales that other software holds exactly: gguf (llama.cpp, Ollama), "
        "compressed-tensors (vLLM), mlx or onnx. Matrices that it cannot hold stay dense. `loftq export` then writes "
        "its files.",
    ]


class Ranks(TypedDict, total=False):
    """Rank and scaling of the adapter."""

    rank: Annotated[Text, Option("16"), "Rank of the adapter, or patterns with a default: 'mlp=32,16'."]
    alpha: Annotated[
        float | None,
        Option(None, bounds={"gt": 0}),
        "lora_alpha; the rank if not given. The initialization does not depend on it.",
    ]
    rslora: Annotated[bool, Option(False), "Scale by alpha / sqrt(rank)."]
    rank_policy: Annotated[
        str, Option("refuse", choices=("refuse", "clamp")), "A rank too large for a matrix: refuse or clamp."
    ]


class Dtypes(TypedDict, total=False):
    """Types of what is stored beside the codes."""

    dtype: Annotated[
        str,
        Option("auto", choices=("auto", "source", "bfloat16", "float16")),
        "Of what is not packed: auto (16 bits where the source has 32: bfloat16), bfloat16, float16, or source.",
    ]
    adapter_dtype: Annotated[
        str, Option("bfloat16", choices=SCALE_DTYPES), "Of the adapter's files: bfloat16, float16 or float32."
    ]


class Preset(TypedDict, total=False):
    """The method, by its name."""

    preset: Annotated[
        str | None,
        Option(None, flags=("--preset", "--method")),
        "loftq (the paper's), fitted, descent, svd (one step), qlora (quantize, zero initialization); with "
        "--calibrate also qera-diag, qera-full, eora, cloq, projq, srr, lq-lora. Default: fitted; "
        "with --calibrate descent.",
    ]


class Steps(TypedDict, total=False):
    """How the backbone and the factors are found; a preset decides about what is left out."""

    steps: Annotated[
        int | None,
        Option(5, bounds={"ge": 0}, open="preset"),
        "Alternations T; the best step is kept. Default: the preset's, 5 for fitted and loftq, 6 for descent.",
    ]
    order: Annotated[
        str | None,
        Option("quantize-first", choices=("quantize-first", "svd-first"), open="preset"),
        "quantize-first, or svd-first (the paper's ablation). Default: the preset's.",
    ]
    scales: Annotated[
        str | None,
        Option("formula", choices=SCALES, open="preset"),
        "By the code's formula (absmax), or fitted to the least error at the same bytes. Default: the preset's; "
        "fitted for fitted and descent.",
    ]


class Decomposition(TypedDict, total=False):
    """How a low-rank term is computed."""

    svd: Annotated[str, Option("auto", choices=("auto", "exact", "randomized")), "auto, exact or randomized."]
    seed: Annotated[int, Option(0, bounds={"ge": 0}), "Of all random numbers, together with each tensor's name."]


class Solver(Preset, Steps, Decomposition, total=False):
    """How the backbone and the factors are found."""


class Variant(TypedDict, total=False):
    """What makes one preset another method; in Python only."""

    metric: Annotated[
        str | None,
        Option("weights", choices=("weights", "diagonal", "full", "fisher"), open="preset"),
        "What the error is measured in. Default: the preset's.",
    ]
    rounding: Annotated[
        str | None,
        Option("nearest", choices=("nearest", "feedback", "shaped", "descent"), open="preset"),
        "How codes are chosen. Default: the preset's.",
    ]
    start: Annotated[
        str | None,
        Option("zero", choices=("zero", "preserved"), open="preset"),
        "The adapter before the first step. Default: the preset's.",
    ]


class Calibration(TypedDict, total=False):
    """What the error is measured on."""

    calibrate: Annotated[
        Place | None,
        Option(None, metavar="DIR|FILE|DATASET"),
        "Statistics made by `loftq calibrate`, or texts to make them from: a file, or ORG/NAME of the hub.",
    ]
    calibration_samples: Annotated[
        int | None,
        Option(128, bounds={"ge": 4}, open="calibrate", flags=("--samples",)),
        "Rows of text, of --calibrate FILE or DATASET. Default: 128.",
    ]


class Collection(TypedDict, total=False):
    """What statistics of the inputs are collected."""

    samples: Annotated[
        int, Option(128, bounds={"ge": 4}), "Rows of text, evenly from the whole; one in four is held out."
    ]
    max_length: Annotated[int, Option(0, bounds={"ge": 0}), "Tokens of a row. Default: 512, or what the model takes."]
    kind: Annotated[
        str,
        Option("full", choices=("full", "diagonal", "fisher")),
        "full: second moments of inputs; diagonal: of every feature alone, with little memory; fisher: squared "
        "gradients of the loss, with the whole model in memory.",
    ]
    column: Annotated[
        str | None,
        Option(None),
        "Column of the texts (text, if not given), or two, 'a,b', tokenized as a pair.",
    ]


class Machine(TypedDict, total=False):
    """Of which version of a model, and where it is computed."""

    device: Annotated[str, Option("cpu"), "Where to compute: cpu, cuda, cuda:1, …"]
    revision: Annotated[str | None, Option(None), "Branch, tag or commit of a hub id."]


class Made(Machine, total=False):
    """Of what is made."""

    task_type: Annotated[str | None, Option(None), "PEFT task type to write into the adapter."]


class Work(Made, total=False):
    """How a checkpoint is made."""

    format: Annotated[str, Option("loftq"), "loftq (packed), bnb (bitsandbytes NF4), or dense (dequantized)."]
    curves: Annotated[
        Place | None,
        Option(None),
        "JSON file of the errors measured for a budget; what it has of the same model is used again.",
    ]
    workers: Annotated[
        int,
        Option(0, bounds={"ge": 0}),
        "Matrices worked on at a time. Default: as many as CPUs and memory allow; on a GPU one.",
    ]
    overwrite: Annotated[bool, Option(False), "Replace an earlier output of loftq."]
    shared: Annotated[
        bool,
        Option(False),
        "Share the work with all processes that run the same command on the same directory, on any machines.",
    ]
    cluster: Annotated[
        str | None,
        Option(None, metavar="auto|ray://HOST:PORT"),
        "Let the workers of a Ray cluster do the work, on a directory that they all see.",
    ]
    push_to_hub: Annotated[
        str | None, Option(None, metavar="ORG/NAME"), "Put the result on the Hugging Face hub too, in one commit."
    ]
    private: Annotated[bool, Option(False), "Of --push-to-hub: make the repository private, if it is a new one."]


class Training(TypedDict, total=False):
    """Of the adapter while it is trained; in recipes only."""

    dropout: Annotated[float, Option(0.0, bounds={"ge": 0, "lt": 1})]


class Plans(Storage, Ranks, Dtypes, Solver, Variant, total=False):
    """Of :func:`loftq.plan` and :func:`loftq.get_peft_model`."""


class Quantizing(Plans, Calibration, Work, total=False):
    """Of :func:`loftq.quantize`."""


class OneMatrix(Codes, Solver, Variant, total=False):
    """Of :func:`loftq.quantize_weight`."""


class OwnPreset(Steps, Variant, total=False):
    """Of :func:`loftq.register_preset`."""


class Starting(Ranks, Coverage, Decomposition, Made, total=False):
    """Of :func:`loftq.start`."""


class Collecting(Collection, Machine, total=False):
    """Of :func:`loftq.calibrate`."""


F = TypeVar("F", bound=Callable[..., Any])


def _row(hint: Any) -> tuple[Any, Option]:
    kind, option, *told = typing.get_args(hint)
    kinds = [k for k in typing.get_args(kind) if k is not type(None)] or [kind]
    return functools.reduce(operator.or_, kinds), dataclasses.replace(option, help="".join(told))


GROUPS = (Storage, Ranks, Dtypes, Solver, Variant, Calibration, Collection, Work, Training)
# name -> its type, without None, and the option
TABLE = {name: _row(hint) for group in GROUPS for name, hint in group.__annotations__.items()}


def rows(*asked: Any) -> dict[str, tuple[Any, Option]]:
    """Rows of the tables, by groups and single names, in this order."""
    names = [name for one in asked for name in ([one] if isinstance(one, str) else one.__annotations__)]
    return {name: TABLE[name] for name in names}


def is_text(kind: Any) -> bool:
    """Whether an option may be a number, or patterns or a list in text, and is held as text."""
    return str in typing.get_args(kind) and int in typing.get_args(kind)


def default(name: str) -> Any:
    """The default of an option, for the dataclass that holds it."""
    return TABLE[name][1].default


def fields_of(holder: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The given options that are fields of a dataclass; None is as good as left out."""
    return {f.name: given[f.name] for f in dataclasses.fields(holder) if given.get(f.name) is not None}


def keywords(call: F) -> F:
    """Decorate a call that takes ``**options: Unpack[GROUP]``: its signature and its docstring name each option.

    In the docstring they stand in the place of the entry ``options``.
    """
    signature = inspect.signature(call)
    *named, given = signature.parameters.values()
    group = typing.get_args(given.annotation)[0]
    added = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=TABLE[name][1].left_out,
            annotation=typing.get_args(hint)[0],
        )
        for name, hint in group.__annotations__.items()
    ]
    call.__signature__ = signature.replace(parameters=[*named, *added])  # type: ignore[attr-defined]
    call.__doc__ = described(call.__doc__ or "", group)
    return call


def described(docstring: str, group: Any) -> str:
    """A docstring with an entry for every option of a group instead of its entry ``options``."""

    def entries(entry: re.Match) -> str:
        return "".join(f"\n{entry[1]}{name}: {_in_python(TABLE[name][1].help)}" for name in group.__annotations__)

    return re.sub(r"\n( +)options: .*(?:\n\1 +.*)*", entries, docstring)


def _in_python(help: str) -> str:
    return re.sub(r"--([a-z-]+)", lambda flag: flag[1].replace("-", "_"), help)


def check_fields(holder: Any, say: Callable[[str], str] = str) -> None:
    """UsageError for a field of a dataclass whose value its option does not allow.

    Args:
        say: an option's name as the caller writes it.
    """
    for f in dataclasses.fields(holder):
        if f.name in TABLE:
            check(f.name, getattr(holder, f.name), say(f.name))


def check(name: str, value: object, what: str) -> None:
    """UsageError, about ``what``, for a value that an option does not allow. A default of None is allowed."""
    kind, option = TABLE[name]
    if value is None and option.default is None:
        return
    if option.choices:
        check_choice(what, value, option.choices)
    elif kind is bool:
        check_flag(what, value)
    elif kind is int:
        check_whole(what, value, option.bounds["ge"])
    elif kind is float:
        check_number(what, value, option.bounds)


def check_choice(what: str, value: object, allowed: tuple) -> None:
    """UsageError for what is none of ``allowed``, which are of one type."""
    if not isinstance(value, type(allowed[0])) or isinstance(value, bool) or value not in allowed:
        raise UsageError(f"{what} must be one of {', '.join(map(str, allowed))}, got {quoted(repr(value))}")


def check_whole(what: str, value: object, low: int) -> None:
    """UsageError for what is no ``int`` of at least ``low``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise UsageError(f"{what} must be a whole number of at least {low}, got {quoted(repr(value))}")


def check_number(what: str, value: object, bounds: Mapping[str, Any]) -> None:
    """UsageError for what is no finite number within ``bounds``: ``gt`` 0, or ``ge`` and ``le``."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise UsageError(f"{what}: {quoted(repr(value))} is not a number")
    low, high = bounds.get("ge", 0), bounds.get("le", math.inf)
    if not math.isfinite(value) or not low <= value <= high or value == bounds.get("gt"):
        wanted = "be positive and finite" if "gt" in bounds else f"lie between {low} and {high}"
        raise UsageError(f"{what} must {wanted}, got {value}")


def check_flag(what: str, value: object) -> None:
    """UsageError for what is neither true nor false."""
    if not isinstance(value, bool):
        raise UsageError(f"{what} must be true or false, got {quoted(repr(value))}")
