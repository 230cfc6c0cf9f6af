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

from loftq.errors import UsageError, meant, quoted

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
        "2, 3, 4 or 8. Or patterns with a default: 'layers.0-3=4,2'; 16 leaves a module dense. Or an average from 2.0 "
        "to 4.0, such as 2.5: the paper's mix of 4 bits in the first layers and 2 in the rest. Or, for code trellis, a "
        "multiple of 1/16 up to 4; below 2, such as 1.5, no other code is needed.",
    ]
    budget: Annotated[
        Text,
        Option("", open="budget"),
        "Limit: 2.5 (average stored bits of a quantized weight, scales included) or 300MB (all tensors and the "
        "adapter). The bits and block size of every matrix are chosen for the least total error, which is measured "
        "on the weights first. Of --bits only patterns count.",
    ]
    budget_ranks: Annotated[
        Text | list[int] | tuple[int, ...],
        Option("", open="budget"),
        "Ranks that a budget may choose for a matrix, besides --rank: 8,32.",
    ]
    budget_solver: Annotated[
        str,
        Option("greedy", choices=("greedy", "milp"), open="budget"),
        "How a budget is spent: greedy, or milp (the optimum, by SciPy).",
    ]


class Codes(TypedDict, total=False):
    """How a matrix is stored."""

    code: Annotated[
        str,
        Option("auto"),
        "Quantization data type: nf, lloyd (2 to 4 bits), uniform, uniform-tensor, fp4 (4 bits), affine, int, iq4nl "
        "(4 bits), trellis (multiples of 1/16 bit, up to 4); auto: lloyd at 2 bits with fitted scales, trellis for "
        "widths that no other has, otherwise nf.",
    ]
    block_size: Annotated[
        int, Option(64, bounds={"ge": 1}), "Number of consecutive weights of a row that share a scale."
    ]
    scale_dtype: Annotated[
        str | None,
        Option("bfloat16", choices=SCALE_DTYPES, open="format"),
        "Dtype of the scales: bfloat16, float16 or float32. Default: bfloat16; format bnb: float32.",
    ]
    double_quant: Annotated[bool, Option(False), "Quantize the scales too, as bitsandbytes does."]
    window: Annotated[
        int,
        Option(10, choices=(8, 10, 12)),
        "For code trellis: bits that select a level, 8, 10 or 12. Fewer are faster, more have less error.",
    ]


class Coverage(TypedDict, total=False):
    """Which matrices are quantized."""

    embeddings: Annotated[bool, Option(False), "Include embedding tables."]
    min_coverage: Annotated[
        float,
        Option(0.5, bounds={"ge": 0, "le": 1}),
        "Refuse a model if less than this share of the weights of its layers is included.",
    ]


class Storage(Widths, Codes, Coverage, total=False):
    """Which matrices are quantized, and how they are stored."""

    serve: Annotated[
        str | None,
        Option(None, choices=("gguf", "compressed-tensors", "mlx", "onnx")),
        "Choose code, block size and scales that other software stores exactly: gguf (llama.cpp, Ollama), "
        "compressed-tensors (vLLM), mlx or onnx. Matrices that it cannot store stay dense. `loftq export` then writes "
        "its files.",
    ]


class Ranks(TypedDict, total=False):
    """Rank and scaling of the adapter."""

    rank: Annotated[Text, Option("16"), "Rank of the adapter, or patterns with a default: 'mlp=32,16'."]
    alpha: Annotated[
        float | None,
        Option(None, bounds={"gt": 0}),
        "lora_alpha. Default: the rank. The initialization's error does not depend on it.",
    ]
    rslora: Annotated[bool, Option(False), "Scale by alpha / sqrt(rank) instead of alpha / rank."]
    rank_policy: Annotated[
        str,
        Option("refuse", choices=("refuse", "clamp")),
        "What to do with a rank that is larger than a matrix allows: refuse or clamp.",
    ]


class Dtypes(TypedDict, total=False):
    """Types of what is stored beside the codes."""

    dtype: Annotated[
        str,
        Option("auto", choices=("auto", "source", "bfloat16", "float16")),
        "Dtype of matrices that are not quantized: auto (bfloat16 if the source has 32 bits), bfloat16, float16, or "
        "source.",
    ]
    adapter_dtype: Annotated[
        str, Option("bfloat16", choices=SCALE_DTYPES), "Dtype of the adapter's file: bfloat16, float16 or float32."
    ]


