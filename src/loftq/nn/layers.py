"""Layers that hold a packed weight: subclasses of ``nn.Linear`` and ``nn.Embedding``.

Being subclasses, PEFT's dispatch, ``target_modules="all-linear"``, accelerate and FSDP find them by their ordinary
isinstance checks. All stored tensors are frozen Parameters, so they are saved, moved and sharded like any other.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from loftq.architecture.kinds import kind_of
from loftq.errors import UsageError, option
from loftq.nn import ops
from loftq.numerics import oriented_shape
from loftq.spec import QuantSpec, stored_tensors, why_not

TORCH_DTYPES = {
    "I8": torch.int8,
    "U8": torch.uint8,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
# What torch keeps of the hooks around a module's forward and backward.
HOOKS = (
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs"),
    *("_forward_hooks_always_called", "_backward_pre_hooks", "_backward_hooks", "_is_full_backward_hook"),
)


class Packed(nn.Module):
    """Base of packed modules: their stored tensors are frozen Parameters that are never converted.

    Attributes:
        weight_count: number of weights that the stored tensors stand for.
        compute_dtype: of the model around this module; the stored tensors keep their own. It follows ``.to(dtype)``.
    """

    _stored_dtypes: dict[str, torch.dtype]
    weight_count: int
    compute_dtype: torch.dtype

    def _hold(self, layout: dict[str, tuple[str, tuple[int, ...]]], device: torch.device | str | None) -> None:
        """Register empty stored tensors. ``layout``: name -> (safetensors dtype, shape)."""
        for name, (stored, shape) in layout.items():
            self._stored_dtypes[name] = TORCH_DTYPES[stored]
            empty = torch.empty(shape, dtype=TORCH_DTYPES[stored], device=device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))

    def _checked(self, names: Iterable[str]) -> list[Tensor]:
        """Stored tensors. UsageError if a cast has rounded one of them."""
        found = []
        for name in names:
            wanted, held = self._stored_dtypes[name], self._parameters.get(name)
            held = getattr(self, name) if held is None else held  # in a replica of nn.DataParallel
            if held.dtype != wanted and not (wanted.is_floating_point and held.dtype == torch.float32):
                raise UsageError(
                    f"{name} of a packed layer is {held.dtype}, stored as {wanted}: something rounded it, such as a "
                    f"mixed precision policy of FSDP. Quantize with {option('scale_dtype', 'bfloat16')} and without "
                    f"{option('double_quant')}, or switch the policy's param_dtype off"
                )
            found.append(held)
        return found

    @property
    def stored(self) -> list[Tensor]:
        """The stored tensors in the order of their layout. UsageError if a cast has rounded one of them."""
        return self._checked(self._stored_dtypes)

    def matrices(self) -> Iterator[tuple[dict[str, Tensor], QuantSpec]]:
        """The stored tensors of every matrix, by suffix, and its spec."""
        raise NotImplementedError(f"{type(self).__name__} does not say what matrices it holds")

    @property
    def stored_count(self) -> int:
        """Number of elements of the stored tensors."""
        return sum(self._parameters[name].numel() for name in self._stored_dtypes)  # type: ignore[union-attr]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Write the dtypes of the format, whatever PEFT's ``prepare_model_for_kbit_training`` widened meanwhile."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, dtype in self._stored_dtypes.items():
            destination[prefix + name] = destination[prefix + name].to(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Packed":
        """Move and share the stored tensors like all others, but never convert them: they pass ``fn`` as bytes."""
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device="cpu")).dtype
        everything = self._parameters
        self._parameters = {n: p for n, p in everything.items() if n not in self._stored_dtypes}
        super()._apply(fn, recurse)
        for name in self._stored_dtypes:
            held: Tensor = everything[name].data  # type: ignore[union-attr]
            self._parameters[name] = nn.Parameter(fn(held.view(torch.int8)).view(held.dtype), requires_grad=False)
        self._parameters = {n: self._parameters[n] for n in everything}  # in the order of before
        return self


class PackedWeight(Packed):
    """The stored tensors of one matrix, as frozen Parameters named by suffix. A mixin of the two layers below."""

    spec: QuantSpec

    def _init_packed(
        self,
        spec: QuantSpec,
        rows: int,
        columns: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        self.spec = spec
        self._columns = columns
        self._spec_key = ops.spec_key(spec)
        self._rows = rows
        self._stored_dtypes = {}
        self._hold(self.layout(), device)
        self.compute_dtype = dtype or torch.get_default_dtype()

    def layout(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Suffix -> (safetensors dtype, shape) of the stored tensors."""
        return stored_tensors(self.spec, self._rows, self._columns)

    @property
    def weight_count(self) -> int:  # type: ignore[override]
        """Number of weights of the dense layer."""
        return self._rows * self._columns

    def matrices(self) -> Iterator[tuple[dict[str, Tensor], QuantSpec]]:
        yield dict(zip(self.layout(), self.stored, strict=True)), self.spec

    def load_stored(self, tensors: dict[str, Tensor]) -> None:
        """Take over freshly encoded tensors (see :func:`loftq.numerics.encode`)."""
        for name in self._stored_dtypes:
            self._parameters[name] = nn.Parameter(tensors[name], requires_grad=False)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight, ``(rows, columns)``."""
        return ops.dequantize(self.stored, self._spec_key, self._columns, dtype)

    def reset_parameters(self) -> None:
        """Do nothing: the stored tensors come from a file or from the solver."""


class LoftQLinear(PackedWeight, nn.Linear):
    """A linear layer whose weight stays packed; ``y = x W^T + b`` decodes it on the fly, forward and backward.

    Attributes:
        conv1d: it stands for a ``Conv1D`` of transformers, whose dense weight is ``(in, out)``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        spec: QuantSpec,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        conv1d: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.conv1d = in_features, out_features, conv1d
        self._init_packed(spec, out_features, in_features, device, dtype)
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(ops.autocast(x), *self.operands)

    @property
    def operands(self) -> tuple[list[Tensor], str, int, Tensor | None]:
        """What :func:`loftq.nn.ops.linear` multiplies by."""
        return self.stored, self._spec_key, self._columns, self.bias

    def to_dense(self, dtype: torch.dtype) -> nn.Module:
        """An ordinary ``nn.Linear``, or ``Conv1D``, with the decoded weight."""
        from transformers.pytorch_utils import Conv1D

        weight, shape = self.dequantize(dtype), (self.in_features, self.out_features)
        with torch.device("meta"):  # no initialisation, no random numbers drawn
            dense = Conv1D(*shape[::-1]) if self.conv1d else nn.Linear(*shape, self.bias is not None)
        dense.weight = nn.Parameter(weight.T.contiguous() if self.conv1d else weight, requires_grad=False)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().to(dtype), requires_grad=self.bias.requires_grad)
        return dense

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, {_describe(self.spec)}"


