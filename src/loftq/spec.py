"""How one matrix is stored and how the solver runs: immutable values, checked when made and when read back."""

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any, TypeVar

from typing_extensions import Unpack

from loftq import codes
from loftq.codes import BITS, RATE_UNIT, Code
from loftq.errors import UsageError, checked_fields, command, listed, option, quoted
from loftq.options import OwnPreset, check_choice, check_fields, default, keywords


@checked_fields
@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """How one matrix is stored: all that a reader needs.

    Every code decodes by one formula, ``value = (levels[code] - zero) * scale``; see ``docs/format.md``. How good the
    scales are is not a matter of storage: :attr:`SolveSpec.scales` says how they are chosen.

    Attributes:
        bits: width of a code: 2, 3, 4 or 8; of a trellis any number of sixteenths up to 4, such as 2.1875.
        code: name of a :class:`loftq.codes.Code`: what a code's integers stand for, and the rule for its scales.
        block_size: consecutive input features of one row that share a scale; a row's last block may be short.
            A code with one scale for the matrix ignores it.
        scale_dtype: stored type of the scales. The codes are chosen against the *stored* scales.
        double_quant: store the scales as bitsandbytes' 8-bit dynamic code with one float32 absmax per 256
            scales and one float32 mean. ``scale_dtype`` is then ignored.
        window: of a trellis: bits from which a weight's level is read: 8, 10 or 12.
        column_rates: of a trellis: whether every column has a rate of its own, ``bits`` being their mean.

    What a code does not have is ignored, and is at its default.
    """

    bits: int | float
    code: str = "nf"
    block_size: int = default("block_size")
    scale_dtype: str = default("scale_dtype")
    double_quant: bool = default("double_quant")
    window: int = default("window")
    column_rates: bool = False

    def __post_init__(self) -> None:
        check_width(self.code, self.bits)
        object.__setattr__(self, "bits", int(self.bits) if self.bits == int(self.bits) else self.bits)
        check_fields(self)
        if self.double_quant and (self.codebook.per_tensor or "double_quant" not in self.codebook.fields):
            few = "one scale" if self.codebook.per_tensor else "one scale a row"
            raise UsageError(f"double_quant has nothing to do for code {self.code}: it stores {few}")
        for f in dataclasses.fields(self)[2:]:
            if f.name not in self.codebook.fields:
                object.__setattr__(self, f.name, f.default)

    @property
    def codebook(self) -> Code:
        return codes.get(self.code)

    @property
    def width(self) -> int:
        """Bits of the integer that stands for a weight, and chooses its level."""
        return self.window if self.codebook.form == "trellis" else int(self.bits)

    @property
    def rate(self) -> int:
        """``bits`` in sixteenths of a bit."""
        return round(self.bits * RATE_UNIT)

    def block(self, columns: int) -> int:
        """Weights of a row of ``columns`` that share a scale; all of them if one scale serves the row or the matrix."""
        whole = self.codebook.per_tensor or "block_size" not in self.codebook.fields
        return columns if whole else min(self.block_size, columns)

    @property
    def detail(self) -> tuple[str, int]:
        """The code's main parameter: ``("block_size", 64)``, or of a trellis ``("window", 10)``."""
        name = "block_size" if "block_size" in self.codebook.fields else "window"
        return name, getattr(self, name)

    def to_dict(self) -> dict[str, Any]:
        """The fields that the code has, for JSON."""
        return {name: getattr(self, name) for name in ("bits", "code", *self.codebook.fields)}


def check_width(code: str, bits: Any) -> None:
    """UsageError for a number of bits that a code does not have."""
    kind, trellis = codes.get(code), codes.get("trellis")
    number = isinstance(bits, int if kind.form == "blocks" else (int, float)) and not isinstance(bits, bool)
    if number and bits in kind.widths:
        return
    widths = kind.widths
    have = " or ".join(filter(None, (", ".join(map(str, widths[:-1])), str(widths[-1]))))
    have = f"multiples of 1/{RATE_UNIT} up to {widths[-1]}" if kind is trellis else have
    if type(bits) in (int, float) and bits not in BITS and bits in trellis.widths:
        raise UsageError(f"code {code} has {have} bits; use code trellis for {bits}")
    if type(bits) is int and bits in BITS:
        raise UsageError(f"code {code} has {have} bits; use code nf for {bits}")
    if kind is trellis:
        raise UsageError(f"bits of code {code} must be one of the {have}, got {quoted(repr(bits))}")
    either = f"{', '.join(map(str, BITS))}, or a multiple of 1/{RATE_UNIT} up to {trellis.widths[-1]} for code trellis"
    raise UsageError(f"bits must be one of {either}, got {quoted(repr(bits))}")


