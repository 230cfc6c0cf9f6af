"""A tiny Llama whose matrices bitsandbytes can pack, and ways to freeze it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import models
from loftq.nn.layers import replace_module

LLAMA = {**models.LLAMA, "hidden_size": 64, "intermediate_size": 96}
PROJECTIONS = 14  # matrices of its layers


def make_llama(seed: int = 0) -> Any:
    family = models.FAMILIES["llama"]
    models.FAMILIES["llama-64"] = replace(family, options=LLAMA)
    return models.tiny("llama-64", seed)


def bitsandbytes(directory: Path, **options: Any) -> Any:
    """The model of ``directory``, quantized by bitsandbytes while it loads."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes quantizes the bases of these tests")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    return AutoModelForCausalLM.from_pretrained(directory, quantization_config=BitsAndBytesConfig(**options))


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
BASES = {
    "nf4": NF4,
    "nested": {**NF4, "bnb_4bit_use_double_quant": True},
    "fp4 in bfloat16": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": torch.bfloat16},
    "int8": {"load_in_8bit": True},
}


class OnlyForward(nn.Module):
    """As GPTQ's and AWQ's layers are: no Linear, no weight; integers, half-precision scales, and a forward.

    Attributes:
        read: how many inputs it was given in all.
    """

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        self.infeatures, self.outfeatures = dense.in_features, dense.out_features  # GPTQ's names
        scales = dense.weight.detach().abs().amax(1, keepdim=True) / 7
        self.register_buffer("qweight", (dense.weight.detach() / scales).round().to(torch.int8))
        self.register_buffer("scales", scales.half())
        self.bias = None if dense.bias is None else nn.Parameter(dense.bias.detach().half(), requires_grad=False)
        self.read = 0

    def exact(self) -> torch.Tensor:
        return (self.qweight.half() * self.scales).float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.float16:
            raise RuntimeError("a kernel of half precision")
        self.read += len(x)
        return nn.functional.linear(x, self.qweight.half() * self.scales, self.bias)


class Opaque(OnlyForward):
    """The same in a model of float32: casts what comes and goes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.half()).to(x.dtype)


def opaque(model: Any) -> Any:
    """``model`` with every matrix of its layers in an :class:`Opaque` layer."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in name:
            replace_module(model, name, Opaque(module))
    return model
