"""An initialization for adapters over a base that is quantized already, from the original weights on disk.

Layer by layer: the original matrix is read, the base's is decoded, and the low-rank term between them goes into the
adapter. Of the original there is one matrix in memory at a time.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loftq.errors import InputError, NumericalError, naming, quoted
from loftq.formats.source import Checkpoint
from loftq.formats.statistics import Statistics
from loftq.numerics import frobenius, oriented, oriented_shape
from loftq.planning import FLOATS, Made, sources
from loftq.solver import fit_adapter
from loftq.sources.checkpoint import open_weights
from loftq.spec import SolveSpec

MATRICES = ("linear", "conv1d", "embedding")

Progress = Callable[[dict[str, Any]], object]  # called with the report of each layer
Begin = Callable[[int, int], Progress]  # called once with the number of layers, and of those done already: none


@dataclass(frozen=True)
class Original:
    """Where the original of a module's weight lies.

    Attributes:
        module: whose it is.
        shape: ``(out, in)``.
        kind: as in :class:`loftq.planning.Role`.
        keep: why it cannot be taken as it is; empty if it can.
        made: what it is put together of, where no tensor of the original is it.
    """

    tensor: str
    module: str
    dtype: str
    shape: tuple[int, ...]
    kind: str
    keep: str
    made: Made = ()


@dataclass(frozen=True)
class Originals:
    """The original matrices of a model, by the modules that hold them."""

    directory: Path
    checkpoint: Checkpoint
    modules: dict[str, Original]
    prefix: str  # of the base model

    def find(self, module: str) -> Original | None:
        """Also for a module of another class over the same base model."""
        from loftq.architecture.skeleton import spellings

        return next((self.modules[n] for n in spellings(module, self.prefix) if n in self.modules), None)


@dataclass(frozen=True)
class Layer:
    """One layer to find an initialization for.

    Attributes:
        name: of the module in the frozen model.
        base: the frozen module.
        s: what the adapter's forward multiplies by.
        dtype: of the adapter's tensors.
    """

    name: str
    base: nn.Module
    original: Original
    rank: int
    s: float
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Fitted:
    """Factors as the adapter stores them, the scaling divided out, and what is known about them."""

    b: Tensor
    a: Tensor
    report: dict[str, Any]


def replace(
    model: nn.Module, weights: Path, adapter: str, spec: SolveSpec, statistics: Statistics | None, begin: Begin
) -> dict[str, Any]:
    """Give every LoRA layer of ``adapter`` its initialization, all or none; see :func:`loftq.replace_lora_weights`."""
    from loftq.adapters.lora import factors, lora_layers, write

    found, skipped = lora_layers(model, adapter)
    originals = open_originals(weights)
    layers = []
    for name, lora in found.items():
        original = originals.find(name)
        reason = _reason_to_skip(name, original, lora.r[adapter], model.get_base_model())  # type: ignore[operator]
        if reason or original is None:
            skipped[name] = reason
            continue
        base, (b, _) = lora.get_base_layer(), factors(lora, adapter)
        layers.append(Layer(name, base, original, lora.r[adapter], lora.scaling[adapter], b.dtype))
    advance = begin(len(layers), 0)
    fitted = []
    for layer in layers:
        fitted.append(fit(layer, originals.checkpoint, spec, statistics))
        advance(fitted[-1].report)
    for layer, start in zip(layers, fitted, strict=True):
        write(found[layer.name], adapter, start.b, start.a)
    return summary([f.report for f in fitted], skipped)


def open_originals(directory: Path) -> Originals:
    """The full-precision checkpoint of a directory: headers only.

    Raises: InputError for one that is quantized itself.
    """
    from loftq.architecture.conversion import converted_roles

    checkpoint, built = open_weights(directory, "give")
    modules: dict[str, Original] = {}
    tensors, roles = converted_roles(built, {n: (t.dtype, t.shape) for n, t in checkpoint.tensors.items()})
    for tensor, role in roles.items():
        dtype, shape = tensors[tensor]
        if role.kind not in MATRICES and not role.keep:
            continue
        shape, named = oriented_shape(role.kind, shape), role.module.removesuffix(".weight")
        original = Original(tensor, named, dtype, shape, role.kind, role.keep, role.made)
        for module in (named, *(n.rpartition(".")[0] for n in role.tied)):
            modules[module] = original
    for role in roles.values():  # a base may hold what transformers fuses as the layers that it came from
        for tensor, shape in sources(role.made).items():
            module, whole = tensor.removesuffix(".weight"), checkpoint.tensors[tensor]
            if len(shape) == 2 and module != tensor:
                modules.setdefault(module, Original(tensor, module, whole.dtype, shape, "linear", ""))
    return Originals(directory, checkpoint, modules, str(built.base_model_prefix))


def _reason_to_skip(name: str, original: Original | None, rank: int, model: Any) -> str:
    """Why a layer keeps the adapter that it has. InputError if that is a sign of another model."""
    if original is None:
        children, prefix = dict(model.named_children()), model.base_model_prefix
        if prefix not in children or name.startswith(f"{prefix}."):
            raise InputError(f"{quoted(name)}: the original has no weights for it; is it of another model?")
        return "a head that the original has no weights for"
    if original.keep:
        return original.keep
    if original.dtype not in FLOATS:
        raise InputError(f"{quoted(original.tensor)}: {original.dtype}; wanted one of {', '.join(FLOATS)}")
    return f"rank {rank} does not fit {original.shape}" if rank > min(original.shape) else ""


def fit(layer: Layer, checkpoint: Checkpoint, spec: SolveSpec, statistics: Statistics | None) -> Fitted:
    """Read, decode and solve one layer; the error after is measured on the values that the adapter will hold.

    Args:
        spec: of it ``svd`` and ``seed`` count.
        statistics: of the inputs, from the original model; where there are none, the weights' norm is used.

    Raises: InputError for a base that is farther from the original than zero is; what :func:`fit_adapter` raises.
    """
    from loftq.frozen.layers import dequantized

    original = layer.original
    with naming(layer.name, original.shape):
        base = dequantized(layer.base)
        weight = oriented(original.kind, checkpoint.read(original.tensor, original.made)).to(base.device).float()
        if weight.shape != base.shape:
            raise InputError(
                f"{original.tensor} is {tuple(weight.shape)}, the layer {tuple(base.shape)}; is it another model's?"
            )
        norm, moments = frobenius(weight), statistics and statistics.moments(original.module)
        start = fit_adapter(
            weight, base, layer.rank, moments=moments, svd=spec.svd, seed=spec.seed, name=original.tensor
        )
        if start.errors[0] >= 1:
            raise InputError(f"the base is farther from {original.tensor} than zero is; is it another model's?")
        b, a = (factor.to(layer.dtype) for factor in start.factors(layer.s))
        if not (b.isfinite().all() and a.isfinite().all()):
            raise NumericalError(f"the initialization does not fit the adapter's {layer.dtype}; use float32 adapters")
        left = torch.addmm(weight.sub_(base), b.float(), a.float(), alpha=-layer.s)
    report = {
        "name": layer.name,
        "tensor": original.tensor,
        "shape": list(original.shape),
        "rank": layer.rank,
        "scaling": layer.s,
        "errors": [start.errors[0], frobenius(left) / norm if norm else 0.0],
        "kept": 0 if start.reason else 1,
        "reason": start.reason,
        "norm": norm,
    }
    if moments:
        report |= {"output_errors": list(start.output_errors), "output_norm": start.output_norm}
    return Fitted(b, a, report)


def summary(layers: list[dict[str, Any]], skipped: Mapping[str, str]) -> dict[str, Any]:
    """Every layer's report, and the relative errors of all of them together."""

    def together(which: int, errors: str = "errors", norms: str = "norm") -> float:
        known = [r for r in layers if errors in r]
        norm = sum(r[norms] ** 2 for r in known) ** 0.5
        return sum((r[errors][which] * r[norms]) ** 2 for r in known) ** 0.5 / norm if norm else 0.0

    found = {"layers": layers, "skipped": dict(skipped), "error_before": together(0), "error": together(1)}
    if any("output_errors" in r for r in layers):
        outputs = ("output_errors", "output_norm")
        found |= {"output_error_before": together(0, *outputs), "output_error": together(1, *outputs)}
    return found
