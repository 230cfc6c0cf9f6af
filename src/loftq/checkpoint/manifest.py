"""The manifest of a result, which is written last: read back whole, each field of the type that its readers rely on."""

import math
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from loftq.errors import InputError, listed, quoted
from loftq.formats import hashed_json
from loftq.formats.config import MANIFEST as MANIFEST
from loftq.formats.regular import local_path, shown
from loftq.formats.tensorfile import DTYPES, MAX_DIM, MAX_RANK, check_name
from loftq.planning import Made, Matrix, Piece
from loftq.spec import QuantSpec, from_dict


class Part(BaseModel):
    """A part of a file of ours: types are exact, and what an earlier or later version adds is left alone."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    @classmethod
    def checked(cls, content: dict[str, Any], path: Path) -> dict[str, Any]:
        """``content``, read from ``path``. InputError if these are not the fields."""
        try:
            cls.model_validate(content)
        except ValidationError as e:
            raise InputError(f"{shown(path)}: {e.error_count()} fields missing or not what they should be") from e
        return content


def _named(name: str) -> str:
    check_name(name, "name")
    return name


def _spec(fields: dict[str, Any]) -> dict[str, Any]:
    try:
        from_dict(QuantSpec, fields)
    except TypeError as e:  # one is missing
        raise ValueError(str(e)) from e
    return fields


Count = Annotated[int, Field(ge=0, le=1 << 60)]
Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Name = Annotated[str, AfterValidator(_named)]
Shape = Annotated[list[Annotated[int, Field(ge=1, le=MAX_DIM)]], Field(min_length=2, max_length=2)]
Trace = Annotated[list[Number], Field(min_length=1, max_length=10_000)]  # the solver has some ten steps


class FileRow(Part):
    size: Count
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class MatrixRow(Part):
    """The report on a matrix."""

    name: Name
    shape: Shape
    bits: Number
    rank: Count
    alpha: Number
    bytes: Count
    errors: Trace
    output_errors: Trace | None = None
    kept: Count
    qlora_error: Number
    norm: Number | None = None

    @model_validator(mode="after")
    def _kept_is_a_step(self) -> "MatrixRow":
        if not all(self.kept < len(trace) for trace in (self.errors, self.output_errors) if trace is not None):
            raise ValueError("the step kept is not one of the trace")
        return self


class PieceRow(Part):
    """Rows of a source tensor (:class:`loftq.planning.Piece`)."""

    tensor: Name
    shape: Annotated[list[Annotated[int, Field(ge=1, le=MAX_DIM)]], Field(min_length=1, max_length=MAX_RANK)]
    start: Count
    stop: Count
    step: Annotated[int, Field(ge=1)]
    transposed: bool

    @model_validator(mode="after")
    def _inside(self) -> "PieceRow":
        last = self.shape[-2] if self.transposed and len(self.shape) > 1 else self.shape[-1]
        rows = math.prod(self.shape) // (last if len(self.shape) > 1 else 1)
        if not self.start < self.stop <= rows or (self.transposed and len(self.shape) < 2):
            raise ValueError("no rows of that tensor")
        return self


class PlanRow(Part):
    """The decision about a matrix."""

    name: Name
    module: Name
    kind: str
    shape: Shape
    dtype: Literal[tuple(DTYPES)]  # type: ignore[valid-type]
    source: Literal[("", *DTYPES)] = ""  # type: ignore[valid-type]
    rank: Count
    experts: Count = 0
    nested: Annotated[int, Field(ge=0, le=4)] = 0
    made: list[list[PieceRow]] = []
    quant: Annotated[dict[str, Any], AfterValidator(_spec)]


class Largest(Part):
    what: str
    bytes: Count
    option: str


class Totals(Part):
    matrices: Count
    quantized_weights: Count
    parameters: Count
    disk_bytes: Count
    adapter_bytes: Count
    bits_per_weight: Number
    compression: Number
    trainable_share: Number
    error: Number
    qlora_error: Number
    largest: Largest | None = None
    output_error: Number | None = None
    qlora_output_error: Number | None = None


class Solve(Part):
    steps: Count
    order: str
    scales: str


class Options(Part):
    format: str
    bits: str
    code: str
    rank: str
    alpha: Number | None
    rslora: bool
    embeddings: bool
    solve: Solve


class Identity(Part):
    """What a result depends on."""

    options: Options
    plan: str


# Part of a manifest -> what one row of it is; rows are checked one by one, so that the first bad one ends it.
_ROWS: dict[str, TypeAdapter[Any]] = {
    "identity": TypeAdapter(Identity),
    "totals": TypeAdapter(Totals),
    "files": TypeAdapter(FileRow),
    "matrices": TypeAdapter(MatrixRow),
    "plan": TypeAdapter(PlanRow),
}

_MADE: TypeAdapter[Any] = TypeAdapter(list[list[list[PieceRow]]])


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest in ``directory``: without one, it is not a finished LoftQ checkpoint.

    Raises: InputError for a directory without a manifest, and for one that :func:`checked` refuses.
    """
    path = local_path("the directory", directory) / MANIFEST
    if not directory.is_dir():
        raise InputError(f"{shown(directory)}: {'not a' if directory.exists() else 'no such'} directory")
    if not path.is_file():
        near = [*sorted(file.parent for file in directory.glob(f"*/{MANIFEST}")), *_above(directory)]
        cure = f"; name {', or '.join(map(shown, near[:3]))}" if near else ""
        raise InputError(f"{shown(path)}: missing; not a directory that `loftq quantize` finished{cure}")
    return checked(hashed_json.load(path), path)


