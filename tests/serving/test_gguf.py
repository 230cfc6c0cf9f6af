"""``loftq export --to gguf``: what the package gguf reads from the files is what we decode, to the last bit.

The names and the order of rows that llama.cpp wants are those of its converter; the forward pass in float32 below takes
them from there, so that a file which is wrong in one of them computes other logits than transformers.
"""

import json
import shutil

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

import loftq
from harness import cli, refused
from loftq.errors import InputError, UsageError
from loftq.numerics import decode, encode
from loftq.planning import Matrix
from loftq.serving.blocks import BLOCKS, block_bytes
from loftq.spec import QuantSpec
from quantizers import Fitted
from quantizers import quantize as fitted

HIDDEN, INNER, HEADS, GROUPS = 64, 128, 4, 2
SIZES = {
    "vocab_size": 300,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "max_position_embeddings": 64,
    "head_dim": 16,
}
FAMILIES = {
    "llama": ("Llama", {"rope_theta": 5000.0}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
    "gemma": ("Gemma", {}),
    "phi3": ("Phi3", {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 0}),
}
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
MIXTURES = {
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen3-moe": ("Qwen3Moe", {**ROUTED, "norm_topk_prob": True}),
    "qwen2-moe": ("Qwen2Moe", {**ROUTED, "shared_expert_intermediate_size": 96}),
    "olmoe": ("Olmoe", {**ROUTED, "num_key_value_heads": HEADS, "eos_token_id": 1, "pad_token_id": 0}),
}
TURNED = {"gpt-oss": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": None})}
IDS = torch.tensor([[5, 9, 200, 31, 7, 7, 250, 1]])


def by_bytes():
    """Byte-level BPE, trained on a line."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(["how are you, how are they, who are we, the moon and the stars"] * 3, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def made_of(name, place, **options):
    """A tiny model of a family with a tokenizer, and its quantized directory."""
    family, more = {**FAMILIES, **MIXTURES, **TURNED}[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **more})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(place / name)
    by_bytes().save_pretrained(place / name)
    given = {"bits": 4, "code": "int", "block_size": 32, "scale_dtype": "float16", "rank": 4, "workers": 1, **options}
    loftq.quantize(place / name, place / "quantized", **given)
    return place / "quantized"


RSLORA = {"use_rslora": True, "rank_pattern": {"o_proj": 2}, "target_modules": "all-linear"}


@torch.no_grad()
def adapted(directory, place, **options):
    """A quantized model with an adapter of random factors, which ``place`` has too."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, **options))
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.copy_(0.1 * torch.randn_like(parameter))
    tuned.save_pretrained(place)
    return tuned.eval()


def rows_of(block, matrix, stored):
    """The values of a block's bytes: by the package, or by GGML's definition of a type that the package lacks."""
    raw = block_bytes(block, matrix, stored).numpy()
    if block.name != "Q2_0":
        gguf = pytest.importorskip("gguf")
        return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(block.type))
    blocks = raw.reshape(-1, 18)
    numbers = (blocks[:, 2:, None] >> np.array([0, 2, 4, 6], np.uint8) & 3).reshape(len(blocks), 64).astype(np.float32)
    return ((numbers - 1) * blocks[:, :2].view(np.float16).astype(np.float32)).reshape(matrix.shape)


@pytest.mark.parametrize("block", BLOCKS, ids=[block.name for block in BLOCKS])
@pytest.mark.parametrize("kind", [QuantSpec, Fitted], ids=["formula", "fitted"])
def test_a_block_holds_the_code_exactly(block, kind):
    spec = kind(bits=block.bits, code=block.code, block_size=block.size, scale_dtype="float16")
    weight = torch.randn(6, 512, generator=torch.Generator().manual_seed(3))
    weight[1, :256] = 0
    stored = encode(fitted(weight, spec), spec)
    matrix = Matrix("w", "m", "linear", (6, 512), "F32", QuantSpec(**vars(spec)), 4)
    assert np.array_equal(rows_of(block, matrix, stored), decode(stored, spec, 512).numpy())


def read(file):
    """Fields and tensors of a file, with the package's own reader."""
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    values = {}
    for tensor in reader.tensors:
        raw = tensor.data
        if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
            value = torch.from_numpy(raw.copy()).view(torch.bfloat16).float()
        else:
            value = torch.from_numpy(np.array(gguf.quants.dequantize(raw, tensor.tensor_type)))
        values[tensor.name] = value.reshape(tuple(int(n) for n in reversed(tensor.shape)))
    return fields, values


def norm(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def turned(x, fields, name):
    """Rotary embedding as llama.cpp has it: of neighbours for llama, of halves for the others."""
    base, size = fields[f"{name}.rope.freq_base"], x.shape[-1]
    angles = torch.arange(x.shape[-2])[:, None] * base ** (-torch.arange(0, size, 2) / size)
    cos, sin = angles.cos(), angles.sin()
    a, b = (x[..., 0::2], x[..., 1::2]) if name == "llama" else x.chunk(2, -1)
    parts = a * cos - b * sin, b * cos + a * sin
    return torch.stack(parts, -1).flatten(-2) if name == "llama" else torch.cat(parts, -1)


def logits(fields, t, lora=None):
    """What llama.cpp computes of such a file, in float32."""
    name = fields["general.architecture"]
    eps, size = fields[f"{name}.attention.layer_norm_rms_epsilon"], fields[f"{name}.attention.key_length"]
    groups = fields[f"{name}.attention.head_count_kv"]

    def product(x, key, expert=...):
        y = x @ t[f"{key}.weight"][expert].T + t.get(f"{key}.bias", torch.zeros(()))
        if lora is not None and f"{key}.weight.lora_a" in lora[1]:
            a, b = (lora[1][f"{key}.weight.lora_{part}"][expert] for part in "ab")
            y = y + lora[0]["adapter.lora.alpha"] / a.shape[0] * (x @ a.T) @ b.T
        return y

    def mixture(h, stem):
        """Chosen experts by the softmax of all; which families make the weights of the chosen add up to one."""
        probabilities = (h @ t[f"{stem}.ffn_gate_inp.weight"].T).softmax(-1)
        weights, chosen = probabilities.topk(fields[f"{name}.expert_used_count"])
        weights = weights / weights.sum(-1, keepdim=True) if name in ("llama", "qwen3moe") else weights
        rows = []
        for row, own, experts in zip(h, weights, chosen.tolist(), strict=True):
            acts = [F.silu(product(row, f"{stem}.ffn_gate_exps", e)) for e in experts]
            ups = [act * product(row, f"{stem}.ffn_up_exps", e) for act, e in zip(acts, experts, strict=True)]
            downs = [product(up, f"{stem}.ffn_down_exps", e) for up, e in zip(ups, experts, strict=True)]
            rows.append(own @ torch.stack(downs))
        y = torch.stack(rows)
        if f"{stem}.ffn_up_shexp.weight" in t:
            up = F.silu(product(h, f"{stem}.ffn_gate_shexp")) * product(h, f"{stem}.ffn_up_shexp")
            y = y + (h @ t[f"{stem}.ffn_gate_inp_shexp.weight"].T).sigmoid() * product(up, f"{stem}.ffn_down_shexp")
        return y

    x = t["token_embd.weight"][IDS[0]]
    x = x * HIDDEN**0.5 if name == "gemma" else x
    for i in range(fields[f"{name}.block_count"]):
        h = norm(x, t[f"blk.{i}.attn_norm.weight"], eps)
        if f"blk.{i}.attn_qkv.weight" in t:
            q, k, v = product(h, f"blk.{i}.attn_qkv").split([HEADS * size, groups * size, groups * size], -1)
        else:
            q, k, v = (product(h, f"blk.{i}.attn_{part}") for part in "qkv")
        norms = [t[f"blk.{i}.attn_{n}_norm.weight"] for n in "qk" if f"blk.{i}.attn_q_norm.weight" in t]
        if norms and len(norms[0]) > size:  # of all heads together
            q, k = (norm(part, weight, eps) for part, weight in zip((q, k), norms, strict=True))
        q, k, v = (part.unflatten(-1, (-1, size)).transpose(0, 1) for part in (q, k, v))
        if norms and len(norms[0]) == size:
            q, k = (norm(part, weight, eps) for part, weight in zip((q, k), norms, strict=True))
        q, k = (turned(part, fields, name) for part in (q, k))
        k, v = (part.repeat_interleave(HEADS // groups, 0) for part in (k, v))
        x = x + product(
            F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).flatten(1), f"blk.{i}.attn_output"
        )
        h = norm(x, t[f"blk.{i}.ffn_norm.weight"], eps)
        if f"blk.{i}.ffn_gate_inp.weight" in t:
            x = x + mixture(h, f"blk.{i}")
            continue
        if f"blk.{i}.ffn_gate.weight" in t:
            gate, up = product(h, f"blk.{i}.ffn_gate"), product(h, f"blk.{i}.ffn_up")
        else:
            gate, up = product(h, f"blk.{i}.ffn_up").chunk(2, -1)
        act = F.gelu(gate, approximate="tanh") if name == "gemma" else F.silu(gate)
        x = x + product(act * up, f"blk.{i}.ffn_down")
    return norm(x, t["output_norm.weight"], eps) @ t.get("output.weight", t["token_embd.weight"]).T


def check_same(tuned, base, lora):
    """What a reader computes of the files is what PEFT computes, with the adapter and without; and it tells."""
    with torch.no_grad():
        together = tuned(IDS).logits[0]
        with tuned.disable_adapter():
            alone = tuned(IDS).logits[0]
    assert not torch.allclose(together, alone, atol=1e-2)
    torch.testing.assert_close(logits(*base), alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(*base, lora), together, rtol=1e-4, atol=1e-4)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", FAMILIES)
def test_base_and_adapter_compute_what_transformers_does(name, tmp_path):
    pytest.importorskip("gguf")
    directory = made_of(name, tmp_path)
    tuned = adapted(directory, tmp_path / "adapter", **RSLORA)
    loftq.export(directory, tmp_path / "gguf", to="gguf", adapter=tmp_path / "adapter")
    base, lora = read(tmp_path / "gguf" / "model.gguf"), read(tmp_path / "gguf" / "adapter.gguf")
    check_same(tuned, base, lora)
    assert lora[0]["general.type"] == "adapter"
    assert base[0]["tokenizer.ggml.model"] == "gpt2"
    assert base[0]["tokenizer.ggml.tokens"][5] == transformers.AutoTokenizer.from_pretrained(
        directory
    ).convert_ids_to_tokens(5)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"bits": "mlp=8,layers.0=2,4"}, {(8, "int", 32), (2, "int", 64), (4, "iq4nl", 32)}),
        ({"bits": 2, "block_size": 32}, {(2, "int", 64)}),
        ({"bits": 4, "code": "int"}, {(4, "int", 32)}),
    ],
    ids=["widths", "another block", "a code"],
)
def test_serve_chooses_what_gguf_holds(options, wanted, tmp_path):
    """And what it cannot hold is kept: rows of 96 are no multiple of 64."""
    sizes = {**SIZES, "intermediate_size": 96}
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(tmp_path / "source")
    by_bytes().save_pretrained(tmp_path / "source")
    plan = loftq.plan(tmp_path / "source", serve="gguf", rank=4, min_coverage=0.0, progress=False, **options)
    assert {(m.quant.bits, m.quant.code, m.quant.block_size) for m in plan.matrices} == wanted
    assert {m.quant.scale_dtype for m in plan.matrices} == {"float16"}
    down = [k.reason for k in plan.kept if "down_proj" in k.name]
    assert down == (["rows of 96 are no multiple of gguf's block of 64"] * 2 if options.get("bits") == 2 else [])


