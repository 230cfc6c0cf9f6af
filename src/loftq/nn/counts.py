"""Parameter counts of a model with packed layers: weights count, not stored bytes."""

from typing import Any

from torch import nn

from loftq.nn.layers import LoftQEmbedding, Packed
from loftq.patching import patches


def surplus(model: nn.Module, *, exclude_embeddings: bool = False) -> int:
    """The weights of all packed layers minus their stored elements: what a plain count has to be corrected by.

    Args:
        exclude_embeddings: the count left out ``weight`` of every embedding, so its scales are all that is too much.
    """
    total = 0
    for layer in {id(m.stored[0]): m for m in model.modules() if isinstance(m, Packed)}.values():  # shared: once
        stored = layer.stored_count
        if exclude_embeddings and isinstance(layer, LoftQEmbedding):
            total -= stored - layer.weight.numel()
        else:
            total += layer.weight_count - stored
    return total


def count_weights(modeling: Any) -> None:
    """Correct ``num_parameters`` of transformers' models, from which Trainer computes FLOPs.

    Args:
        modeling: the module ``transformers.modeling_utils``.
    """

    @patches(modeling.PreTrainedModel, "num_parameters")
    def num_parameters(
        count: Any, self: nn.Module, only_trainable: bool = False, exclude_embeddings: bool = False
    ) -> int:
        counted = count(self, only_trainable, exclude_embeddings)
        return counted if only_trainable else counted + surplus(self, exclude_embeddings=exclude_embeddings)


def count_weights_under(peft_models: Any) -> None:
    """Correct ``get_nb_trainable_parameters`` of PEFT's models, which they print.

    Args:
        peft_models: the module ``peft.peft_model`` or ``peft.mixed_model``.
    """
    model_class = getattr(peft_models, "PeftMixedModel", None) or peft_models.PeftModel

    @patches(model_class, "get_nb_trainable_parameters")
    def get_nb_trainable_parameters(count: Any, self: Any) -> tuple[int, int]:
        trainable, everything = count(self)
        return trainable, everything + surplus(self)
