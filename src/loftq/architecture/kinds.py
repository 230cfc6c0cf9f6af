"""What kind of layer a module is: it decides what an adapter does to it, and which way round its weight lies."""

from torch import nn


def kind_of(module: nn.Module) -> str:
    """``linear``, ``conv1d``, ``embedding``, or empty for what is none of these."""
    from transformers.pytorch_utils import Conv1D

    kinds = {"embedding": nn.Embedding, "conv1d": Conv1D, "linear": nn.Linear}
    return next((kind for kind, cls in kinds.items() if isinstance(module, cls)), "")
