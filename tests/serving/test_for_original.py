"""``loftq export --to lora-for-original``: on the original it adds what training changed, and nothing else."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_merge import shaken

import loftq
from harness import cli, refused
from loftq.errors import InputError


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_original_gets_what_training_added(made, name, tmp_path):
    checkpoint = made(name, rank="self_attn=3,4" if name == "llama" else 4, rslora=True, alpha=5.0)
    start = checkpoint.start()
    layers = {n: m for n, m in start.base_model.model.named_modules() if hasattr(m, "get_delta_weight")}
    before = {n: layer.get_delta_weight("default").detach().clone() for n, layer in layers.items()}
    shaken(start).save_pretrained(tmp_path / "adapter")
    loftq.export(checkpoint.output, tmp_path / "out", to="lora-for-original", adapter=tmp_path / "adapter")
    plain = checkpoint.family.auto_class.from_pretrained(checkpoint.source, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(plain, tmp_path / "out")
    for n, layer in layers.items():
        found = tuned.base_model.model.get_submodule(n).get_delta_weight("default")
        wanted = layer.get_delta_weight("default") - before[n]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not (tmp_path / "out" / "loftq_base.json").exists()
    with pytest.raises(InputError, match=r"exported for the original, and .* is quantized; give the one that was"):
        loftq.merge(checkpoint.output, tmp_path / "merged", adapter=tmp_path / "out")
    with pytest.warns(UserWarning, match="exported for the original"):
        PeftModel.from_pretrained(checkpoint.load(), tmp_path / "out")


def test_what_is_no_difference_is_refused(made, tmp_path):
    checkpoint = made("llama")
    out = tmp_path / "out"
    refused(cli("export", checkpoint.output, "-o", out, "--to", "lora-for-original"), 2, "--adapter RUN")
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    get_peft_model(checkpoint.load(), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match=r"holds LoRA of linear layers only; merge it$"):
        loftq.export(checkpoint.output, out, to="lora-for-original", adapter=tmp_path / "adapter")
    assert not out.exists()
