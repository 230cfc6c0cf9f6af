"""``loftq export --to compressed-tensors``: what that package, and transformers with it, get is what we decode."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from peft import PeftModel

import loftq
from harness import EXACT
from loftq.adapters.origins import identity
from loftq.errors import InputError
from models import LLAMA

AUTO = transformers.AutoModelForCausalLM
IDS = torch.arange(3, 19).reshape(2, 8)


@pytest.fixture
def place(tmp_path):
    """Matrices of four widths; the rows of 96 do not fill blocks of 64."""
    sizes = {**LLAMA, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(tmp_path / "source")
    bits = "q_proj=2,k_proj=3,v_proj=8,4"
    options = {"serve": "compressed-tensors", "bits": bits, "rank": 4, "workers": 1, **EXACT}
    made = loftq.quantize(tmp_path / "source", tmp_path / "base", **options)
    assert {m["quant"]["bits"] for m in made["plan"]["matrices"]} == {2, 3, 4, 8}
    assert [k["reason"] for k in made["plan"]["kept"] if "down_proj" in k["name"]] == [
        "rows of 96 are no multiple of compressed-tensors's block of 64"
    ] * 2
    return tmp_path


SEPARATE = """
import sys
import peft, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
ids = torch.arange(3, 19).reshape(2, 8)
with torch.no_grad():
    alone = model(ids).logits
    adapted = peft.PeftModel.from_pretrained(model, sys.argv[1] + "/adapter").eval()(ids).logits
torch.save((alone, adapted), sys.argv[2])
assert "loftq" not in sys.modules
"""


@pytest.mark.slow
def test_transformers_computes_the_same_without_us(place):
    pytest.importorskip("compressed_tensors")
    made = loftq.export(place / "base", place / "out", to="compressed-tensors")
    subprocess.run([sys.executable, "-c", SEPARATE, place / "out", place / "found"], check=True, timeout=250)
    alone, adapted = torch.load(place / "found")
    base = AUTO.from_pretrained(place / "base").dequantize().eval()
    with torch.no_grad():
        assert torch.equal(alone, base(IDS).logits)
        wanted = PeftModel.from_pretrained(base, place / "base", subfolder="loftq_init").eval()(IDS).logits
    torch.testing.assert_close(adapted, wanted, rtol=1e-5, atol=1e-6)
    (told,) = made["commands"]
    assert told.startswith("# not for vLLM, where model.layers.0.self_attn.k_proj, ")


def test_what_is_written(place):
    loftq.export(place / "base", place / "out", to="compressed-tensors")
    config = json.loads((place / "out" / "config.json").read_text())["quantization_config"]
    groups = {(g["weights"]["num_bits"], g["weights"]["group_size"]) for g in config["config_groups"].values()}
    assert groups == {(2, 64), (3, 64), (4, 64), (8, 64)}
    assert config["ignore"] == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "lm_head"]
    assert identity(place / "out") == identity(place / "base") is not None
    loftq.quantize(place / "source", place / "even", serve="compressed-tensors", rank=9, workers=1, **EXACT)
    made = loftq.export(place / "even", place / "served", to="compressed-tensors")
    assert made["commands"] == ["vllm serve . --enable-lora --max-lora-rank 16 --lora-modules tuned=./adapter"]
    loftq.export(place / "base", place / "alone", to="compressed-tensors", adapter="none")
    assert not (place / "alone" / "adapter").exists()


def test_a_budget_gives_one_width_to_what_vllm_has_in_one_layer(place):
    options = {"serve": "compressed-tensors", "budget": 3.4, "rank": 20, "rank_policy": "clamp", "workers": 1}
    made = loftq.quantize(place / "source", place / "spent", **options)
    assert made["budget"]["chosen"]["bits_per_weight"] <= 3.4
    found = {m["module"]: (m["quant"]["bits"], m["quant"]["block_size"]) for m in made["plan"]["matrices"]}
    assert len(set(found.values())) > 1
    for layer in (f"model.layers.{i}" for i in range(2)):
        assert len({found[f"{layer}.self_attn.{name}_proj"] for name in "qkv"}) == 1
        assert len({found[f"{layer}.mlp.{name}_proj"] for name in ("gate", "up")}) == 1


def test_what_it_cannot_hold(place, made):
    with pytest.raises(InputError, match="compressed-tensors holds code int on linear layers, and not lloyd"):
        loftq.export(made("llama").output, place / "out", to="compressed-tensors")
    options = {"serve": "compressed-tensors", "scale_dtype": "float16", "rank": 4, "workers": 1, **EXACT}
    loftq.quantize(place / "source", place / "half", **options)
    config = json.loads((place / "half" / "config.json").read_text())
    (place / "half" / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    with pytest.raises(InputError, match="does not fit the model's type BF16"):
        loftq.export(place / "half", place / "out", to="compressed-tensors")
