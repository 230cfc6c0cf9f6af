"""Weights that a checkpoint lacks: which ones are an error, and what it names."""

import json
import re
import resource
import shutil
import time

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import loftq
from harness import cli, refused
from loftq.errors import InputError
from loftq.sources.checkpoint import open_dense
from models import FAMILIES, tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """``saved("llama")``: the directory of a tiny model."""
    directories = {}

    def save(name):
        if name not in directories:
            directories[name] = tmp_path_factory.mktemp(name)
            tiny(name).save_pretrained(directories[name])
        return directories[name]

    return save


def without(source, target, *parts):
    """A copy of a checkpoint without the tensors that have one of ``parts`` in their names."""
    shutil.copytree(source, target)
    kept = {n: t for n, t in load_file(target / "model.safetensors").items() if not any(part in n for part in parts)}
    save_file(kept, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", FAMILIES)
def test_whole_checkpoints_are_whole(saved, name):
    open_dense(saved(name))


MISSING = [
    ("llama", "layers.1.", "model.layers.1.input_layernorm.weight"),
    ("llama", "model.norm", "model.norm.weight"),
    ("llama", "embed_tokens", "model.embed_tokens.weight"),
    ("gpt2", "c_attn.bias", "transformer.h.0.attn.c_attn.bias, transformer.h.1.attn.c_attn.bias"),
    ("bert-mlm", "position_embeddings", "bert.embeddings.position_embeddings.weight"),
    ("bart", "shared", "model.shared.weight"),
    (
        "t5",
        "decoder.block.0.layer.0.SelfAttention.rel",
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    ),
    ("deberta-v3", "rel_embeddings", "encoder.rel_embeddings.weight"),
]


@pytest.mark.parametrize(("name", "part", "named"), MISSING)
def test_what_the_backbone_lacks_is_named(saved, tmp_path, name, part, named):
    source = without(saved(name), tmp_path / "source", part)
    with pytest.raises(InputError, match=f"weights of {FAMILIES[name].architecture} are missing: .*{named}"):
        open_dense(source)


ACCEPTED = [("bert", "pooler"), ("roberta", "classifier"), ("llama", "lm_head"), ("opt", "lm_head")]


@pytest.mark.parametrize(("name", "part"), ACCEPTED)
def test_heads_and_ties_may_be_missing(saved, tmp_path, name, part):
    open_dense(without(saved(name), tmp_path / "source", part))


def test_a_base_model_for_a_head_and_the_other_way_round(saved, tmp_path):
    for name, architecture in (("bert", "BertForSequenceClassification"), ("bert-mlm", "BertModel")):
        source = shutil.copytree(saved(name), tmp_path / name)
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**config, "architectures": [architecture]}))
        _, built = open_dense(source)
        assert type(built).__name__ == architecture


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("layers.1.block_sparse_moe.experts.", r"missing: model.layers.1.mlp.experts.down_proj"),
        ("layers.1.block_sparse_moe.experts.2.", r"model.layers.1.mlp.experts.down_proj is \(3, 72, 40\), .* \(4, 72"),
        (
            "layers.1.block_sparse_moe.experts.2.w1",
            r"missing: model.layers.1.block_sparse_moe.experts.2.w1.weight; fetch",
        ),
        (
            "block_sparse_moe.experts.2.w3",  # in every layer: nothing but the other experts tells
            r"missing: model.layers.0.block_sparse_moe.experts.2.w3.weight, model.layers.1.block_sparse_moe.experts.2",
        ),
    ],
)
def test_experts_that_are_missing(saved, tmp_path, part, message):
    """One tensor each on disk, one parameter for all in memory."""
    with pytest.raises(InputError, match=message):
        open_dense(without(saved("mixtral"), tmp_path / "source", part))


