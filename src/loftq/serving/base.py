"""A finished LoftQ checkpoint as the dense model that it stands for, one tensor at a time."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loftq.architecture import skeleton
from loftq.architecture.conversion import as_published, converted_roles
from loftq.architecture.experts import KIND, STACKS
from loftq.architecture.skeleton import parameter_of
from loftq.checkpoint.manifest import MANIFEST, kept_made, planned, read_manifest
from loftq.checkpoint.verify import layout_of
from loftq.errors import InputError, NumericalError, listed, naming, option, quoted
from loftq.formats import strict_json
from loftq.formats.layouts import Layout
from loftq.formats.lookalikes import refuse_adapter
from loftq.formats.regular import shown
from loftq.formats.rows import gathered
from loftq.formats.source import Checkpoint, open_checkpoint
from loftq.numerics import oriented, oriented_shape
from loftq.planning import Made, Matrix, Role, natural, sources
from loftq.spec import QuantSpec, stored_tensors


@dataclass(frozen=True)
class Dense:
    """A tensor of the dense model.

    Attributes:
        name: as the checkpoint of the original has it.
        runtime: the parameter that it becomes, or a part of it.
        role: what it is in the model; ``module`` and ``kind`` also of what is quantized.
        shape, dtype: as it is stored where it is dense.
        matrix: how it is quantized; None for what is kept. Of a stack of experts, :attr:`shape` has them first.
        made: of which tensors of the original it was put together; empty if it is one of them.
    """

    name: str
    runtime: str
    role: Role
    shape: tuple[int, ...]
    dtype: str
    matrix: Matrix | None = None
    made: Made = ()

    @property
    def experts(self) -> int:
        """How many matrices a stack is; 0 for all else."""
        return self.shape[0] if self.kind in STACKS and len(self.shape) == 3 else 0

    @property
    def kind(self) -> str:
        return self.matrix.kind if self.matrix else self.role.kind


@dataclass(frozen=True)
class Base:
    """A LoftQ checkpoint, opened: headers, plan, and the modules of its model. Weights are read one by one."""

    directory: Path
    manifest: dict[str, Any]
    checkpoint: Checkpoint
    layout: Layout
    model: Any  # on the meta device
    tensors: dict[str, Dense]  # by name, in the order of the model
    _members: dict[str, list[Matrix]] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """The hash of the manifest, which holds those of all files."""
        return self.manifest["sha256"]

    @cached_property
    def config(self) -> dict[str, Any]:
        """What ``config.json`` has."""
        return strict_json.load_object(self.directory / "config.json", special=True)

    @cached_property
    def matrices(self) -> list[Matrix]:
        """What is quantized."""
        return [tensor.matrix for tensor in self.tensors.values() if tensor.matrix]

    @cached_property
    def by_parameter(self) -> dict[str, Dense]:
        return {tensor.runtime: tensor for tensor in self.tensors.values()}

    def parameter(self, name: str) -> Dense | None:
        """The tensor that a parameter is read from, also if the name is that of another head over the same model."""
        for spelled in skeleton.spellings(name, str(self.model.base_model_prefix)):
            if spelled in self.by_parameter:
                return self.by_parameter[spelled]
        return None

    def tied_to(self, name: str) -> str:
        """The parameter that holds the weight of ``name`` too; empty if it has its own, or there is none."""
        ties: dict[str, str] = getattr(self.model, "all_tied_weights_keys", None) or {}
        spelled = skeleton.spellings(name, str(self.model.base_model_prefix))
        return next((ties[one] for one in spelled if one in ties), "")

    def stored(self, matrix: Matrix, expert: int | None = None) -> list[Tensor]:
        """The tensors of a quantized matrix, or of an expert of a stack, as they are in the files."""
        if expert is None:
            return [self.checkpoint.read(entry.name) for entry in self.layout.entries(matrix)]
        if self.layout.restores and matrix.sources:
            return self.stored(self._member(matrix, expert))
        return [self.checkpoint.slice(entry.name, expert) for entry in self.layout.entries(matrix)]

    def by_suffix(self, matrix: Matrix, expert: int | None = None) -> dict[str, Tensor]:
        """The tensors of a packed matrix, or of an expert of a stack, by suffix, as they are in the files."""
        return dict(zip(stored_tensors(matrix.quant, *matrix.shape), self.stored(matrix, expert), strict=True))

    @cached_property
    def as_model(self) -> list[Dense]:
        """The tensors that the model has parameters for; dense experts that are files' tensors each as one stack."""
        kept = {t.name: (t.dtype, t.shape) for t in self.tensors.values() if t.role.kind == KIND and not t.experts}
        seen, roles = converted_roles(self.model, kept)
        made = [Dense(n, n, roles[n], seen[n][1], seen[n][0], made=roles[n].made) for n in seen if n not in kept]
        parts = {name for stack in made for name in sources(stack.made)}
        whole = [t for t in self.tensors.values() if (t.matrix or t.role.module) and t.name not in parts]
        return sorted([*whole, *made], key=lambda tensor: natural(tensor.name))

    @property
    def stacks(self) -> dict[str, QuantSpec | None]:
        """The stacks of experts that the model has, and how they are quantized; None where they are dense."""
        return {t.runtime: t.matrix and t.matrix.quant for t in self.as_model if t.experts}

    @cached_property
    def published(self) -> tuple[dict[str, str], dict[str, Made]]:
        """How the family's files have the parameters: :func:`loftq.architecture.conversion.as_published`."""
        return as_published(self.model)

    def experts_of(self, stack: Dense) -> Made:
        """The tensors that the source, or else other files of the family, have for the experts of a stack."""
        has_source = stack.matrix is not None and stack.matrix.sources
        return stack.made if has_source else self.published[1].get(stack.runtime, ())

    def read(self, tensor: Dense, expert: int | None = None) -> Tensor:
        """A matrix that is quantized as float32 ``(out, in)``; another one oriented alike; all else as it is.

        Args:
            expert: of a stack, of which one matrix is read.
        """
        if tensor.matrix is None:
            return oriented(tensor.kind, self._kept(tensor, expert))
        one = tensor.matrix if expert is None else self._member(tensor.matrix, expert)
        with naming(one.name, one.shape):
            return self.layout.decode(one, self.stored(tensor.matrix, expert))

    def _kept(self, tensor: Dense, expert: int | None) -> Tensor:
        if expert is None:
            return self.checkpoint.read(tensor.name)
        if tensor.name in self.checkpoint.tensors:
            return self.checkpoint.slice(tensor.name, expert)
        pieces = tensor.made[expert]
        return gathered(pieces, {name: self.checkpoint.read(name) for name in sources((pieces,))})

    def _member(self, stack: Matrix, expert: int) -> Matrix:
        if stack.name not in self._members:
            self._members[stack.name] = stack.members
        return self._members[stack.name][expert]


