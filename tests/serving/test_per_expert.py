"""``loftq export --to per-expert``: LoRA on every expert for itself, the same to the last bit."""

import json
import shutil

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_merge import shaken

import loftq
from loftq.errors import InputError
from models import close, outputs, written


def deltas(place, tensors):
    """expert's layer -> s · B @ A, by its own rank and alpha."""
    config = json.loads((place / "adapter_config.json").read_text())
    found = {}
    for name, a in tensors.items():
        if not name.endswith(".lora_A.weight"):
            continue
        layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        ranks, alphas = config["rank_pattern"], config["alpha_pattern"]
        key = [peft.utils.other.get_pattern_key(list(pattern), layer) for pattern in (ranks, alphas)]
        assert ranks.get(key[0], config["r"]) == len(a)
        alpha = alphas.get(key[1], config["lora_alpha"])
        s = alpha / (len(a) ** 0.5 if config["use_rslora"] else len(a))
        found[layer] = s * tensors[name.replace("lora_A", "lora_B")] @ a
    return found


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "deepseek-v3", "gpt-oss", "granite-moe", "nemotron-h"])
def test_every_expert_has_its_own_factors_and_the_same_product(made, name, tmp_path):
    checkpoint = made(name, rank="experts=3,4", rslora=True)
    report = loftq.export(checkpoint.output, tmp_path / "out", to="per-expert")
    assert "--max-lora-rank 8" in report["commands"][1]
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    found = deltas(tmp_path / "out", tensors)
    stacks = {stack: product for stack, (_, product) in written(checkpoint.output).items() if product.ndim == 3}
    others = load_file(checkpoint.output / "loftq_init" / "adapter_model.safetensors")
    same = [n for n in others if ".experts." not in n]
    assert same
    assert all(torch.equal(tensors[n], others[n]) for n in same)
    names = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    count = 0
    for stack, product in stacks.items():
        layer, leaf = (stack.split(".")[i] for i in (2, -1))
        parts = {leaf: product}
        if leaf == "gate_up_proj":
            gate, up = product.chunk(2, 1) if name != "gpt-oss" else (product[:, ::2], product[:, 1::2])
            parts = {"gate_proj": gate, "up_proj": up}
        for part, wanted in parts.items():
            for e in range(4):
                (mine,) = (
                    delta
                    for n, delta in found.items()
                    if f".experts.{e}." in n
                    and n.split(".")[2] == layer
                    and names.get(n.rpartition(".")[2], n.rpartition(".")[2]) == part
                )
                torch.testing.assert_close(mine, wanted[e], rtol=1e-6, atol=1e-9)  # s is multiplied in another order
                count += 1
    assert count + sum(n.endswith("lora_A.weight") for n in same) == len(found)


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")  # of its own making
def test_peft_reads_it_over_the_dense_model(made, tmp_path):
    """By its own conversion, which gives gate and up a block of twice the rank."""
    checkpoint = made("qwen3-moe")
    stacks = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], target_parameters=stacks)
    model = shaken(get_peft_model(checkpoint.load(), config)).eval()
    model.save_pretrained(tmp_path / "adapter")
    loftq.export(checkpoint.output, tmp_path / "out", to="per-expert", adapter=tmp_path / "adapter")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    (a, b) = (tensors[f"base_model.model.model.layers.1.mlp.experts.2.up_proj.lora_{x}.weight"] for x in "AB")
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.1.mlp.experts.base_layer.lora_"
    assert torch.equal(a, factors[f"{stem}A.weight"].view(4, 4, 72)[2])
    assert torch.equal(b, factors[f"{stem}B.weight"].view(80, 4, 4)[40:, :, 2])
    plain = PeftModel.from_pretrained(checkpoint.backbone(), tmp_path / "out").eval()
    with torch.no_grad():
        assert close(outputs(plain), outputs(model))


def test_what_has_no_such_form_is_refused(made, tmp_path):
    with pytest.raises(InputError, match="has no LoRA on experts"):
        loftq.export(made("llama").output, tmp_path / "out", to="per-expert")
    with pytest.raises(InputError, match="per-expert exports an adapter"):
        loftq.export(made("mixtral").output, tmp_path / "out", to="per-expert", adapter="none")
    adapter = shutil.copytree(made("mixtral").output / "loftq_init", tmp_path / "adapter")
    with pytest.raises(InputError, match=r"experts.* holds LoRA of linear layers only"):
        loftq.export(made("mixtral").output, tmp_path / "out", to="lora-for-original", adapter=adapter)
    assert not (tmp_path / "out").exists()