def test_a_budget_chooses_among_what_gguf_holds(tmp_path):
    """Rows of 96 have no block at 2 bits: those matrices stay at 4, and the export holds all of them."""
    pytest.importorskip("gguf")
    sizes = {**SIZES, "hidden_size": 256, "intermediate_size": 96}
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(tmp_path / "source")
    by_bytes().save_pretrained(tmp_path / "source")
    made = loftq.quantize(tmp_path / "source", tmp_path / "base", serve="gguf", budget=2.62, rank=4, workers=1)
    found = {m["name"]: tuple(m["quant"][k] for k in ("bits", "code", "block_size")) for m in made["plan"]["matrices"]}
    assert set(found.values()) == {(2, "int", 64), (2, "int", 256), (4, "iq4nl", 32)}
    assert {held for name, held in found.items() if "down_proj" in name} == {(4, "iq4nl", 32)}
    budget = made["budget"]
    assert [point["bits"] for point in budget["uniform"]] == [2, 4]
    assert budget["chosen"]["bits_per_weight"] <= 2.62 < budget["uniform"][1]["bits_per_weight"]
    loftq.export(tmp_path / "base", tmp_path / "out", to="gguf")


def test_serve_refuses_what_gguf_has_not(tmp_path):
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    for options, told in (
        ({"bits": 3}, r"serve='gguf' holds no 3 bits; it has 4 \(iq4nl\)"),
        ({"bits": 2, "code": "nf"}, "holds no 2 bits of code nf"),
        ({"bits": 4, "double_quant": True}, "leave them out"),
    ):
        with pytest.raises(UsageError, match=told):
            loftq.plan(tmp_path, serve="gguf", rank=4, **options)


