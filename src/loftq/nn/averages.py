"""Averages of models over the steps of a training: packed tensors do not change, and an average of codes is no code."""

import sys
from typing import Any

from loftq.patching import patches


def keep_codes(averages: Any) -> None:
    """Let ``AveragedModel`` take packed tensors as they are. It averages integers too, and rounds them down.

    Args:
        averages: the module ``torch.optim.swa_utils``.
    """

    @patches(averages.AveragedModel, "update_parameters")
    def update_parameters(update: Any, self: Any, model: Any) -> None:
        update(self, model)
        layers = sys.modules.get("loftq.nn.layers")
        packed = [[m for m in top.modules() if layers and isinstance(m, layers.Packed)] for top in (self.module, model)]
        for own, theirs in zip(*packed, strict=True):
            for tensor, same in zip(own.stored, theirs.stored, strict=True):
                tensor.data.copy_(same.detach())