@checked_fields
@dataclass(frozen=True, kw_only=True)
class SolveSpec:
    """How the backbone and the factors of one matrix are found. Without arguments it is the paper's method.

    Attributes:
        steps: T of the paper's Algorithm 1. 0 is QLoRA (quantize, zero adapter), 1 is one SVD of the
            quantization error, 5 the paper's usual choice.
        order: ``quantize-first`` (Algorithm 1) or ``svd-first`` (the ablation of the paper's Table 6).
        svd: ``exact`` LAPACK, ``randomized`` block power iteration, or ``auto`` (exact for small matrices).
        seed: seeds the random start of the factors and of the randomized SVD, together with the tensor's name.
        scales: ``formula`` the code's own (absmax and the like), or ``fitted`` to the least squared error of every
            block, with which no step raises the error. Both are stored and read in the same way.
        metric: in which norm the initialization is close: of the ``weights`` themselves, or of what they do to the
            inputs of a calibration, by the ``diagonal`` of their second moments or by these in ``full``; ``fisher``
            weights rows and columns by the mean squared gradients of the loss.
        rounding: how Q is found; see :class:`loftq.solver.rounding.Rounding`.
        start: the adapter that Q is first made for: ``zero``, or the directions of W that are worth more ``preserved``
            than their share of the quantization error (SRR, arXiv 2602.02001).
    """

    steps: int = default("steps")
    order: str = default("order")
    svd: str = default("svd")
    seed: int = default("seed")
    scales: str = default("scales")
    metric: str = default("metric")
    rounding: str = default("rounding")
    start: str = default("start")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.order == "svd-first" and (self.rounding in ("shaped", "descent") or self.start != "zero"):
            raise UsageError(
                "order svd-first goes with rounding nearest or feedback, and has an initialization of its own; "
                f"choose {option('preset', 'fitted')} or {option('preset', 'loftq')}"
            )


# Published methods, and ours, by the solver's fields that make them: docs/methods.md.
PRESETS: dict[str, dict[str, Any]] = {
    "qlora": {"steps": 0},
    "svd": {"steps": 1},
    "loftq": {"steps": 5},
    "fitted": {"steps": 5, "scales": "fitted"},
    "qera-diag": {"steps": 1, "metric": "diagonal"},
    "qera-full": {"steps": 1, "metric": "full"},
    "eora": {"steps": 1, "metric": "full"},
    "cloq": {"steps": 1, "metric": "full", "rounding": "feedback"},
    "projq": {"steps": 6, "metric": "full", "rounding": "shaped"},
    "srr": {"steps": 1, "metric": "full", "start": "preserved"},
    "lq-lora": {"steps": 10, "metric": "fisher", "order": "svd-first"},
    "descent": {"steps": 6, "metric": "full", "rounding": "descent", "scales": "fitted"},
}


@keywords
def register_preset(name: str, **options: Unpack[OwnPreset]) -> SolveSpec:
    """Register a preset under a name, for every call, command and recipe of this process; returns its spec.

    Args:
        name: small letters, digits and dashes.
        options: fields of :class:`SolveSpec`, where they differ from the paper's LoftQ.

    Raises: UsageError if the name is taken by another method, or for fields that do not fit.

    Example:
        >>> loftq.register_preset("loftq-10", steps=10, scales="fitted")
        >>> loftq.quantize_weight(torch.randn(64, 96), bits=2, rank=8, preset="loftq-10")
    """
    fields: dict[str, Any] = {**options}
    spec = SolveSpec(**fields)
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9-]*", name):
        raise UsageError(f"a preset's name has small letters, digits and dashes, got {quoted(repr(name))}")
    if {"svd", "seed"} & {*fields}:
        raise UsageError("svd and seed are options of a run, not of a preset; leave them out")
    if PRESETS.get(name, fields) != fields:
        raise UsageError(f"a preset {name} is there already; choose another name")
    PRESETS[name] = fields
    return spec


def default_preset(calibrated: bool) -> str:
    """The default preset: ``fitted``, or with a calibration ``descent``."""
    return "descent" if calibrated else "fitted"