def test_an_expert_of_another_shape(saved, tmp_path):
    source = shutil.copytree(saved("mixtral"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    odd = "model.layers.0.block_sparse_moe.experts.2.w1.weight"
    save_file({**tensors, odd: tensors[odd][:-1].clone()}, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=rf"{re.escape(odd)} is \(39, 72\), its likes are \(40, 72\)"):
        open_dense(source)


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        ("_orig_mod.", "torch.compile"),
        ("module.", "DistributedDataParallel"),
        ("_fsdp_wrapped_module.", "FSDP"),
        ("base_model.model.", "merge_and_unload"),
        (
            "student.",
            r"called student\.model\..*, as saved from inside a module that has the model as student; save that",
        ),
        ("net.inner.", r"has the model as net\.inner; save that part of it with its save_pretrained"),
    ],
)
def test_names_from_inside_a_wrapper(saved, tmp_path, prefix, words):
    source = shutil.copytree(saved("llama"), tmp_path / "source")
    tensors = {prefix + n: t for n, t in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=words):
        open_dense(source)


@pytest.mark.parametrize("kind", ["bin", "sharded"])
def test_every_form_of_checkpoint_is_compared(saved, tmp_path, kind):
    source = without(saved("llama"), tmp_path / "source", "layers.1.mlp.down_proj")
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    if kind == "bin":
        torch.save(tensors, source / "pytorch_model.bin")
    else:
        names = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(tensors)}
        for file in set(names.values()):
            save_file({n: t for n, t in tensors.items() if names[n] == file}, source / file, {"format": "pt"})
        (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(InputError, match=r"missing: model.layers.1.mlp.down_proj.weight; fetch the whole"):
        open_dense(source)


def test_every_verb_says_so(saved, tmp_path):
    source = without(saved("llama"), tmp_path / "source", "layers.1.")
    (tmp_path / "texts.txt").write_text("a text\n" * 8)
    before = set(tmp_path.iterdir())
    for verb in (
        ["plan", source, "--rank", "4"],
        ["quantize", source, "-o", tmp_path / "out", "--rank", "4"],
        ["calibrate", source, "-o", tmp_path / "out", "--data", tmp_path / "texts.txt"],
        ["start", saved("llama"), "--weights", source, "-o", tmp_path / "out", "--rank", "4"],
    ):
        refused(cli(*verb), 3, "source: weights of LlamaForCausalLM are missing: model.layers.1.")
    with pytest.raises(InputError, match="are missing"):
        loftq.quantize(source, tmp_path / "out")
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("config", "changed", "message"),
    [
        (
            transformers.GPTNeoConfig(
                hidden_size=32, num_layers=1, num_heads=2, attention_types=[[["global"], 1]],
                max_position_embeddings=32, vocab_size=101,
            ),
            {"max_position_embeddings": 40000},
            r"config\.json: transformer\.h\.0\.attn\.attention\.bias of such a model takes 1\.60 GB, and the "
            r"checkpoint has [0-9.]+ KB of weights; a number in it, of positions or of a window, was changed",
        ),
        (
            transformers.LlamaConfig(
                hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=101
            ),
            {"head_dim": 2**28},
            r"config\.json: model\.rotary_emb\.inv_freq of such a model takes 536\.9 MB",
        ),
        (
            transformers.WhisperConfig(
                d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
                encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=16, max_source_positions=20, vocab_size=101,
                max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
            ),
            {"max_source_positions": 2**25},
            r"embed_positions\.weight is \(20, 32\), config\.json asks for \(33554432, 32\); one of the two",
        ),
    ],
    ids=["mask", "rotary", "sinusoids"],
)  # fmt: skip
def test_what_transformers_would_compute_is_bounded(tmp_path, config, changed, message):
    """Nothing of that size is made to find it out."""
    model = transformers.AutoModelForCausalLM if config.model_type != "whisper" else transformers.AutoModel
    model.from_config(config).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**written, **changed}))
    began, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=message):
        loftq.plan(tmp_path, bits=4, rank=4)
    assert time.process_time() - began < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 300 << 10