class Preset(TypedDict, total=False):
    """The method, by its name."""

    preset: Annotated[
        str | None,
        Option(None, flags=("--preset", "--method")),
        "Method: loftq (the paper's), fitted, descent, svd (one step), qlora (B = 0); with --calibrate also "
        "qera-diag, qera-full, eora, cloq, projq, srr, lq-lora. Default: fitted; with --calibrate descent.",
    ]


class Steps(TypedDict, total=False):
    """How the backbone and the factors are found; a preset decides about what is left out."""

    steps: Annotated[
        int | None,
        Option(5, bounds={"ge": 0}, open="preset"),
        "Number T of alternations; the best is kept. Default: the preset's, 5 for fitted and loftq, 6 for descent.",
    ]
    order: Annotated[
        str | None,
        Option("quantize-first", choices=("quantize-first", "svd-first"), open="preset"),
        "Order of an alternation: quantize-first, or svd-first (the paper's ablation). Default: the preset's.",
    ]
    scales: Annotated[
        str | None,
        Option("formula", choices=SCALES, open="preset"),
        "Scales: formula (the code's own, such as absmax), or fitted (least squared error, same bytes). Default: the "
        "preset's; fitted for fitted and descent.",
    ]


class Decomposition(TypedDict, total=False):
    """How a low-rank term is computed."""

    svd: Annotated[
        str,
        Option("auto", choices=("auto", "exact", "randomized")),
        "Singular value decomposition: auto, exact or randomized.",
    ]
    seed: Annotated[
        int, Option(0, bounds={"ge": 0}), "Seed of all random numbers; each tensor's name is mixed into it."
    ]


class Solver(Preset, Steps, Decomposition, total=False):
    """How the backbone and the factors are found."""


class Variant(TypedDict, total=False):
    """What makes one preset another method; in Python only."""

    metric: Annotated[
        str | None,
        Option("weights", choices=("weights", "diagonal", "full", "fisher"), open="preset"),
        "Norm of the error: weights, diagonal, full or fisher. Default: the preset's.",
    ]
    rounding: Annotated[
        str | None,
        Option("nearest", choices=("nearest", "feedback", "shaped", "descent"), open="preset"),
        "How codes are chosen: nearest, feedback, shaped or descent. Default: the preset's.",
    ]
    start: Annotated[
        str | None,
        Option("zero", choices=("zero", "preserved"), open="preset"),
        "Adapter before the first step: zero or preserved. Default: the preset's.",
    ]


class Calibration(TypedDict, total=False):
    """What the error is measured on."""

    calibrate: Annotated[
        Place | None,
        Option(None, metavar="DIR|FILE|DATASET"),
        "Minimize the error of the outputs: a directory of `loftq calibrate`, or texts (a file, or ORG/NAME on the "
        "hub).",
    ]
    calibration_samples: Annotated[
        int | None,
        Option(128, bounds={"ge": 4}, open="calibrate", flags=("--samples",)),
        "Number of rows of text, with --calibrate FILE or DATASET. Default: 128.",
    ]


class Collection(TypedDict, total=False):
    """What statistics of the inputs are collected."""

    samples: Annotated[
        int,
        Option(128, bounds={"ge": 4}),
        "Number of rows of text, taken evenly from the whole data; one in four is held out.",
    ]
    max_length: Annotated[
        int, Option(0, bounds={"ge": 0}), "Tokens per row. Default: 512, or less if the model takes less."
    ]
    kind: Annotated[
        str,
        Option("full", choices=("full", "diagonal", "fisher")),
        "Statistics: full (second moments of the inputs), diagonal (their diagonal, with little memory), or fisher "
        "(squared gradients of the loss, with the whole model in memory).",
    ]
    column: Annotated[
        str | None,
        Option(None),
        "Column with the texts, or two, 'a,b', that are tokenized as a pair. Default: text.",
    ]


class Machine(TypedDict, total=False):
    """Of which version of a model, and where it is computed."""

    device: Annotated[str, Option("cpu"), "Device to compute on: cpu, cuda, cuda:1, …"]
    revision: Annotated[str | None, Option(None), "Branch, tag or commit of the model on the hub."]


class Made(Machine, total=False):
    """Of what is made."""

    task_type: Annotated[str | None, Option(None), "PEFT task type to write into the adapter's configuration."]


class Replacing(TypedDict, total=False):
    """Of whatever makes a directory."""

    overwrite: Annotated[bool, Option(False), "Replace an earlier output of loftq."]