def solve_spec(preset: str | None = None, *, calibrated: bool = False, code: str = "auto", **given: Any) -> SolveSpec:
    """The solver's spec of a preset; ``given`` values that are not None replace the preset's.

    Args:
        preset: None for :func:`default_preset`, without fitted scales for a code that cannot have them.
    """
    given = {k: v for k, v in given.items() if v is not None}
    if preset is None:
        preset = default_preset(calibrated)
        per_tensor = code != "auto" and codes.get(code).per_tensor
        given = {"scales": "formula", **given} if per_tensor else given
    check_choice("preset", preset, tuple(PRESETS))
    own = PRESETS[preset]
    if preset in ("qlora", "svd") and given.get("steps", own["steps"]) != own["steps"]:
        raise UsageError(
            f"preset {preset} has {own['steps']} steps; leave out {option('steps')}, or use "
            f"{option('preset', 'fitted')}"
        )
    return SolveSpec(**{**own, **given})


def preset_of(spec: SolveSpec) -> str:
    """The name of the preset that a spec is of, or what makes it."""
    own = dataclasses.asdict(spec)
    for name, fields in PRESETS.items():
        if own == dataclasses.asdict(SolveSpec(**fields, svd=spec.svd, seed=spec.seed)):
            return name
    return ", ".join(f"{key} {value}" for key, value in own.items() if key not in ("svd", "seed"))


def check_statistics(spec: SolveSpec, kind: str | None, give: str = "") -> None:
    """Refuse a metric that needs other statistics than there are, or any.

    Args:
        kind: of the statistics; None if there are none. Descent then goes by the weights.
        give: how the caller is given some; by default as a checkpoint's are.
    """
    enough = {"diagonal": ("diagonal", "full"), "full": ("full",), "fisher": ("fisher",)}.get(spec.metric)
    if enough is None or kind in enough or (kind is None and spec.rounding == "descent"):
        return
    if kind is None:
        give = give or f"{option('calibrate')}: a file of texts, or a directory of statistics"
        raise UsageError(f"preset {preset_of(spec)} needs statistics of the matrices' inputs; give {give}")
    other = option("preset", "lq-lora" if kind == "fisher" else "qera-diag")
    raise UsageError(
        f"metric {spec.metric} needs statistics of kind {enough[0]}, and these are {kind}; make others with "
        f"{command('calibrate', kind=enough[0])}, or choose {other}"
    )


def statistics_kind(spec: SolveSpec) -> str:
    """The kind of statistics to collect for a spec; the whole second moments to measure one that needs none."""
    return "full" if spec.metric == "weights" else spec.metric


def code_for(code: str, bits: float, scales: str) -> str:
    """What ``auto`` stands for: NormalFloat; at 2 bits, where scales are fitted, the levels made for that.

    A width that only a trellis has is that of a trellis.

    Wider lloyd codes have a smaller squared error than NormalFloat's too, but models are not better with them: see
    ``docs/experiments.md``.
    """
    if code != "auto":
        return code
    if bits not in BITS and bits in codes.get("trellis").widths:
        return "trellis"
    return "lloyd" if scales == "fitted" and bits == 2 else "nf"


def quant_spec(solve: SolveSpec, bits: float, code: str = "auto", **stored: Any) -> QuantSpec:
    """How a matrix is stored that ``solve`` finds: a code for ``auto``, and rates for the columns of a trellis.

    Columns have rates of their own where they are rounded one after another, by what their errors count. In the metric
    of the weights alone one rate leaves less, because the adapter evens columns out (``docs/methods.md``).
    """
    code = code_for(code, bits, solve.scales)
    return QuantSpec(**{**stored, "bits": bits, "code": code, "column_rates": solve.rounding != "nearest"})


def check_solver(quant: QuantSpec, spec: SolveSpec) -> None:
    """Refuse a choice of scales that a code does not have."""
    if spec.scales == "fitted" and quant.codebook.per_tensor:
        raise UsageError(f"scales are fitted to blocks, and code {quant.code} has none; use code uniform, or affine")


def scaling(lora_alpha: float, rank: int, use_rslora: bool) -> float:
    """``s`` in ``W ≈ Q + s · B @ A``: ``alpha / r`` (LoRA) or ``alpha / sqrt(r)`` (rsLoRA, arXiv 2312.03732)."""
    if not lora_alpha > 0:
        raise UsageError(f"alpha must be positive, got {lora_alpha}: a scaling of 0 would switch the adapter off")
    return lora_alpha / (rank**0.5 if use_rslora else rank)


S = TypeVar("S", QuantSpec, SolveSpec)


