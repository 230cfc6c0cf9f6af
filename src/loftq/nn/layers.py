"""Layers that hold a packed weight: subclasses of ``nn.Linear`` and ``nn.Embedding``.

Being subclasses, PEFT's dispatch, ``target_modules="all-linear"``, accelerate and FSDP find them by their ordinary
isinstance checks. All stored tensors are frozen Parameters, so they are saved, moved and sharded like any other.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from loftq.nn import ops
from loftq.numerics.blockwise import decode_rows
from loftq.spec import QuantSpec, stored_tensors

TORCH_DTYPES = {
    "I8": torch.int8,
    "U8": torch.uint8,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}


class PackedWeight(nn.Module):
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
        self._stored_names = tuple(self.layout())
        for name, (stored_dtype, shape) in self.layout().items():
            empty = torch.empty(shape, dtype=TORCH_DTYPES[stored_dtype], device=device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        # Holds no value. Its dtype is the model's, and follows .to(dtype) like any buffer.
        self.register_buffer("_like", torch.empty(0, device=device, dtype=dtype), persistent=False)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the model around this layer; the stored tensors keep their own."""
        return self._like.dtype  # type: ignore[union-attr, return-value]

    def layout(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Suffix -> (safetensors dtype, shape) of the stored tensors."""
        return stored_tensors(self.spec, self._rows, self._columns)

    @property
    def stored(self) -> list[Tensor]:
        return [self._parameters[name] for name in self._stored_names]  # type: ignore[misc]

    def load_stored(self, tensors: dict[str, Tensor]) -> None:
        """Take over freshly encoded tensors (see :func:`loftq.numerics.encode`)."""
        for name in self._stored_names:
            self._parameters[name] = nn.Parameter(tensors[name], requires_grad=False)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight, ``(rows, columns)``."""
        return ops.dequantize(self.stored, self._spec_key, self._columns, dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedWeight":
        """Move and share the stored tensors like all others, but never convert them: they pass ``fn`` as bytes."""
        held = {name: self._parameters.pop(name) for name in self._stored_names}
        super()._apply(fn, recurse)
        for name, parameter in held.items():
            assert parameter is not None
            moved = fn(parameter.data.view(torch.int8)).view(parameter.dtype)
            self.register_parameter(name, nn.Parameter(moved, requires_grad=False))
        return self

    def reset_parameters(self) -> None:
        """Nothing to initialise: the stored tensors come from a file or from the solver."""


class LoftQLinear(PackedWeight, nn.Linear):
    """A linear layer whose weight stays packed; ``y = x W^T + b`` decodes it on the fly, forward and backward."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        spec: QuantSpec,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self._init_packed(spec, out_features, in_features, device, dtype)
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = ops.linear(x, self.stored, self._spec_key, self._columns)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def to_dense(self, dtype: torch.dtype) -> nn.Linear:
        """An ordinary ``nn.Linear`` with the decoded weight."""
        dense = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device=self.weight.device, dtype=dtype
        )
        dense.weight = nn.Parameter(self.dequantize(dtype), requires_grad=False)
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
        stored = dict(zip(self._stored_names, self.stored, strict=True))
        rows = decode_rows(stored, self.spec, self._columns, input.flatten())
        return rows.view(*input.shape, self.embedding_dim).to(self.compute_dtype)

    def to_dense(self, dtype: torch.dtype) -> nn.Embedding:
        """An ordinary ``nn.Embedding`` with the decoded table."""
        return nn.Embedding.from_pretrained(self.dequantize(dtype), freeze=True, padding_idx=self.padding_idx)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {_describe(self.spec)}"


def pack_like(module: nn.Module, spec: QuantSpec, device: torch.device | str | None = None) -> PackedWeight:
    """An empty packed layer to put in the place of a Linear, a Conv1D (stored transposed) or an Embedding."""
    dtype = module.weight.dtype  # type: ignore[union-attr]
    if isinstance(module, nn.Embedding):
        return LoftQEmbedding(
            module.num_embeddings, module.embedding_dim, spec, module.padding_idx, device=device, dtype=dtype
        )
    rows, columns = module.weight.shape  # type: ignore[misc, union-attr]
    if not isinstance(module, nn.Linear):  # transformers' Conv1D holds (in, out)
        rows, columns = columns, rows
    return LoftQLinear(columns, rows, module.bias is not None, spec, device=device, dtype=dtype)


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` in the place of the submodule ``name``, in the same mode (train or eval)."""
    parent, _, leaf = name.rpartition(".")
    new.train(model.get_submodule(name).training)
    setattr(model.get_submodule(parent), leaf, new)


def _describe(spec: QuantSpec) -> str:
    return f"bits={spec.bits}, code={spec.code}, block_size={spec.block_size}"