def test_from_patterns_to_gguf(tmp_path):
    """The whole way: every code of a mixed plan in one file, which holds what transformers loads."""
    gguf = pytest.importorskip("gguf")
    directory = made_of("llama", tmp_path, code="auto", serve="gguf", bits="mlp=8,4", block_size=64)
    loftq.export(directory, tmp_path / "gguf", to="gguf", adapter="none")
    _, values = read(tmp_path / "gguf" / "model.gguf")
    kinds = {t.name: t.tensor_type for t in gguf.GGUFReader(tmp_path / "gguf" / "model.gguf").tensors}
    assert kinds["blk.0.ffn_up.weight"] == gguf.GGMLQuantizationType.Q8_0
    assert kinds["blk.0.attn_v.weight"] == gguf.GGMLQuantizationType.IQ4_NL
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for name, ours in (("blk.0.ffn_up", "mlp.up_proj"), ("blk.0.attn_v", "self_attn.v_proj")):
        found = model.model.layers[0].get_submodule(ours).dequantize()
        assert torch.equal(values[f"{name}.weight"], found)
    assert not (tmp_path / "gguf" / "adapter.gguf").exists()


def test_rope_of_llama3_divides_the_frequencies(tmp_path):
    pytest.importorskip("gguf")
    from loftq.serving.gguf_header import family_of, rope_factors

    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = transformers.LlamaConfig(
        **{**SIZES, "head_dim": 64}, rope_parameters={**rope, "original_max_position_embeddings": 32}
    )
    model = transformers.LlamaForCausalLM(config)
    plain = 5e5 ** (-torch.arange(0, 64, 2) / 64)
    wanted = plain / model.model.rotary_emb.inv_freq
    torch.testing.assert_close(torch.from_numpy(rope_factors(family_of(model))), wanted, rtol=1e-5, atol=0)
    assert rope_factors(family_of(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)))) is None