def from_dict(kind: type[S], values: dict[str, Any]) -> S:
    """A spec read back from JSON; unknown fields are refused (a newer loftq may have written them)."""
    known = {f.name for f in dataclasses.fields(kind)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise UsageError(f"unknown field(s) {listed(unknown)} in {kind.__name__}; written by a newer loftq?")
    return kind(**values)


def packed_shape(rows: int, columns: int, bits: int) -> tuple[int, ...]:
    """Shape of the packed codes of a ``(rows, columns)`` matrix: ``(rows, bytes)``, at 8 bits ``(rows, 1, bytes)``."""
    n_bytes = -(-columns * bits // 8)
    return (rows, 1, n_bytes) if bits == 8 else (rows, n_bytes)


NESTED_BLOCK = 256  # scales that share one absmax under double quantization, as in bitsandbytes
# dtypes by their names in PyTorch and in safetensors
STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "I8": 1, "U8": 1}


# Of all codes; a name is the module's, a dot and one of these.
SUFFIXES = ("weight", "weight_scale", "weight_scale_absmax", "weight_scale_mean", "weight_zero", "weight_rate")


def stored_tensors(spec: QuantSpec, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What is stored for a ``(rows, columns)`` matrix: suffix -> (safetensors dtype, shape).

    The suffix follows the module's name: ``model.layers.0.mlp.up_proj.`` + ``weight_scale``.
    """
    code = spec.codebook
    if code.form == "trellis":
        return _trellis_tensors(spec, rows, columns)
    scales = (1, 1) if code.per_tensor else (rows, -(-columns // spec.block_size))
    tensors = {"weight": ("I8", packed_shape(rows, columns, int(spec.bits)))}
    if spec.double_quant:
        blocks = -(-scales[0] * scales[1] // NESTED_BLOCK)
        tensors["weight_scale"] = ("U8", scales)
        tensors["weight_scale_absmax"] = ("F32", (blocks,))
        tensors["weight_scale_mean"] = ("F32", (1,))
    else:
        tensors["weight_scale"] = (STORED[spec.scale_dtype], scales)
    if code.zero:
        tensors["weight_zero"] = (code.zero, scales)
    return tensors


def _trellis_tensors(spec: QuantSpec, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    groups, length = trellis_groups(rows)
    bits = length // RATE_UNIT * spec.rate * columns
    tensors = {"weight": ("I8", (groups, -(-bits // 8))), "weight_scale": (STORED[spec.scale_dtype], (rows, 1))}
    return {**tensors, "weight_rate": ("U8", (columns,))} if spec.column_rates else tensors


def trellis_groups(rows: int) -> tuple[int, int]:
    """Groups of the rows of a matrix, and rows of a group, which are a multiple of 16 near 128.

    Of the multiples from 96 to 192 the one that adds the fewest rows, of these the nearest to 128, then the smaller.
    Fewer than 96 rows are one group.
    """
    units = -(-rows // RATE_UNIT)
    if units < 6:
        return 1, units * RATE_UNIT
    size = min(range(6, 13), key=lambda n: (-(-units // n) * n, abs(n - 8), n))
    return -(-units // size), size * RATE_UNIT


def why_not(spec: QuantSpec, kind: str, rows: int) -> str:
    """Why a spec cannot hold a ``linear``, ``conv1d`` or ``embedding`` of so many rows; empty if it can."""
    if spec.codebook.form != "trellis":
        return ""
    length = trellis_groups(rows)[1]
    if kind == "embedding":
        return "the rows of an embedding are read alone, those of a trellis together"
    if rows < 2 * RATE_UNIT:
        return f"{rows} rows are too few for a trellis, which needs {2 * RATE_UNIT}"
    if length * spec.rate < spec.window * RATE_UNIT:
        return f"{length} weights at {spec.bits} bits are fewer bits than the window's {spec.window}"
    return ""


def stored_rows(spec: QuantSpec, stored: dict[str, Any]) -> int:
    """Rows of the matrix that stored tensors stand for."""
    return len(stored["weight_scale" if spec.codebook.form == "trellis" else "weight"])


def stacked_tensors(
    spec: QuantSpec, name: str, experts: int, rows: int, columns: int
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What is stored for a stack of ``experts`` matrices: name -> (safetensors dtype, shape), the experts first.

    The codes have the name of the stack, all else the suffix of :func:`stored_tensors` behind it: ``gate_up_proj``,
    ``gate_up_proj_scale``.
    """
    one = stored_tensors(spec, rows, columns)
    return {name + s.removeprefix("weight"): (dtype, (experts, *shape)) for s, (dtype, shape) in one.items()}


def stored_bytes(spec: QuantSpec, rows: int, columns: int) -> int:
    """Bytes on disk of one quantized matrix, scales and zero points included."""
    stored = stored_tensors(spec, rows, columns).values()
    return sum(math.prod(shape) * ITEM_BYTES[dtype] for dtype, shape in stored)
