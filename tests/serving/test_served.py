"""``--serve``: what the software cannot run is refused when it is planned, by what the export says; nothing else is."""

import json
import shutil

import pytest
import torch
import transformers
from test_gguf import FAMILIES, MIXTURES, SIZES, TURNED, made_of

import loftq
from harness import cli, refused
from loftq.architecture.served import check_model
from loftq.errors import InputError, UsageError
from loftq.planning.containers import CONTAINERS


def source(place, name, **other):
    family, more = {**FAMILIES, **MIXTURES, **TURNED, "gpt2": ("GPT2", {})}[name]
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **more, **other})
    model = getattr(transformers, f"{family}{'LMHeadModel' if name == 'gpt2' else 'ForCausalLM'}")(config)
    model.save_pretrained(place / name)
    return place / name


@pytest.mark.parametrize(
    ("name", "other", "serve", "told"),
    [
        ("qwen3-moe", {"norm_topk_prob": False}, "gguf", "norm_topk_prob False; llama.cpp's qwen3moe"),
        ("qwen3-moe", {"mlp_only_layers": [1]}, "gguf", "layers 0 and 1: one of them lacks .*experts"),
        ("qwen3", {"attention_bias": True}, "gguf", "attention_bias True"),
        ("mixtral", {"sliding_window": 16}, "mlx", "sliding_window is 16, and mlx-lm"),
        ("gpt2", {}, "mlx", "GPT2LMHeadModel: the export to MLX supports only"),
        ("gpt2", {}, "compressed-tensors", "a conv1d, which cannot be exported to compressed-tensors yet"),
        ("gpt-oss", {}, "compressed-tensors", "no layer for each expert.*bits='experts=16,4'"),
    ],
)
def test_what_cannot_run_is_refused_before_a_weight_is_read(name, other, serve, told, tmp_path):
    directory = source(tmp_path, name, **other)
    for file in directory.glob("*.safetensors"):  # the headers alone, and holes for the weights
        with file.open("r+b") as opened:
            size = file.stat().st_size
            opened.truncate(8 + int.from_bytes(opened.read(8), "little"))
            opened.truncate(size)
    given = {"serve": serve, "bits": 4, "rank": 4, "min_coverage": 0.0}
    with pytest.raises(InputError, match=told):
        loftq.plan(directory, **given)
    with pytest.raises(InputError, match=told):
        loftq.quantize(directory, tmp_path / "out", workers=1, **given)
    assert not list(tmp_path.glob("out*"))
    if name == "gpt-oss":
        assert loftq.plan(directory, **{**given, "bits": "experts=16,4"}).matrices


def test_the_command_says_so_in_one_line(tmp_path):
    directory = source(tmp_path, "qwen3-moe", norm_topk_prob=False)
    for verb in (("plan", directory), ("quantize", directory, "-o", tmp_path / "out")):
        ended = cli(*verb, "--serve", "gguf", "--rank", "4", "--bits", "4")
        refused(ended, 3, "quantize without --serve gguf, and use another runtime")


ROPE = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    ("name", "other", "told"),
    [
        ("gpt2", {}, "GPT2LMHeadModel: GGUF is written here only for LlamaForCausalLM, "),
        ("gpt-oss", {}, "GptOssForCausalLM: GGUF is written here only for LlamaForCausalLM, "),
        ("llama", {"rope_parameters": ROPE}, "LlamaForCausalLM: rope_type dynamic is not written here; "),
        ("llama", {}, ""),
    ],
)
def test_what_only_llama_cpps_script_writes_is_told_as_the_export_says_it(name, other, told, tmp_path, caplog):
    directory, given = source(tmp_path, name, **other), {"rank": 4, "bits": 4, "min_coverage": 0.0}

    def messages():  # some releases of transformers warn of the tiny configuration
        return [record.getMessage() for record in caplog.records if record.name.startswith("loftq")]

    assert loftq.plan(directory, **given).matrices
    assert loftq.plan(directory, serve="onnx", **given).matrices
    assert messages() == []
    assert loftq.plan(directory, serve="gguf", **given).matrices
    assert [message.startswith(told) for message in messages()] == [True] * bool(told)
    if name != "gpt2":
        return
    pytest.importorskip("gguf")
    loftq.quantize(directory, tmp_path / "base", serve="gguf", workers=1, **given)
    first, again = messages()
    with pytest.raises(InputError) as e:
        loftq.export(tmp_path / "base", tmp_path / "out", to="gguf")
    assert first == again == str(e.value)
    ended = cli("plan", directory, "--serve", "gguf", "--rank", "4", "--bits", "4")
    assert ended.code == 0
    assert "give `loftq export` llama.cpp's convert_hf_to_gguf.py with --converter PATH" in ended.err


@pytest.mark.parametrize("serve", CONTAINERS)
def test_every_family_that_is_exported_passes(serve):
    for family, more in {**FAMILIES, **MIXTURES}.values():
        with torch.device("meta"):
            config = getattr(transformers, f"{family}Config")(**{**SIZES, **more})
            check_model(serve, getattr(transformers, f"{family}ForCausalLM")(config))


def test_the_script_of_llama_cpp_makes_no_other_model_either(tmp_path):
    pytest.importorskip("gguf")
    directory = made_of("qwen3", tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    (tmp_path / "script.py").write_text("raise SystemExit(1)")
    with pytest.raises(InputError, match="hidden_act gelu"):
        loftq.export(directory, tmp_path / "out", to="gguf", converter=tmp_path / "script.py")


def test_formats_without_packed_codes_are_not_served(tmp_path):
    directory = source(tmp_path, "llama")
    for form in ("dense", "bnb"):
        with pytest.raises(UsageError, match=f"serve='mlx': format='{form}' keeps no packed codes"):
            loftq.quantize(directory, tmp_path / "out", serve="mlx", format=form, rank=4)
    assert not list(tmp_path.glob("out*"))
    shutil.rmtree(directory)
    made = made_of("llama", tmp_path, format="dense")
    for serve in CONTAINERS:
        with pytest.raises(InputError, match=f"format='dense' keeps no packed codes, of which the files for {serve}"):
            loftq.export(made, tmp_path / "out", to=serve)


@pytest.mark.parametrize(
    ("kind", "wrong", "why"),
    [
        ("WordLevel", {}, "a WordLevel tokenizer; wanted BPE"),
        ("BPE", {}, "neither byte-level nor with byte_fallback"),
        ("BPE", {"pre_tokenizer": {"type": "ByteLevel"}}, "no merges"),
        ("BPE", {"model": []}, "wanted BPE"),
    ],
)
def test_a_tokenizer_that_llama_cpp_has_not_is_refused_before_the_weights(kind, wrong, why, tmp_path):
    directory, given = source(tmp_path, "llama"), {"rank": 4, "bits": 4}
    assert loftq.plan(directory, serve="gguf", **given).matrices  # a tokenizer may come with an adapter
    (directory / "tokenizer.json").write_text(json.dumps({"model": {"type": kind, "vocab": {}}, **wrong}))
    with pytest.raises(InputError, match=why):
        loftq.quantize(directory, tmp_path / "out", serve="gguf", **given)
    assert not (tmp_path / "out").exists()
    assert loftq.plan(directory, serve="mlx", **given).matrices