def _above(directory: Path) -> Iterator[Path]:
    """The directory that ``directory`` lies in, if that is a LoftQ checkpoint."""
    parent = directory.absolute().parent
    if (parent / MANIFEST).is_file():
        yield parent


def checked(manifest: dict[str, Any], path: Path) -> dict[str, Any]:
    """``manifest``, read from ``path``. InputError naming the fields that are missing or not what they should be."""
    for part, place, row in _rows(manifest, path):
        try:
            _ROWS[part].validate_python(row)
        except ValidationError as e:
            odd = (f"{'.'.join((*place, *map(str, p['loc'])))}: {p['msg']}" for p in e.errors(include_input=False))
            raise InputError(f"{shown(path)}: {listed(odd, 3)}; not a manifest of this loftq") from e
    names = [row["name"] for row in manifest["matrices"]]
    if names != [row["name"] for row in manifest["plan"]["matrices"]] or len(set(names)) != len(names):
        raise InputError(f"{shown(path)}: matrices are not those of the plan, each once; not a manifest of this loftq")
    return manifest


def kept(manifest: dict[str, Any], path: Path) -> dict[str, str]:
    """Name -> reason of every tensor that a manifest's plan keeps. InputError for what is no such list."""
    try:
        return {row["name"]: row["reason"] for row in manifest["plan"]["kept"]}
    except (TypeError, KeyError) as e:
        raise InputError(f"{shown(path)}: plan.kept: wanted names with reasons; not a manifest of this loftq") from e


def kept_made(manifest: dict[str, Any], path: Path) -> dict[str, Made]:
    """Of every kept tensor that was put together, of what. InputError for what is no such list."""
    rows = [row for row in manifest["plan"]["kept"] if "made" in row]
    try:
        _MADE.validate_python([row["made"] for row in rows])
    except ValidationError as e:
        raise InputError(f"{shown(path)}: plan.kept: {e.error_count()} pieces are none; not of this loftq") from e
    return {row["name"]: made_of(row) for row in rows}


def planned(manifest: dict[str, Any]) -> list[Matrix]:
    """The matrices of a manifest's plan, in order."""
    return [_matrix(row) for row in manifest["plan"]["matrices"]]


def _matrix(row: dict[str, Any]) -> Matrix:
    known = {field.name: row[field.name] for field in fields(Matrix) if field.name in row}
    special = {"shape": tuple(row["shape"]), "quant": from_dict(QuantSpec, row["quant"]), "made": made_of(row)}
    return Matrix(**{**known, **special})


def made_of(row: dict[str, Any]) -> Made:
    """What a tensor of a manifest's plan is put together of."""
    return tuple(tuple(_piece(piece) for piece in pieces) for pieces in row.get("made", ()))


def _piece(row: dict[str, Any]) -> Piece:
    return Piece(row["tensor"], tuple(row["shape"]), row["start"], row["stop"], row["step"], row["transposed"])


def _rows(manifest: dict[str, Any], path: Path) -> Iterator[tuple[str, tuple[str, ...], Any]]:
    """Part, place in the manifest and content of everything that is checked."""
    plan = manifest.get("plan")
    files, many = manifest.get("files"), {"matrices": manifest.get("matrices")}
    many["plan.matrices"] = plan.get("matrices") if isinstance(plan, dict) else None
    for name, rows in many.items():
        if not isinstance(rows, list) or not rows:
            raise InputError(f"{shown(path)}: {name}: wanted a list that is not empty; not a manifest of this loftq")
    if not isinstance(files, dict):
        raise InputError(f"{shown(path)}: files: wanted an object; not a manifest of this loftq")
    yield from ((part, (part,), manifest.get(part)) for part in ("identity", "totals"))
    yield from (("files", ("files", quoted(name)), row) for name, row in files.items())
    for name in files:
        check_name(name, shown(path))
    for name, rows in many.items():
        yield from ((name.partition(".")[0], (name, str(i)), row) for i, row in enumerate(rows))  # type: ignore[arg-type]