def test_a_window_that_llama_cpp_has_not_bounds_the_context():
    pytest.importorskip("gguf")
    from loftq.serving.gguf_header import Header, add_sizes, family_of

    with torch.device("meta"):
        config = transformers.Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=16)
        family = family_of(transformers.Qwen3ForCausalLM(config))
    header = Header(family.name)
    add_sizes(header, family, SIZES["vocab_size"])
    assert header.kv_data[0]["qwen3.context_length"].value == 16


def test_pieces_are_merged_by_the_place_of_their_merge(tmp_path):
    pytest.importorskip("gguf")
    from loftq.serving.gguf_vocab import _scores

    model = {"merges": [["a", "b"], ["ab", "c"], ["b", "c"], ["a", "bc"]]}
    assert _scores(["a", "ab", "bc", "abc"], model) == [-4.0, 0.0, -2.0, -1.0]


def test_what_gguf_cannot_hold_is_refused(tmp_path, made):
    pytest.importorskip("gguf")
    from loftq.serving.gguf_vocab import RULES

    with pytest.raises(InputError, match=r"proj.weight: GGUF holds no code lloyd of 2 bits in blocks of 64; .* int 2"):
        loftq.export(made("llama").output, tmp_path / "gguf", to="gguf")
    with pytest.raises(InputError, match="GGUF holds no code lloyd"):  # so that llama.cpp's script is of no use either
        loftq.export(made("bert").output, tmp_path / "gguf", to="gguf")
    with pytest.raises(UsageError, match="to must be one of gguf, compressed-tensors, mlx, onnx, lora-for-original"):
        loftq.export(made("bert").output, tmp_path / "gguf", to="coreml")
    directory = made_of("llama", tmp_path)
    with pytest.raises(UsageError, match="block_type='Q2_K' is for 2 bits in blocks of 256, and no matrix of"):
        loftq.export(directory, tmp_path / "gguf", to="gguf", block_type="Q2_K")
    content = json.loads((directory / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "Whitespace"}
    other = shutil.copytree(directory, tmp_path / "other")
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="neither byte-level"):
        loftq.export(other, tmp_path / "gguf", to="gguf")
    content["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Split", "pattern": {"Regex": "x"}}, {"type": "ByteLevel"}],
    }
    (other / "tokenizer.json").write_text(json.dumps(content))
    refused(
        cli("export", other, "-o", tmp_path / "gguf", "--to", "gguf"),
        3,
        "its pre-tokenization is not recognized",
        "--tokenizer-rule NAME",
    )
    known = json.loads(json.dumps(content))
    known["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = next(r for r, n in RULES.items() if n == "qwen2")
    (other / "tokenizer.json").write_text(json.dumps(known))
    with pytest.raises(InputError, match=r"llama\.cpp's qwen2, and tokenizer_rule='tekken' would give other tokens"):
        loftq.export(other, tmp_path / "gguf", to="gguf", tokenizer_rule="tekken")
    without = {**content, "model": {**content["model"], "merges": []}}
    (other / "tokenizer.json").write_text(json.dumps(without))
    with pytest.raises(InputError, match=r"no merges, and llama\.cpp loads no byte-level BPE without"):
        loftq.export(other, tmp_path / "gguf", to="gguf", tokenizer_rule="llama-bpe")
    (other / "tokenizer.json").write_text(json.dumps(content))
    assert not (tmp_path / "gguf").exists()
    ended = cli("export", other, "-o", tmp_path / "gguf", "--to", "gguf", "--tokenizer-rule", "llama-bpe")
    assert ended.code == 0, ended.err
    assert "llama-server -m model.gguf --lora adapter.gguf" in ended.out
    assert {p.name for p in (tmp_path / "gguf").iterdir()} == {
        *("model.gguf", "adapter.gguf", "Modelfile", "README.md", "loftq_export.json"),
    }
