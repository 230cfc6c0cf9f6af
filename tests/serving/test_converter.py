"""``loftq export --to gguf --converter``: what a script of llama.cpp's kind does to rows is done to the codes."""

import os

import pytest
import torch
import transformers
from test_gguf import adapted, made_of, read

import loftq
from loftq.errors import InputError, UsageError

# Permutes q and k, joins them with v, splits gate and up of Phi's kind; `scaled`: changes numbers.
SCRIPT = """
import json, sys
from pathlib import Path
import gguf, numpy as np, torch
from safetensors.torch import load_file
source, _, output, _, kind = sys.argv[1:]
config = json.loads((Path(source) / "config.json").read_text())
assert "quantization_config" not in config and kind == "f32"
held = load_file(Path(source) / "model.safetensors")
writer = gguf.GGUFWriter(output, "odd")
writer.add_file_type(0)
writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
writer.add_float32("odd.scale", 0.5)
for i in range(2):
    p = f"model.layers.{i}."
    q, k, v = (held.pop(f"{p}self_attn.{n}_proj.weight") for n in "qkv")
    turned = [t.view(h, 2, -1, t.shape[1]).swapaxes(1, 2).reshape(t.shape) for t, h in ((q, 4), (k, 2))]
    writer.add_tensor(f"blk.{i}.attn_qkv.weight", torch.cat([*turned, v]).numpy())
    up = held.pop(f"{p}mlp.up_proj.weight")
    writer.add_tensor(f"blk.{i}.up.a.weight", up[::2].contiguous().numpy())
    writer.add_tensor(f"blk.{i}.up.b.weight", up[1::2].contiguous().numpy())
for name, tensor in held.items():
    tensor = 2 * tensor if Path(__file__).stem == "scaled" and "down" in name else tensor
    writer.add_tensor(name, tensor.numpy())
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
"""


def test_rows_are_where_the_script_puts_them(tmp_path):
    pytest.importorskip("gguf")
    directory = made_of("llama", tmp_path, dtype="source")
    targets = {"rank_pattern": {"k_proj": 2}, "target_modules": ["q_proj", "k_proj", "up_proj"]}
    tuned = adapted(directory, tmp_path / "adapter", **targets)
    (tmp_path / "script.py").write_text(SCRIPT)
    given = {"to": "gguf", "adapter": tmp_path / "adapter", "converter": tmp_path / "script.py"}
    loftq.export(directory, tmp_path / "out", **given)
    fields, found = read(tmp_path / "out" / "model.gguf")
    assert (fields["general.architecture"], fields["general.file_type"], fields["odd.scale"]) == ("odd", 2, 0.5)
    assert fields["tokenizer.ggml.tokens"] == ["a", "b"]
    lora = read(tmp_path / "out" / "adapter.gguf")
    scale = {name: lora[0]["adapter.lora.alpha"] / a.shape[0] for name, a in lora[1].items() if "lora_a" in name}
    layers = tuned.base_model.model.model.layers
    for i, layer in enumerate(layers):
        parts = layer.self_attn.q_proj, layer.self_attn.k_proj
        order = [torch.arange(64).view(4, 2, 8).swapaxes(1, 2).flatten(), torch.arange(32).view(2, 2, 8)]
        order[1] = order[1].swapaxes(1, 2).flatten()
        bases = [p.base_layer.dequantize()[o] for p, o in zip(parts, order, strict=True)]
        v, up = layer.self_attn.v_proj.dequantize(), layer.mlp.up_proj
        assert torch.equal(found[f"blk.{i}.attn_qkv.weight"], torch.cat([*bases, v]))
        assert torch.equal(found[f"blk.{i}.up.a.weight"], up.base_layer.dequantize()[::2])
        assert torch.equal(found[f"blk.{i}.up.b.weight"], up.base_layer.dequantize()[1::2])
        deltas = [p.get_delta_weight("default")[o] for p, o in zip(parts, order, strict=True)]
        wanted = {"attn_qkv": torch.cat([*deltas, torch.zeros_like(v)])}
        wanted |= {f"up.{x}": up.get_delta_weight("default")[j::2] for j, x in enumerate("ab")}
        for name, delta in wanted.items():
            name = f"blk.{i}.{name}.weight"
            a, b = lora[1][f"{name}.lora_a"], lora[1][f"{name}.lora_b"]
            torch.testing.assert_close(scale[f"{name}.lora_a"] * b @ a, delta, rtol=1e-5, atol=1e-6)
    source = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    assert torch.equal(found["model.embed_tokens.weight"], source.model.embed_tokens.weight)


def test_numbers_that_the_script_changes_are_refused(tmp_path):
    pytest.importorskip("gguf")
    directory = made_of("llama", tmp_path, dtype="source")
    (tmp_path / "scaled.py").write_text(SCRIPT)
    with pytest.raises(InputError, match=r"layers.0.mlp.down_proj.weight.*changes their numbers"):
        loftq.export(directory, tmp_path / "out", to="gguf", converter=tmp_path / "scaled.py")
    (tmp_path / "fails.py").write_text("raise NotImplementedError('no such tokenizer')")
    with pytest.raises(InputError, match=r"fails.py: NotImplementedError: no such tokenizer; if it is the tokenizer"):
        loftq.export(directory, tmp_path / "out", to="gguf", converter=tmp_path / "fails.py")
    with pytest.raises(InputError, match=r"no such file; wanted llama.cpp's convert_hf_to_gguf.py"):
        loftq.export(directory, tmp_path / "out", to="gguf", converter=tmp_path / "nothing.py")
    with pytest.raises(UsageError, match=r"converter.* only for to='gguf'"):
        loftq.export(directory, tmp_path / "out", to="mlx", converter=tmp_path / "scaled.py")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif("LOFTQ_CONVERTER" not in os.environ, reason="needs LOFTQ_CONVERTER, llama.cpp's script")
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])  # of the others it wants a tokenizer.model
def test_llama_cpps_script_and_ours_say_the_same(name, tmp_path):
    directory = made_of(name, tmp_path)
    ours = {"to": "gguf", "tokenizer_rule": "gpt-2"}
    loftq.export(directory, tmp_path / "ours", **ours)
    loftq.export(directory, tmp_path / "theirs", converter=os.environ["LOFTQ_CONVERTER"], **ours)
    for file in ("model.gguf", "adapter.gguf"):
        (_, one), (_, other) = (read(tmp_path / place / file) for place in ("ours", "theirs"))
        assert one.keys() == other.keys()
        for tensor, value in one.items():
            torch.testing.assert_close(other[tensor], value, rtol=0, atol=0, msg=tensor)
