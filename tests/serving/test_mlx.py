"""``loftq export --to mlx``: what MLX decodes is what we decode, and mlx-lm computes what transformers does."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from test_gguf import IDS, MIXTURES, RSLORA, adapted, made_of
from test_gguf_experts import STACKS

import loftq
from loftq.errors import InputError

AUTO = transformers.AutoModelForCausalLM
# In a process of its own: MLX and torch share no threads there.
SEPARATE = """
import sys
import mlx.core as mx
import numpy as np
from mlx_lm import load
ids = mx.array(np.load(sys.argv[2]))
for adapter in (None, sys.argv[1] + "/adapter"):
    model = load(sys.argv[1], adapter_path=adapter)[0]
    np.save(sys.argv[3] + ("alone" if adapter is None else "adapted"), np.array(model(ids).astype(mx.float32)))
"""


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", *MIXTURES])  # its Gemma has another GELU
def test_mlx_lm_computes_what_transformers_does(name, tmp_path):
    pytest.importorskip("mlx_lm")
    bits = "mlp=2,qkv_proj=3,4" if name == "phi3" else "mlp=2,q_proj=3,v_proj=8,4"
    directory = made_of(name, tmp_path, serve="mlx", code="auto", bits=bits, scale_dtype="bfloat16")
    tuned = adapted(directory, tmp_path / "adapter", **{**RSLORA, **(STACKS if name in MIXTURES else {})})
    loftq.export(directory, tmp_path / "mlx", to="mlx", adapter=tmp_path / "adapter")
    np.save(tmp_path / "ids.npy", IDS.numpy())
    run = [sys.executable, "-c", SEPARATE, tmp_path / "mlx", tmp_path / "ids.npy", f"{tmp_path}/"]
    subprocess.run(run, check=True, timeout=250)
    with torch.no_grad():
        together = tuned(IDS).logits
        with tuned.disable_adapter():
            alone = tuned(IDS).logits
    assert not torch.allclose(together, alone, atol=1e-2)
    for what, wanted in (("alone", alone), ("adapted", together)):
        torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / f"{what}.npy")), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_mlx_decodes_what_we_do(bits, tmp_path):
    mx = pytest.importorskip("mlx.core")
    directory = made_of("llama", tmp_path, serve="mlx", code="auto", bits=bits, scale_dtype="bfloat16")
    loftq.export(directory, tmp_path / "mlx", to="mlx", adapter="none")
    held = mx.load(str(tmp_path / "mlx" / "model.safetensors"))
    for name, layer in AUTO.from_pretrained(directory).named_modules():
        if f"{name}.scales" in held:
            scales, biases = (held[f"{name}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
            found = mx.dequantize(held[f"{name}.weight"], scales, biases, group_size=32, bits=bits)
            assert np.array_equal(np.array(found), layer.dequantize().numpy())


@pytest.mark.parametrize("layout", ["split", "fused"])
def test_experts_are_what_we_decode(layout, tmp_path):
    """Gate, up and down of all experts, whichever way the source has them; a name of Mixtral's that mlx-lm has kept."""
    mx = pytest.importorskip("mlx.core")
    directory = made_of("mixtral", tmp_path, serve="mlx", code="auto", bits=3, scale_dtype="bfloat16")
    if layout == "fused":
        AUTO.from_pretrained(tmp_path / "mixtral").save_pretrained(tmp_path / "fused", save_original_format=False)
        directory = tmp_path / "quantized-fused"
        loftq.quantize(tmp_path / "fused", directory, serve="mlx", bits=3, block_size=32, rank=4, workers=1)
    loftq.export(directory, tmp_path / "mlx", to="mlx", adapter="none")
    held = mx.load(str(tmp_path / "mlx" / "model.safetensors"))
    stem = "model.layers.1.block_sparse_moe"
    model = AUTO.from_pretrained(directory)
    experts = model.model.layers[1].mlp.experts
    gate, up = experts.dense("gate_up_proj", torch.float32).chunk(2, 1)
    for name, wanted in (("gate", gate), ("up", up), ("down", experts.dense("down_proj", torch.float32))):
        module = f"{stem}.switch_mlp.{name}_proj"
        scales, biases = (held[f"{module}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
        found = mx.dequantize(held[f"{module}.weight"], scales, biases, group_size=32, bits=3)
        assert np.array_equal(np.array(found), wanted.numpy())
    router = np.array(held[f"{stem}.gate.weight"].astype(mx.float32))
    assert np.array_equal(router, model.model.layers[1].mlp.gate.weight.detach().float().numpy())


def test_mixtures_that_mlx_lm_would_compute_otherwise_are_refused(tmp_path, monkeypatch):
    """By the export, and by a plan for it."""
    bits = "layers.0.mlp.experts=16,4"
    directory = made_of("olmoe", tmp_path / "one", bits=bits, scale_dtype="bfloat16")
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.experts\.down_proj.*: dense, and stacks are written"):
        loftq.export(directory, tmp_path / "mlx", to="mlx", adapter="none")
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.experts\.down_proj.*: dense, and stacks are written"):
        loftq.plan(tmp_path / "one" / "olmoe", serve="mlx", bits=bits, rank=4)
    name, sizes = MIXTURES["qwen2-moe"]
    monkeypatch.setitem(MIXTURES, "qwen2-moe", (name, {**sizes, "norm_topk_prob": True}))
    directory = made_of("qwen2-moe", tmp_path / "two", scale_dtype="bfloat16")
    with pytest.raises(
        InputError, match="norm_topk_prob is True, and mlx-lm computes Qwen2MoeForCausalLM only with False"
    ):
        loftq.export(directory, tmp_path / "mlx", to="mlx", adapter="none")
    with pytest.raises(InputError, match=r"norm_topk_prob is True.*quantize without serve='mlx', merge that"):
        loftq.quantize(tmp_path / "two" / "qwen2-moe", tmp_path / "out", serve="mlx", bits=4, rank=4)
    assert not list(tmp_path.glob("out*"))


def test_what_is_written(tmp_path, made):
    directory = made_of("llama", tmp_path, serve="mlx", code="auto", bits="mlp=2,4")
    assert loftq.export(directory, tmp_path / "mlx", to="mlx")["commands"] == [
        "mlx_lm.chat --model . --adapter-path adapter",
        "mlx_lm.server --model . --adapter-path adapter",
    ]
    told = json.loads((tmp_path / "mlx" / "config.json").read_text())["quantization"]
    assert (told["bits"], told["group_size"], told["mode"]) == (4, 32, "affine")
    assert told["model.layers.1.mlp.up_proj"] == {"bits": 2, "group_size": 32}
    with pytest.raises(InputError, match="mlx holds code int on linear layers, and not lloyd"):
        loftq.export(made("llama").output, tmp_path / "out", to="mlx")
    with pytest.raises(InputError, match="BertModel: the export to MLX supports only"):
        loftq.export(made("bert").output, tmp_path / "out", to="mlx")
