"""What a GGUF file says of a model, beside its weights: architecture, sizes, positions; and its tensors' names.

By the package gguf: keys and names are its own. Which families have what is said here once.
"""

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loftq.architecture.experts import parts_of
from loftq.architecture.served import FAMILIES, check_model, needs_converter
from loftq.errors import InputError, extra, quoted
from loftq.numerics import oriented_shape
from loftq.serving.base import Dense

with extra("gguf"):
    import gguf  # type: ignore[import-not-found]
    from gguf.gguf_writer import GGUFWriter, TensorInfo, WriterState  # type: ignore[import-not-found]


@dataclass(frozen=True)
class Family:
    """A model's architecture in llama.cpp, and its configuration."""

    name: str
    config: Any
    names: Any  # gguf's map of names

    @property
    def head_dim(self) -> int:
        return getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads

    def tensor(self, tensor: Dense) -> str:
        """The name of a tensor in GGUF. InputError if it has none."""
        found = self.names.get_name(tensor.runtime, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise InputError(f"{quoted(tensor.name)}: llama.cpp's {self.name} has no such tensor")
        return found

    def parts(self, tensor: Dense, model: Any) -> dict[str, slice]:
        """The tensors in GGUF that one is: name -> rows of it. A stack is of several, of every matrix the rows."""
        if not tensor.experts:
            return {self.tensor(tensor): slice(None)}
        owner, rows = tensor.runtime.rpartition(".")[0], oriented_shape(tensor.kind, tensor.shape[1:])[0]
        found = parts_of(tensor.runtime, rows, model.get_submodule(owner))
        named = {self.names.get_name(f"{owner}.{leaf}"): rows for leaf, rows in found.items()}
        if None in named or not named:
            raise InputError(
                f"{quoted(tensor.name)}: llama.cpp's {self.name} has no such experts; merge and convert it"
            )
        return {f"{name}.weight": rows for name, rows in named.items()}

    def heads(self, name: str) -> int:
        """Heads whose rows GGUF has in another order, of the tensor that it calls ``name``; 0 if it has none.

        Llama's rotary embedding turns pairs of halves in transformers, and of neighbours in llama.cpp.
        """
        if self.name != "llama":
            return 0
        part = name.rsplit(".", 2)[-2]
        own = {"attn_q": self.config.num_attention_heads, "attn_k": self.config.num_key_value_heads}
        return own.get(part, 0)


def family_of(model: Any) -> Family:
    """Of a model of transformers. InputError for one that llama.cpp's script has to write."""
    if why := needs_converter(model):
        raise InputError(why)
    check_model("gguf", model)
    name = FAMILIES[type(model).__name__]
    number = next(n for n, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
    return Family(name, model.config, gguf.get_tensor_name_map(number, model.config.num_hidden_layers))


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a matrix, or of its bytes, in llama.cpp's order: of each head ``(2, n)`` becomes ``(n, 2)``."""
    if not heads:
        return rows
    shape = rows.shape
    return rows.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


class Header(GGUFWriter):
    """The beginning of a GGUF file, in memory: all but the tensors' bytes, which are streamed behind it."""

    def __init__(self, architecture: str) -> None:
        super().__init__(None, architecture)
        self.sizes: list[int] = []

    def open_output_file(self, path: Path | None = None) -> None:
        self.fout, self.state = [io.BytesIO()], WriterState.EMPTY  # type: ignore[list-item]

    def add(self, name: str, shape: tuple[int, ...], kind: int, size: int) -> None:
        """A tensor of GGML's type ``kind``, which the package need not know; ``size`` in bytes."""
        if name in self.tensors[0]:
            raise InputError(f"{quoted(name)}: two tensors have this name in GGUF")
        self.tensors[0][name] = TensorInfo(shape=shape, dtype=kind, nbytes=size)  # type: ignore[arg-type]

    def encoded(self) -> bytes:
        self.write_header_to_file()
        self.write_kv_data_to_file()
        self.write_ti_data_to_file()
        raw: bytes = self.fout[0].getvalue()  # type: ignore[index, union-attr]
        return raw + padding(len(raw))


def padding(size: int) -> bytes:
    """What fills up to where the next tensor may begin."""
    return bytes(-size % gguf.GGUF_DEFAULT_ALIGNMENT)


def add_sizes(header: Header, family: Family, vocabulary: int) -> None:
    """Sizes, positions and constants of the model."""
    config = family.config
    context = config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    if window and family.name != "phi3":  # others know no window: beyond it, it would be another model
        context = min(context, window)
    header.add_vocab_size(vocabulary)
    header.add_context_length(context)
    header.add_embedding_length(config.hidden_size)
    header.add_block_count(config.num_hidden_layers)
    header.add_feed_forward_length(config.intermediate_size)
    header.add_head_count(config.num_attention_heads)
    header.add_head_count_kv(config.num_key_value_heads)
    header.add_layer_norm_rms_eps(config.rms_norm_eps)
    header.add_key_length(family.head_dim)
    header.add_value_length(family.head_dim)
    rope = getattr(config, "rope_parameters", None) or {}
    part = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1
    header.add_rope_dimension_count(int(family.head_dim * part))
    if family.name == "phi3":
        header.add_sliding_window(window or 0)
    header.add_rope_freq_base(float(rope.get("rope_theta") or 10000.0))
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        header.add_rope_scaling_type(gguf.RopeScalingType(kind))
        header.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "yarn":
        header.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))


def add_experts(header: Header, family: Family, shapes: dict[str, tuple[int, ...]]) -> None:
    """Sizes of the experts, by the ``shapes`` of the file's tensors; nothing where there are none."""
    stack, shared = (shapes.get(f"blk.0.ffn_down_{kind}.weight") for kind in ("exps", "shexp"))
    if stack is None:
        return
    header.add_expert_count(stack[0])
    header.add_expert_used_count(family.config.num_experts_per_tok)
    header.add_expert_feed_forward_length(stack[2])
    if shared is not None:
        header.add_expert_shared_feed_forward_length(shared[1])


def rope_factors(family: Family) -> np.ndarray | None:
    """By what llama3's rule divides every frequency; None where there is no such rule.

    As in transformers' ``_compute_llama3_parameters``: long waves by ``factor``, short ones not, between them in part.
    """
    rope = getattr(family.config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "llama3":
        return None
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    old = float(rope["original_max_position_embeddings"])
    steps = np.arange(0, family.head_dim, 2, dtype=np.float32) / family.head_dim
    waves = 2 * math.pi * float(rope["rope_theta"]) ** steps
    smooth = np.clip((old / waves - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
