"""Experts that stay packed: a stack of matrices, of which only those that tokens are routed to are decoded.

transformers marks its classes of experts with all that tells them apart (``use_experts_implementation``), and asks of
each the same call, so one ``forward`` serves them all: gated or not, with biases, transposed, interleaved. Two
more are for classes without the mark (:mod:`loftq.architecture.experts`).
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loftq.architecture.experts import FIRST, LAST, REVERSED, TURNED, way_of
from loftq.errors import InputError
from loftq.nn import ops
from loftq.nn.layers import Packed
from loftq.spec import QuantSpec, stacked_tensors, stored_tensors

HOOKED = "_old_forward"  # what accelerate's hook calls, with the weights in memory


@dataclass(frozen=True)
class Bank:
    """A stack of experts' matrices, each stored as ``(out, in)``, which is ``(rows, columns)``.

    Attributes:
        transposed: the dense Parameter is ``(experts, in, out)``.
    """

    spec: QuantSpec
    experts: int
    rows: int
    columns: int
    transposed: bool

    @property
    def weight_count(self) -> int:  # type: ignore[override]
        return self.experts * self.rows * self.columns

    @property
    def dense_shape(self) -> tuple[int, int, int]:
        """Of the dense Parameter."""
        return (self.experts, *((self.columns, self.rows) if self.transposed else (self.rows, self.columns)))

    def layout(self, name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Names beside that of the Parameter -> safetensors dtype and shape, the experts first."""
        return stacked_tensors(self.spec, name, self.experts, self.rows, self.columns)


class StackFactors(NamedTuple):
    """An adapter's part of a stack: ``W_e + s · B_e @ A_e``."""

    a: Tensor  # (experts, rank, in)
    b: Tensor  # (experts, out, rank)
    s: float


