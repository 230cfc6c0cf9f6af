"""``loftq start`` for a base whose experts are layers again, as other quantizers leave them."""

import json

import pytest
import torch
from peft import PeftModel
from torch import nn

import loftq
import models
from loftq.frozen import layers
from loftq.numerics import dequantize, quantize
from loftq.spec import QuantSpec

NAMES = {"mixtral": ("w1", "w3", "w2"), "gpt-oss": ("gate_proj", "up_proj", "down_proj")}


class Experts(nn.ModuleList):
    """A layer for each expert and projection, its weight rounded to 3 bits."""

    def __init__(self, fused, names):
        super().__init__()
        for e in range(len(fused.down_proj)):
            pairs = zip(names, self.parts(fused, e), strict=True)
            self.append(nn.ModuleDict({name: rounded(weight) for name, weight in pairs}))

    @staticmethod
    def parts(fused, e):
        both, down = fused.gate_up_proj[e], fused.down_proj[e]
        if not fused.is_transposed:
            return (*both.chunk(2), down)
        return both.T[::2], both.T[1::2], down.T


def rounded(weight):
    spec = QuantSpec(bits=3, scale_dtype="float32")
    layer = nn.Linear(*weight.shape[::-1], bias=False)
    layer.weight = nn.Parameter(dequantize(quantize(weight.detach().contiguous(), spec), spec), requires_grad=False)
    return layer


def unfused(name):
    model = models.tiny(name)
    for path, module in list(model.named_modules()):
        if hasattr(module, "is_transposed"):
            owner, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(owner), leaf, Experts(module, NAMES[name]))
    if name == "mixtral":  # whose files have another name for the module
        for layer in model.model.layers:
            layer.block_sparse_moe = layer.mlp
            del layer.mlp
    return model


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", NAMES)
def test_every_layer_of_an_expert_gets_what_its_rounding_left(name, tmp_path, monkeypatch):
    dense, base = models.tiny(name), unfused(name)
    dense.save_pretrained(tmp_path / "dense")
    (tmp_path / "base").mkdir()
    monkeypatch.setattr(layers, "load", lambda *_: unfused(name))
    report = loftq.start(tmp_path / "base", tmp_path / "dense", tmp_path / "out", rank=4, alpha=6)
    assert len(report["layers"]) == 2 * (4 + 4 * 3)
    of_experts = [m for m in report["layers"] if ".experts." in m["name"]]
    assert len(of_experts) == 2 * 4 * 3
    assert all(0 < m["errors"][1] < 0.99 * m["errors"][0] for m in of_experts)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert not config["target_parameters"]
    model = PeftModel.from_pretrained(base, tmp_path / "out")
    fused = next(m for n, m in dense.named_modules() if n == "model.layers.1.mlp.experts")
    for e in range(4):
        for leaf, weight in zip(NAMES[name], Experts.parts(fused, e), strict=True):
            place = "block_sparse_moe" if name == "mixtral" else "mlp"
            layer = model.get_base_model().get_submodule(f"model.layers.1.{place}.experts.{e}.{leaf}")
            rest = weight.detach() - layer.get_base_layer().weight
            best, left = torch.linalg.svdvals(rest)[4:].norm(), rest - layer.get_delta_weight("default").detach()
            assert left.norm().item() == pytest.approx(best.item(), rel=1e-3)


def test_stacks_that_a_base_keeps_are_left_alone(made, tmp_path):
    checkpoint = made("mixtral", format="dense")
    report = loftq.start(checkpoint.output, checkpoint.source, tmp_path / "out", rank=4)
    assert {m["name"].rpartition(".")[2] for m in report["layers"]} == {"q_proj", "k_proj", "v_proj", "o_proj"}