def open_base(directory: Path) -> Base:
    """Open what ``loftq quantize`` made.

    Raises: InputError for a directory that it did not finish, whose files changed, or with an adapter beside them.
    """
    manifest = read_manifest(directory)
    refuse_adapter(directory)
    layout = layout_of(directory, manifest)
    checkpoint = open_checkpoint(directory)
    matrices = planned(manifest)
    entries = {entry.name: entry for matrix in matrices for entry in layout.entries(matrix)}
    found = checkpoint.tensors
    odd = [n for n, e in entries.items() if n not in found or (found[n].dtype, found[n].shape) != (e.dtype, e.shape)]
    if odd:
        raise InputError(
            f"{shown(directory)}: {listed(odd, 3)}: missing, or not what {MANIFEST} says; run `loftq verify` on it"
        )
    names = [name for name in found if name not in entries]
    model = skeleton.build(directory, len(names) + len(matrices), quantized=True)
    rename = skeleton.renamer(model)
    roles = skeleton.roles(model, names)
    made = kept_made(manifest, directory / MANIFEST)
    kept = (Dense(n, rename(n)[0], roles[n], found[n].shape, found[n].dtype, made=made.get(n, ())) for n in names)
    dense = (_dense(matrix) for matrix in matrices)
    by_name = {tensor.name: tensor for tensor in (*kept, *dense)}
    ordered = {name: by_name[name] for name in sorted(by_name, key=natural)}
    return Base(directory, manifest, checkpoint, layout, model, _with_ties(ordered, model))


def _dense(matrix: Matrix) -> Dense:
    shape = oriented_shape(matrix.kind, matrix.shape)
    shape, parameter = (matrix.experts, *shape) if matrix.experts else shape, parameter_of(matrix)
    return Dense(matrix.name, parameter, Role(matrix.module, matrix.kind), shape, matrix.dtype, matrix, matrix.made)


def _with_ties(tensors: dict[str, Dense], model: Any) -> dict[str, Dense]:
    """The tensors, those that are another parameter too with its name."""
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    others: dict[str, list[str]] = {}
    for name, held in ties.items():
        others.setdefault(held, []).append(name)
    return {
        name: replace(t, role=replace(t.role, tied=tuple(others.get(t.runtime, ())))) for name, t in tensors.items()
    }


def narrowed(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """``tensor`` in another floating-point type. NumericalError if it does not fit."""
    cast = tensor.to(dtype)
    if not _finite(cast):
        why = "not finite; check the adapter, and the base with `loftq verify`"
        if _finite(tensor):
            why = f"has values beyond {str(dtype).removeprefix('torch.')}; use {option('dtype', 'bfloat16')}"
        raise NumericalError(f"{quoted(name)}: {why}")
    return cast


def _finite(tensor: Tensor) -> bool:
    """By its extremes, for ``isfinite`` copies tables of gigabytes."""
    return not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all())
