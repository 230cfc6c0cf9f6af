"""``loftq export --to gguf`` of mixtures of experts: a stack is one tensor of gate, one of up, one of down."""

import os

import pytest
import torch
import transformers
from test_gguf import FAMILIES, MIXTURES, SIZES, adapted, check_same, made_of, read

import loftq
from loftq.architecture.served import refuse_uneven
from loftq.errors import InputError

STACKS = {"target_modules": ["q_proj", "o_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
RSLORA = {**STACKS, "use_rslora": True, "rank_pattern": {"o_proj": 2}}


def differing(directory, tensors):
    """Weights of experts that the file holds otherwise than the model that transformers loads."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).dequantize()
    count = 0
    for i, layer in enumerate(model.model.layers):
        stacks = gate_up_down(layer.mlp.experts)
        count += sum(int((tensors[f"blk.{i}.ffn_{n}_exps.weight"] != stack).sum()) for n, stack in stacks.items())
    return count


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mixtral", {}),
        ("qwen3-moe", {"bits": "experts=8,4"}),
        ("qwen2-moe", {"code": "iq4nl"}),
        ("olmoe", {"bits": "experts=4,8"}),
    ],
)
def test_experts_compute_what_transformers_does(name, options, tmp_path):
    pytest.importorskip("gguf")
    directory = made_of(name, tmp_path, **options)
    tuned = adapted(directory, tmp_path / "adapter", **RSLORA)
    loftq.export(directory, tmp_path / "gguf", to="gguf", adapter=tmp_path / "adapter")
    base, lora = read(tmp_path / "gguf" / "model.gguf"), read(tmp_path / "gguf" / "adapter.gguf")
    assert differing(directory, base[1]) == 0
    check_same(tuned, base, lora)
    architecture = base[0]["general.architecture"]
    assert base[0][f"{architecture}.expert_count"] == 4
    assert base[0][f"{architecture}.expert_feed_forward_length"] == (128 if name in ("mixtral", "olmoe") else 64)
    assert lora[1]["blk.0.ffn_up_exps.weight.lora_a"].shape == (4, 4, 64)
    assert lora[1]["blk.0.attn_output.weight.lora_a"].shape == (2, 64)


def test_serve_takes_stacks_where_the_software_has_them(tmp_path):
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    given = {"bits": 2, "rank": 4, "min_coverage": 0.0, "progress": False}
    plans = {serve: loftq.plan(tmp_path, serve=serve, **given) for serve in ("gguf", "mlx", "onnx")}
    stacks = {serve: {m.name for m in plan.matrices if m.experts} for serve, plan in plans.items()}
    assert len(stacks["gguf"]) == len(stacks["mlx"]) == 4
    assert not stacks["onnx"]
    reasons = {k.reason for k in plans["onnx"].kept if "experts" in k.name}
    assert reasons == {"a stack of experts, which cannot be exported to onnx yet"}


@pytest.mark.parametrize("bits", ["experts=16,4", "layers.0=16,4"])
def test_dense_experts_are_stacks_too(bits, tmp_path):
    """Files hold each for itself; where another layer's are packed, they hold the stack."""
    pytest.importorskip("gguf")
    directory = made_of("mixtral", tmp_path, bits=bits, code="auto", serve="gguf", min_coverage=0.0)
    loftq.export(directory, tmp_path / "gguf", to="gguf", tokenizer_rule="gpt-2")
    _, tensors = read(tmp_path / "gguf" / "model.gguf")
    source = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "mixtral", dtype=torch.bfloat16)
    experts = source.model.layers[0].mlp.experts
    assert torch.equal(tensors["blk.0.ffn_up_exps.weight"], experts.gate_up_proj[:, SIZES["intermediate_size"] :])
    assert differing(directory, tensors) == 0


def test_what_llama_cpp_computes_otherwise_is_refused():
    pytest.importorskip("gguf")
    from loftq.serving.gguf_header import family_of

    def model(name, **other):
        family, more = {**FAMILIES, **MIXTURES}[name]
        with torch.device("meta"):
            config = getattr(transformers, f"{family}Config")(**{**SIZES, **more, **other})
            return getattr(transformers, f"{family}ForCausalLM")(config)

    for name, other, told in (
        ("qwen3-moe", {"norm_topk_prob": False}, "norm_topk_prob False; llama.cpp's qwen3moe computes with True"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv 8.0"),
        ("olmoe", {"num_key_value_heads": 2}, "num_key_value_heads 2"),
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act gelu"),
        ("gemma", {"tie_word_embeddings": False}, "tie_word_embeddings False"),
        ("qwen3", {"attention_bias": True}, "attention_bias True"),
        ("qwen2", {"head_dim": 32}, "head_dim 32; llama.cpp's qwen2 computes with 16"),
    ):
        with pytest.raises(InputError, match=told):
            family_of(model(name, **other))
    with torch.device("meta"), pytest.raises(InputError, match="GptOssForCausalLM: GGUF is written here only for"):
        family_of(transformers.GptOssForCausalLM(transformers.GptOssConfig(**SIZES, num_local_experts=4)))
    names = ["output.weight", "blk.0.ffn_up.weight", "blk.1.ffn_up_exps.weight"]
    with pytest.raises(InputError, match=r"layers 0 and 1: one of them lacks ffn_up.weight, ffn_up_exps.weight"):
        refuse_uneven("qwen3moe", names)


def gate_up_down(experts):
    """Each as (experts, out, in)."""
    both, down = experts.gate_up_proj, experts.down_proj
    if experts.is_transposed:
        both, down = both.transpose(1, 2), down.transpose(1, 2)
    gate, up = both.chunk(2, 1) if experts.is_concatenated else (both[:, ::2], both[:, 1::2])
    return {"gate": gate, "up": up, "down": down}


SCRIPT = """
import json, sys
from pathlib import Path
import gguf, torch
from safetensors.torch import load_file
source, _, output, _, _ = sys.argv[1:]
held = load_file(Path(source) / "model.safetensors")
writer = gguf.GGUFWriter(output, "odd")
writer.add_file_type(0)
writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
for i in range(2):
    p = f"model.layers.{i}.mlp.experts."
    if p + "gate_up_proj" in held:  # (experts, in, out), a row of the gate, a row of up; biases are no matter here
        both = held.pop(p + "gate_up_proj").transpose(1, 2)
        stacks = {"gate": both[:, ::2], "up": both[:, 1::2], "down": held.pop(p + "down_proj").transpose(1, 2)}
    else:
        names = {"gate": "w1", "up": "w3", "down": "w2"}
        p = f"model.layers.{i}.block_sparse_moe.experts."
        stacks = {k: torch.stack([held.pop(f"{p}{e}.{n}.weight") for e in range(4)]) for k, n in names.items()}
    for name, stack in stacks.items():
        writer.add_tensor(f"blk.{i}.{name}.weight", stack.contiguous().float().numpy())
for name, tensor in held.items():
    writer.add_tensor(name, tensor.float().numpy())
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
"""


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_experts_are_where_a_script_puts_them(name, tmp_path):
    """One tensor for each expert in the source; transposed and interleaved."""
    pytest.importorskip("gguf")
    directory = made_of(name, tmp_path)
    (tmp_path / "script.py").write_text(SCRIPT)
    tuned = adapted(directory, tmp_path / "adapter", **STACKS)
    given = {"to": "gguf", "adapter": tmp_path / "adapter", "converter": tmp_path / "script.py"}
    loftq.export(directory, tmp_path / "out", **given)
    base, lora = (read(tmp_path / "out" / f"{file}.gguf") for file in ("model", "adapter"))
    plain = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).dequantize()
    merged = tuned.merge_and_unload()
    for i in range(2):
        stacks, sums = (gate_up_down(model.model.layers[i].mlp.experts) for model in (plain, merged))
        for part, stack in stacks.items():
            key = f"blk.{i}.{part}.weight"
            assert torch.equal(base[1][key], stack)
            a, b = (lora[1][f"{key}.lora_{x}"] for x in "ab")
            delta = lora[0]["adapter.lora.alpha"] / a.shape[1] * b @ a
            torch.testing.assert_close(delta, sums[part] - stack, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif("LOFTQ_CONVERTER" not in os.environ, reason="needs LOFTQ_CONVERTER, llama.cpp's script")
@pytest.mark.parametrize("name", ["qwen3-moe", "qwen2-moe"])
def test_llama_cpps_script_and_ours_say_the_same(name, tmp_path):
    directory = made_of(name, tmp_path)
    adapted(directory, tmp_path / "adapter", **RSLORA)
    ours = {"to": "gguf", "tokenizer_rule": "gpt-2", "adapter": tmp_path / "adapter"}
    loftq.export(directory, tmp_path / "ours", **ours)
    loftq.export(directory, tmp_path / "theirs", converter=os.environ["LOFTQ_CONVERTER"], **ours)
    fields = [read(tmp_path / place / "model.gguf")[0] for place in ("ours", "theirs")]
    told = [{name: value for name, value in each.items() if "expert" in name} for each in fields]
    assert told[0] == told[1]
    for file in ("model.gguf", "adapter.gguf"):
        (_, one), (_, other) = (read(tmp_path / place / file) for place in ("ours", "theirs"))
        assert one.keys() == other.keys()
        for tensor, value in one.items():
            torch.testing.assert_close(other[tensor].view(value.shape), value, rtol=0, atol=0, msg=tensor)
