"""Mixtures of experts: fused experts stay dense, said loudly; attention is quantized if that is accepted."""

import pytest
import torch

from loftq.errors import InputError
from models import MIXTURES, close, outputs, packed, quantize, same, tensors, tiny


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_kept_below_the_coverage_are_refused_by_name(tmp_path, name):
    tiny(name).save_pretrained(tmp_path / "dense")
    with pytest.raises(InputError, match=r"min_coverage 50%.*layers\.0\.\S*experts.*lower min_coverage") as refused:
        quantize(tmp_path / "dense", tmp_path / "quantized")
    assert "3-D expert block" in str(refused.value)
    assert not (tmp_path / "quantized").exists()


@pytest.mark.parametrize("name", MIXTURES)
def test_attention_alone_is_quantized_if_accepted(made, name):
    checkpoint = made(name, min_coverage=0.0)
    model = checkpoint.load()
    assert len(packed(model)) == checkpoint.family.matrices
    assert all("self_attn" in module for module in packed(model))
    assert model.hf_quantizer.new_modules == ()
    reasons = {k["reason"] for k in checkpoint.manifest["plan"]["kept"] if "experts" in k["name"]}
    assert reasons
    assert all(reason.startswith("3-D expert block") for reason in reasons)
    with torch.no_grad():
        assert close(outputs(model), outputs(checkpoint.backbone()), 1e-6)
    start = checkpoint.start(model)
    result = outputs(start)
    assert close(result.detach(), outputs(checkpoint.started()).detach())
    result.square().sum().backward()
    trained = {n for n, p in start.named_parameters() if p.grad is not None}
    assert trained == {n for n, _ in start.named_parameters() if "lora_" in n}


@pytest.mark.parametrize("name", MIXTURES)
def test_saved_again_the_experts_are_split_as_they_were(made, name, tmp_path):
    checkpoint = made(name, min_coverage=0.0)
    model = checkpoint.load()
    model.save_pretrained(tmp_path)
    assert same(tensors(tmp_path), tensors(checkpoint.output))
    with torch.no_grad():
        assert torch.equal(outputs(type(model).from_pretrained(tmp_path)), outputs(model))