class LoftQEmbedding(PackedWeight, nn.Embedding):
    """An embedding table that stays packed; only the rows looked up are decoded."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        spec: QuantSpec,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self._init_packed(spec, num_embeddings, embedding_dim, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        return ops.lookup(input, self.stored, self._spec_key, self._columns, self.compute_dtype)

    def to_dense(self, dtype: torch.dtype) -> nn.Embedding:
        """An ordinary ``nn.Embedding`` with the decoded table."""
        return nn.Embedding.from_pretrained(self.dequantize(dtype), freeze=True, padding_idx=self.padding_idx)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {_describe(self.spec)}"


def has_packed(module: nn.Module) -> bool:
    """Whether a module, or one inside it, is packed."""
    return any(isinstance(inner, Packed) for inner in module.modules())


def can_pack(module: nn.Module) -> bool:
    """Whether :func:`pack_like` takes ``module``."""
    return bool(kind_of(module))


def pack_like(module: nn.Module, spec: QuantSpec, device: torch.device | str | None = None) -> PackedWeight:
    """An empty packed layer to put in the place of a Linear, a Conv1D (which holds ``(in, out)``) or an Embedding."""
    dtype: Any = module.weight.dtype  # type: ignore[union-attr]
    kind = kind_of(module)
    rows, columns = oriented_shape(kind, tuple(module.weight.shape))  # type: ignore[arg-type, union-attr]
    if why := why_not(spec, kind, rows):
        raise UsageError(f"a {kind} of {rows} rows cannot be packed so: {why}")
    if isinstance(module, nn.Embedding):
        return LoftQEmbedding(
            module.num_embeddings, module.embedding_dim, spec, module.padding_idx, device=device, dtype=dtype
        )
    return LoftQLinear(columns, rows, module.bias is not None, spec, device, dtype, kind == "conv1d")


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` in the place of the submodule ``name``, in the same mode (train or eval) and with its hooks."""
    parent, _, leaf = name.rpartition(".")
    old = model.get_submodule(name)
    new.train(old.training)
    for hooks in HOOKS:  # not copied: their handles remove them still
        setattr(new, hooks, getattr(old, hooks))
    setattr(model.get_submodule(parent), leaf, new)


def _describe(spec: QuantSpec) -> str:
    return ", ".join(f"{name}={value}" for name, value in list(spec.to_dict().items())[:3])
