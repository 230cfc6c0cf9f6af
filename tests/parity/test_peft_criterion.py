"""PEFT's own acceptance test of a LoftQ start, at any scaling: the output's mean squared and mean absolute error
against full precision are below those of plain quantization / 1.03. benchmarks/peft_criterion.py runs it on trained
models.
"""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import loftq

MARGIN = 1.03
RANK = 16


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """A small Llama whose weights have decaying spectra, as trained ones have."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        pad_token_id=0,
    )
    llama = LlamaForCausalLM(config)
    with torch.no_grad():
        for module in llama.modules():
            if isinstance(module, nn.Linear):
                u, s, vh = torch.linalg.svd(torch.randn_like(module.weight), full_matrices=False)
                s = torch.arange(1, len(s) + 1) ** -0.5
                module.weight.copy_(u * (s / s.square().mean().sqrt()) @ vh)
    return llama.eval()


TOKENS = torch.randint(1, 96, (4, 24), generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def errors(model: nn.Module, right: Tensor) -> Tensor:
    difference = logits(model) - right
    return torch.stack([difference.square().mean(), difference.abs().mean()])


def start(model: nn.Module, steps: int, s: float = 1.0) -> nn.Module:
    options = {"bits": 4, "rank": RANK, "alpha": s * RANK, "steps": steps, "workers": 1, "progress": False}
    return loftq.get_peft_model(copy.deepcopy(model), **options).eval()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("steps", [1, 5])
def test_loftq_meets_the_criterion_at_every_scaling(model: LlamaForCausalLM, steps: int) -> None:
    right = logits(model)
    qlora = errors(start(model, 0), right)
    first = None
    for s in (0.25, 0.5, 1.0, 2.0):
        ours = errors(start(model, steps, s), right)
        assert (ours < qlora / MARGIN).all(), (s, ours / qlora)
        first = ours if first is None else first
        torch.testing.assert_close(ours, first, rtol=1e-3, atol=0)  # s makes no difference


def test_a_start_not_divided_by_the_scaling_fails_it(model: LlamaForCausalLM) -> None:
    """PEFT's rule, at alpha = 2 r: the criterion sees it."""
    right = logits(model)
    qlora = errors(start(model, 0), right)
    undivided = start(model, 5, 2.0)
    with torch.no_grad():
        for name, parameter in undivided.named_parameters():
            if "lora_B" in name:
                parameter.mul_(2.0)
    assert (errors(undivided, right) > qlora).all()