class PackedExperts(Packed):
    """A module of experts some of whose stacks are packed. Its class is made by :func:`pack_experts`."""

    banks: dict[str, Bank]
    is_reversed = False  # whether its dense stacks are ``(experts, in, out)``, and PEFT does not know

    @property
    def weight_count(self) -> int:  # type: ignore[override]
        return sum(bank.weight_count for bank in self.banks.values())

    @property
    def stacks(self) -> list[str]:
        """The packed stacks, in the order of the module's Parameters."""
        return [name for name in self._parameters if name in self.banks]

    def matrices(self) -> Iterator[tuple[dict[str, Tensor], QuantSpec]]:
        for name, bank in self.banks.items():
            suffixes = stored_tensors(bank.spec, bank.rows, bank.columns)
            stored = self.stored_of(name)
            for e in range(bank.experts):
                yield dict(zip(suffixes, (tensor[e] for tensor in stored), strict=True)), bank.spec

    def stored_of(self, name: str) -> list[Tensor]:
        """The stored tensors of a stack, in the order of its layout."""
        return self._checked(self.banks[name].layout(name))

    def expert(self, name: str, index: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """One dense matrix ``(out, in)``."""
        stored = [tensor[index] for tensor in self.stored_of(name)]
        return ops.dequantize(stored, ops.spec_key(self.banks[name].spec), self.banks[name].columns, dtype)

    def dense(self, name: str, dtype: torch.dtype) -> Tensor:
        """A whole stack, as the model had it."""
        bank = self.banks[name]
        stack = torch.empty(bank.dense_shape, dtype=dtype, device=self._parameters[name].device)  # type: ignore[union-attr]
        for e, place in enumerate(stack):
            one = self.expert(name, e, dtype)
            place.copy_(one.T if bank.transposed else one)
        return stack

    def load_expert(self, name: str, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Take over the freshly encoded tensors of one expert (see :func:`loftq.numerics.encode`)."""
        for place, tensor in zip(self.stored_of(name), tensors.values(), strict=True):
            place.data[index] = tensor

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        *,
        lora: Mapping[str, list[StackFactors]] | None = None,
    ) -> Tensor:
        """The sum of every token's experts, weighted.

        Args:
            hidden_states: ``(tokens, hidden)``.
            top_k_index, top_k_weights: ``(tokens, k)``. An index beyond the last expert is of none, and adds nothing.
            lora: stack -> what adapters add to it.
        """
        me: Any = self
        tokens, k = top_k_index.shape
        experts, order = top_k_index.reshape(-1).sort(stable=True)
        x = ops.autocast(hidden_states[order // k])
        first = next(name for name in FIRST if hasattr(self, name))
        count = len(getattr(self, first))
        ends = ops.known(torch.searchsorted(experts, torch.arange(count, device=experts.device), right=True))
        of_bias = experts.clamp(max=count - 1)
        x = self._project(first, x, ends, of_bias, (lora or {}).get(first, []))
        x = me._apply_gate(x) if me.has_gate else me.act_fn(x)
        x = self._project(LAST, x, ends, of_bias, (lora or {}).get(LAST, []))
        if getattr(me, "has_post_expert_norm", False):
            x = me.post_expert_norm(x)
        weights = top_k_weights.reshape(-1)[order].masked_fill(experts >= count, 0)
        x = x * weights[:, None]
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return x[place].view(tokens, k, x.shape[1]).sum(1).to(hidden_states.dtype)

    def _project(self, name: str, x: Tensor, ends: Tensor, experts: Tensor, lora: list[StackFactors]) -> Tensor:
        """``x_i @ (W_e + s · B_e A_e).T + bias_e``, rows of ``x`` being grouped by their experts ``e``."""
        if name in self.banks:
            bank = self.banks[name]
            y = ops.experts(x, ends, self.stored_of(name), ops.spec_key(bank.spec), bank.rows, bank.columns)
        else:
            weight: Any = getattr(self, name)
            weight = weight if self.is_reversed or self.is_transposed else weight.transpose(1, 2)
            y = ops.grouped_mm(x, weight.to(x.dtype), ends)
        for a, b, s in lora:
            dtype = ops.autocast_dtype(x) or a.dtype
            inner = ops.grouped_mm(x.to(dtype), a.transpose(1, 2).to(dtype), ends)
            y = y + (ops.grouped_mm(inner, b.transpose(1, 2).to(dtype), ends) * s).to(y.dtype)
        bias = getattr(self, f"{name}_bias", None)
        return y if bias is None else y + bias[experts].to(y.dtype)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """The class is made for each class of experts, and has no place where pickle would find it."""
        return _revived, type(self).__bases__, self.__dict__

    def extra_repr(self) -> str:
        return ", ".join(
            f"{name}: {b.experts} x ({b.rows}, {b.columns}), bits={b.spec.bits}, code={b.spec.code}"
            for name, b in self.banks.items()
        )


class PackedBatches(PackedExperts):
    """Experts that are given as many rows each, zeros where a token is not sent to them, as in Llama 4."""

    is_reversed = True

    def forward(self, hidden_states: Tensor, *, lora: Mapping[str, list[StackFactors]] | None = None) -> Tensor:  # type: ignore[override]
        """``(experts · n, hidden)``; what is zero comes out as zero, and is left out of all products."""
        me: Any = self
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        count = len(getattr(self, LAST))
        places = x.any(1).nonzero()[:, 0]
        ends = ops.known(torch.searchsorted(places, torch.arange(1, count + 1, device=x.device) * (len(x) // count)))
        part = ops.autocast(x[places])
        gate, up = self._project(FIRST[0], part, ends, ends, (lora or {}).get(FIRST[0], [])).chunk(2, -1)
        y = self._project(LAST, up * me.act_fn(gate), ends, ends, (lora or {}).get(LAST, []))
        return torch.zeros_like(x).index_copy(0, places, y.to(x.dtype))


class PackedProducts(PackedExperts):
    """One stack, called with rows sorted by expert and the number of each expert's, as in JetMoe."""

    def forward(  # type: ignore[override]
        self, inputs: Tensor, expert_size: list[int], *, lora: Mapping[str, list[StackFactors]] | None = None
    ) -> Tensor:
        ends = torch.tensor(expert_size, device="cpu").cumsum(0)
        return self._project("weight", ops.autocast(inputs), ends, ends, (lora or {}).get("weight", []))


_WAYS = {"routed": PackedExperts, "batched": PackedBatches, "product": PackedProducts}


@functools.cache
def _packed_class(way: type[PackedExperts], dense: type[nn.Module]) -> type[nn.Module]:
    return type(f"LoftQ{dense.__name__}", (way, dense), {"__module__": __name__})


def _revived(way: type[PackedExperts], dense: type[nn.Module]) -> nn.Module:
    packed = _packed_class(way, dense)
    return packed.__new__(packed)


def pack_experts(
    module: nn.Module, name: str, spec: QuantSpec, device: torch.device | str | None = None
) -> PackedExperts:
    """Put empty packed tensors in the place of one stack; the module itself stays, with all else that it has.

    They come in the place of the dense Parameter among the others, since PEFT nests its layers in that order.
    """
    dense: Any = module.get_parameter(name)
    packed: Any = module
    if not isinstance(module, PackedExperts):
        way = way_of(module)
        if way is None:
            raise InputError(f"{type(module).__name__}.{name} is no stack of experts that can be packed")
        packed.__class__ = _packed_class(_WAYS[way.name], type(module))
        packed._kind = way.kind
        packed.banks, packed._stored_dtypes = {}, {}
        packed.compute_dtype = dense.dtype
    experts, rows, columns = dense.shape
    transposed = packed._kind in (TURNED, REVERSED)
    rows, columns = (columns, rows) if transposed else (rows, columns)
    bank = packed.banks[name] = Bank(spec, experts, rows, columns, transposed)
    layout, before = bank.layout(name), list(packed._parameters)
    del packed._parameters[name]
    packed._hold(layout, device)
    order = [new for old in before for new in (layout if old == name else [old])]
    packed._parameters = {new: packed._parameters[new] for new in order}
    return packed


@contextlib.contextmanager
def watched(module: Any, look: Callable[[str, Tensor, Tensor], object]) -> Iterator[None]:
    """Dense experts that compute as packed ones do, and tell of every product before it is made.

    Args:
        look: called with the stack, its inputs sorted by expert, and for every expert the number of the row after its
            last.
    """
    plain, way, hooked = type(module), way_of(module), module.__dict__.get(HOOKED)
    assert way is not None, "no stacks that are known"
    packed: Any = _packed_class(_WAYS[way.name], plain)

    def project(name: str, x: Tensor, ends: Tensor, *rest: Any) -> Tensor:
        look(name, x, ends)
        return packed._project(module, name, x, ends, *rest)

    added = {"banks": {}, "_stored_dtypes": {}, "_project": project}
    module.__class__ = packed
    module.__dict__.update(added)
    if hooked:
        module.__dict__[HOOKED] = packed.forward.__get__(module)
    try:
        yield
    finally:
        module.__class__ = plain
        for name in added:
            del module.__dict__[name]
        if hooked:
            module.__dict__[HOOKED] = hooked


def unpack_experts(module: PackedExperts, dtype: torch.dtype) -> PackedExperts:
    """Make a module dense, of the class that it was packed from; a twin that still holds what was packed."""
    twin = copy.copy(module)
    dense = {name: nn.Parameter(module.dense(name, dtype), requires_grad=False) for name in module.banks}
    kept = {n: dense.get(n, p) for n, p in module._parameters.items() if n in dense or n not in module._stored_dtypes}
    module.__class__ = type(module).__bases__[1]
    module._parameters = kept
    del module.banks, module._stored_dtypes, module._kind, module.compute_dtype
    return twin


def repack_experts(module: nn.Module, twin: PackedExperts) -> None:
    """Undo :func:`unpack_experts`."""
    module.__class__ = type(twin)
    module.__dict__.update(twin.__dict__)
