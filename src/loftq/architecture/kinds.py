"""The kind of a layer, which decides how LoRA is applied and how its weight is oriented."""

from torch import nn


def kind_of(module: nn.Module) -> str:
    """``linear``, ``conv1d``, ``embedding``, or empty for what is none of these."""
    from transformers.pytorch_utils import Conv1D

    kinds = {"embedding": nn.Embedding, "conv1d": Conv1D, "linear": nn.Linear}
    return next((kind for kind, cls in kinds.items() if isinstance(module, cls)), "")
