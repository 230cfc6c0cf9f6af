"""Where a packed weight has to become dense: modules that are fully trained, resized tables, trained tokens."""

import copy
from typing import Any

from torch import nn

from loftq.errors import UsageError
from loftq.nn.hf import forget_unpacked, unpack_model
from loftq.nn.layers import LoftQEmbedding, LoftQLinear, PackedWeight, has_packed, replace_module
from loftq.patching import patches


def train_dense_copies(other: Any) -> None:
    """Let ``modules_to_save`` train a dense copy of packed layers.

    Args:
        other: the module ``peft.utils.other``.
    """

    @patches(other.ModulesToSaveWrapper, "update")
    def update_with_dense_copy(
        update: Any, self: Any, adapter_name: str, tied_module: Any = None, **kwargs: Any
    ) -> None:
        original = self.original_module
        if tied_module is None and adapter_name not in self.modules_to_save and has_packed(original):
            self.modules_to_save[adapter_name] = _dense_copy(original)
        update(self, adapter_name, tied_module=tied_module, **kwargs)


def train_tokens_of_dense_tables(layer: Any) -> None:
    """Make a table dense if some of its tokens are trained: PEFT writes their rows into the weight on every call.

    Args:
        layer: the module ``peft.tuners.trainable_tokens.layer``.
    """

    @patches(layer.TrainableTokensLayer, "__init__")
    def over_dense(make: Any, self: Any, base_layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        under: Any = getattr(base_layer, "base_layer", None)  # LoRA on the same table
        if isinstance(under, PackedWeight):
            base_layer.base_layer = _dense_copy(under)
        elif isinstance(base_layer, PackedWeight):
            base_layer = _dense_copy(base_layer)
        make(self, base_layer, *args, **kwargs)


def resize_dense_tables(modeling: Any) -> None:
    """Let ``resize_token_embeddings`` make a packed table or head dense first.

    Args:
        modeling: the module ``transformers.modeling_utils``.
    """

    @patches(modeling.PreTrainedModel, "resize_token_embeddings")
    def resize_token_embeddings(
        resize: Any,
        self: Any,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if new_num_tokens is not None or pad_to_multiple_of is not None:
            _unpack_tables(self)
        return resize(self, new_num_tokens, pad_to_multiple_of, *args, **kwargs)


def _unpack_tables(model: Any) -> None:
    """UsageError if an adapter sits on a table: it was made for the rows that there are."""
    tables = [table for table in (model.get_input_embeddings(), model.get_output_embeddings()) if table is not None]
    if any(not isinstance(table, PackedWeight) and has_packed(table) for table in tables):
        raise UsageError("resize_token_embeddings: a packed table has an adapter; resize first, then add the adapter")
    names = [name for name, module in model.named_modules() if any(module is table for table in tables)]
    for name in names:
        table = model.get_submodule(name)
        if isinstance(table, (LoftQEmbedding, LoftQLinear)):
            replace_module(model, name, _dense_copy(table))
    forget_unpacked(model)


def _dense_copy(module: nn.Module) -> Any:
    """A copy with dense weights, in the mode and behind the hook of accelerate that the packed one has."""
    if not isinstance(module, (LoftQLinear, LoftQEmbedding)):
        return unpack_model(copy.deepcopy(module))
    dense = module.to_dense(module.compute_dtype).train(module.training)
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(dense, copy.copy(hook))
    return dense