class Work(Made, Replacing, total=False):
    """How a checkpoint is made."""

    format: Annotated[
        str, Option("loftq"), "Output format: loftq (packed), bnb (bitsandbytes NF4), or dense (dequantized)."
    ]
    curves: Annotated[
        Place | None,
        Option(None),
        "JSON file for the errors that a budget measures; errors of the same model in it are used again.",
    ]
    workers: Annotated[
        int,
        Option(0, bounds={"ge": 0}),
        "Number of matrices solved at a time. Default: as many as CPUs and memory allow; on a GPU one.",
    ]
    shared: Annotated[
        bool,
        Option(False),
        "Share the work with all processes that run the same command on the same directory, on any machines.",
    ]
    cluster: Annotated[
        str | None,
        Option(None, metavar="auto|ray://HOST:PORT"),
        "Let the workers of a Ray cluster do the work. All of them must see the output directory.",
    ]
    push_to_hub: Annotated[
        str | None, Option(None, metavar="ORG/NAME"), "Also upload the result to the Hugging Face hub, in one commit."
    ]
    private: Annotated[bool, Option(False), "With --push-to-hub: make a new repository private."]


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
Rows = dict[str, tuple[Any, Option]]  # name -> its type, without None, and the option
# Of what makes a checkpoint; what is made of one, :mod:`loftq.serving.options`, has some names for other options.
TABLE: Rows = {name: _row(hint) for group in GROUPS for name, hint in group.__annotations__.items()}


def rows(*asked: Any) -> Rows:
    """Rows of the tables, by groups and single names, in this order."""
    found: Rows = {}
    for one in asked:
        named = isinstance(one, str)
        found |= {one: TABLE[one]} if named else {name: _row(hint) for name, hint in one.__annotations__.items()}
    return found


def is_text(kind: Any) -> bool:
    """Whether an option may be a number, or patterns or a list in text, and is held as text."""
    return str in typing.get_args(kind) and int in typing.get_args(kind)


def default(name: str, group: Any = None) -> Any:
    """The default of an option, of a group or of :data:`TABLE`, for the dataclass that holds it."""
    return (rows(group) if group else TABLE)[name][1].default


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
    table = rows(group)
    added = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=table[name][1].left_out,
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
        return "".join(f"\n{entry[1]}{name}: {_in_python(row.help)}" for name, (_, row) in rows(group).items())

    return re.sub(r"\n( +)options: .*(?:\n\1 +.*)*", entries, docstring)


def _in_python(help: str) -> str:
    return re.sub(r"--([a-z-]+)", lambda flag: flag[1].replace("-", "_"), help)


def check_fields(holder: Any, say: Callable[[str], str] = str, group: Any = None) -> None:
    """UsageError for a field of a dataclass whose value its option does not allow.

    Args:
        say: an option's name as the caller writes it.
        group: of the options; None: of :data:`TABLE`.
    """
    table = rows(group) if group else TABLE
    for f in dataclasses.fields(holder):
        if f.name in table:
            check(f.name, getattr(holder, f.name), say(f.name), table)


def check(name: str, value: object, what: str, table: Rows = TABLE) -> None:
    """UsageError, about ``what``, for a value that an option does not allow. A default of None is allowed."""
    kind, option = table[name]
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
    elif kind is str:
        check_text(what, value)


def check_choice(what: str, value: object, allowed: tuple) -> None:
    """UsageError for what is none of ``allowed``, which are of one type."""
    if not isinstance(value, type(allowed[0])) or isinstance(value, bool) or value not in allowed:
        wanted = ", ".join(map(str, allowed))
        raise UsageError(f"{what} must be one of {wanted}, got {quoted(repr(value))}{meant(value, allowed)}")


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
        above = "positive" if "gt" in bounds else f"at least {low}"
        below = "finite" if high == math.inf else f"at most {high}"
        wanted = f"lie between {low} and {high}" if {"ge", "le"} <= bounds.keys() else f"be {above} and {below}"
        raise UsageError(f"{what} must {wanted}, got {value}")


def check_text(what: str, value: object) -> None:
    """UsageError for what is no text."""
    if not isinstance(value, str):
        raise UsageError(f"{what}: wanted text, got {quoted(repr(value))}")


def check_flag(what: str, value: object) -> None:
    """UsageError for what is neither true nor false."""
    if not isinstance(value, bool):
        raise UsageError(f"{what} must be true or false, got {quoted(repr(value))}")
