"""Llama-shaped models with random weights, the ways to put LoRA on them that are compared, and a training step."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig
from transformers.utils import logging

import loftq

logging.disable_progress_bar()
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # PEFT's own


def llama(hidden: int, layers: int, vocabulary: int, dtype: str = "float32", device: str = "cpu") -> nn.Module:
    """A Llama with random weights: hidden 4096, 32 layers and 32000 words are the shape of Llama-2-7B."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=-(-8 * hidden // 3 // 256) * 256,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 128),
        vocab_size=vocabulary,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))


def _lora(rank: int) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")


def _dense(model: nn.Module, rank: int) -> nn.Module:
    return get_peft_model(model, _lora(rank))


def _bitsandbytes(model: Any, rank: int, nested: bool = False) -> nn.Module:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=model.dtype,
    )
    quantized = type(model).from_pretrained(
        None,
        config=model.config,
        state_dict=model.state_dict(),
        quantization_config=config,
        dtype=model.dtype,
        device_map=str(model.device),
    )
    return get_peft_model(quantized, _lora(rank))


def _packed(model: nn.Module, rank: int, bits: int, steps: int = 0, **options: Any) -> nn.Module:
    return loftq.get_peft_model(model, bits=bits, rank=rank, preset="loftq", steps=steps, progress=False, **options)


DENSE, BNB, BNB_NESTED, LOFTQ4, LOFTQ3, LOFTQ2, TRELLIS2 = (
    "dense",
    "bitsandbytes 4 bits",
    "bitsandbytes 4 bits, nested scales",
    "loftq 4 bits",
    "loftq 3 bits",
    "loftq 2 bits",
    "trellis 2 bits",
)
WAYS: dict[str, Callable[[Any, int], nn.Module]] = {  # model, rank -> the model with LoRA on every linear layer
    DENSE: _dense,
    BNB: _bitsandbytes,
    BNB_NESTED: functools.partial(_bitsandbytes, nested=True),
    LOFTQ4: functools.partial(_packed, bits=4),
    LOFTQ3: functools.partial(_packed, bits=3),
    LOFTQ2: functools.partial(_packed, bits=2),
    TRELLIS2: functools.partial(_packed, bits=2, code="trellis"),
}


def training_step(model: Any, batch: int, tokens: int) -> Callable[[], None]:
    """Forward, backward, and AdamW on the adapters, on random tokens."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(model.config.vocab_size, (batch, tokens), device=model.device)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
