"""``config.json`` is input from strangers: it selects no code, reaches no network, and builds nothing without end."""

import json
import sys

import pytest
import transformers

import loftq
from loftq.architecture import configuration, presence, skeleton
from loftq.checkpoint.verify import verify
from loftq.errors import InputError
from loftq.formats import strict_json
from models import BERT, LLAMA, MOE, quantize, tiny

CANARY = """
import pathlib
pathlib.Path(__file__).with_name("canary").write_text("sung")
raise SystemExit("code of the checkpoint was run")
"""


def directory(path, **config):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **LLAMA, **config}))
    return path


STEERING = {
    "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    "auto_map_extra": "evil.Config",
    "trust_remote_code": True,
    "custom_pipelines": {"text-generation": {"impl": "evil.Pipeline"}},
    "_attn_implementation": "evil/kernel",
    "_attn_implementation_internal": "evil/kernel",
    "_attn_implementation_autoset": True,
    "attn_implementation": "evil/kernel",
    "_experts_implementation": "evil/kernel",
    "_experts_implementation_internal": "evil/kernel",
    "experts_implementation": "evil/kernel",
}


@pytest.mark.parametrize("key", STEERING)
def test_keys_that_select_code_are_dropped_also_from_nested_configs(tmp_path, key):
    path = directory(
        tmp_path, **{key: STEERING[key], "text_config": {key: STEERING[key], "inner": {key: 1, "kept": 2}}}
    )
    config = configuration.read_config(path)
    assert key not in json.dumps(config)
    assert config["text_config"] == {"inner": {"kept": 2}}
    assert config["hidden_size"] == LLAMA["hidden_size"]


def test_none_of_them_reaches_the_model(tmp_path):
    model = skeleton.build(directory(tmp_path, architectures=["LlamaForCausalLM"], **STEERING))
    assert type(model) is transformers.LlamaForCausalLM
    assert model.config._attn_implementation in ("sdpa", "eager")
    assert "evil" not in json.dumps(model.config.to_dict())
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_code_beside_the_weights_is_never_run_nor_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["loftq"])
    source = tmp_path / "dense"
    tiny("llama").save_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **STEERING, "nested_config": STEERING}))
    for name in ("evil.py", "modeling_llama.py", "loftq_register.py"):
        (source / name).write_text(CANARY)
    quantize(source, tmp_path / "quantized")
    assert not list(tmp_path.rglob("canary"))
    assert not list((tmp_path / "quantized").rglob("*.py"))
    assert "evil" not in (tmp_path / "quantized" / "config.json").read_text()
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "evil", "auto_map": STEERING["auto_map"]}, "model_type evil is not one of transformers' own"),
        ({"model_type": None}, "model_type None is not one of transformers' own; loftq does not run code"),
        ({"model_type": ["llama"]}, "is not one of transformers' own"),
        ({"model_type": {}}, "is not one of transformers' own"),
        ({"model_type": "\x1b]0;owned\x07"}, r"model_type \\x1b\]0;owned\\x07 is not"),
    ],
)
def test_unknown_models_are_refused(tmp_path, config, message):
    (tmp_path / "evil.py").write_text(CANARY)
    with pytest.raises(InputError, match=message):
        skeleton.build(directory(tmp_path, **config))
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "architectures", ["LlamaModel", [], [None], {"a": 1}, ["eval"], ["pipeline"], ["PreTrainedModel.x"], 7, None]
)
def test_odd_architectures_give_the_base_model(tmp_path, architectures):
    assert type(skeleton.build(directory(tmp_path, architectures=architectures))) is transformers.LlamaModel


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 10**12}, r"hidden_size is 1000000000000; wanted a number from 0 to 2147483648"),
        ({"hidden_size": -1}, "hidden_size is -1"),
        ({"hidden_size": "64"}, "hidden_size is '64'; wanted a number"),
        ({"vocab_size": 1e300}, "vocab_size is 1e.300"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000; wanted a number from 0 to 4096"),
        ({"num_hidden_layers": "x" * 1000}, "num_hidden_layers is 'x{118}…; wanted"),
        ({"num_attention_heads": [4, 10**12]}, "num_attention_heads is 1000000000000"),
        ({"model_type": "gpt2", "n_layer": 10**7}, "n_layer is 10000000; wanted a number from 0 to 4096"),
        ({"model_type": "t5", "num_decoder_layers": 10**7}, "num_decoder_layers is 10000000"),
        ({"text_config": {"vision": {"num_hidden_layers": 10**9}}}, "num_hidden_layers is 1000000000"),
        ({"num_attention_heads": 0}, "transformers cannot build this model: "),
        ({"hidden_act": "evil"}, "transformers cannot build this model: there is no 'evil'"),
        ({"dtype": "load"}, "transformers cannot build this model: "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_sizes_that_no_model_has_are_refused_before_it_is_built(tmp_path, config, message):
    with pytest.raises(InputError, match=message) as refused:
        skeleton.build(directory(tmp_path, **config))
    assert "\n" not in str(refused.value)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama", **LLAMA, "num_hidden_layers": 4096},
        {"model_type": "albert", **BERT, "inner_group_num": 10**8},
        {"model_type": "qwen2_moe", **LLAMA, **MOE, "num_experts": 10**7, "shared_expert_intermediate_size": 8},
    ],
    ids=lambda config: config["model_type"],
)
def test_a_skeleton_without_end_is_stopped(tmp_path, config, monkeypatch):
    monkeypatch.setattr(configuration, "MOST_MODULES", 2000)
    (tmp_path / "config.json").write_text(json.dumps(config))
    try:
        skeleton.build(tmp_path)
    except InputError as e:
        assert "transformers cannot build this model: more than 2000 modules" in str(e)  # noqa: PT017
    else:
        assert config["model_type"] == "qwen2_moe"  # experts are one tensor, on the meta device


def test_no_hook_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(configuration, "MOST_MODULES", 10)
    with pytest.raises(InputError, match="more than 10 modules"):
        skeleton.build(directory(tmp_path))
    tiny("llama")


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_method": "loftq"}}, "loftq"),
        ({"quantization_config": {"bits": 4}}, "an unnamed method"),
        ({"quantization_config": "gptq"}, "'gptq'"),
        ({"quantization_config": []}, r"\[\]"),
        ({"compression_config": {"quant_method": "sparse"}}, "sparse"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "awq"),
    ],
)
def test_sources_that_are_quantized_already_are_refused(tmp_path, config, method):
    with pytest.raises(InputError, match=f"already quantized with {method}; start from the full-precision checkpoint"):
        configuration.read_config(directory(tmp_path, **config))


def test_a_null_quantization_config_is_none(tmp_path):
    assert "model_type" in configuration.read_config(directory(tmp_path, quantization_config=None))


def test_our_own_output_is_refused_as_a_source(made, tmp_path):
    with pytest.raises(InputError, match="already quantized with"):
        loftq.quantize(made("llama").output, tmp_path / "again", bits=2)


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(InputError, match=r"config.json: missing; a Hugging Face model directory holds a config.json"):
        skeleton.build(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 60}, r"q_proj.weight is \(72, 72\), config.json asks for \(72, 60\)"),
        ({"vocab_size": 102}, r"embed_tokens.weight is \(101, 72\), config.json asks for \(102, 72\)"),
        ({"intermediate_size": 41}, r"and 1 more|mlp.down_proj.weight is \(72, 40\)"),
    ],
)
def test_weights_of_another_size_than_the_config_says_are_refused(made, tmp_path, change, message):
    source = made("llama").source
    for file in source.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(InputError):
        loftq.quantize(tmp_path, tmp_path.with_name("out"), bits=2)
    tensors = {n: ("F32", tuple(t.shape)) for n, t in made("llama").dense.state_dict().items()}
    with pytest.raises(InputError, match=f"the weights do not fit config.json: .*{message}"):
        presence.check_weights(skeleton.build(tmp_path), tensors, tmp_path)


ODD_NUMBERS = [
    ("MambaForCausalLM", {"state_size": 8, "time_step_limit": [0.0, float("inf")]}, "time_step_limit"),
    ("Mamba2ForCausalLM", {"state_size": 8, "num_heads": 8, "head_dim": 18, "chunk_size": 4}, "time_step_limit"),
    ("GPTNeoForCausalLM", {"num_heads": 4, "attention_types": [[["global", "local"], 1]]}, "attention_layers"),
    ("LlamaForCausalLM", {**LLAMA, "chunk_size": -1, "n_layers": ["full", ["sliding", 2]]}, "chunk_size"),
]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("spelling", ["tagged", "bare"])
@pytest.mark.parametrize(("architecture", "options", "key"), ODD_NUMBERS)
def test_what_transformers_reads_and_writes_is_read_and_written(tmp_path, architecture, options, key, spelling):
    sizes = {"vocab_size": 101, "hidden_size": 72, "num_layers": 2, "num_hidden_layers": 2}
    config = getattr(transformers, architecture.replace("ForCausalLM", "Config"))(**{**sizes, **options})
    getattr(transformers, architecture)(config).save_pretrained(tmp_path / "dense")
    file = tmp_path / "dense" / "config.json"
    written = json.loads(file.read_text())
    assert key in written
    if spelling == "bare":
        file.write_text(file.read_text().replace('{"__float__": "Infinity"}', "Infinity"))
        file.write_text(json.dumps(strict_json.load_object(file, special=True)))
    quantize(tmp_path / "dense", tmp_path / "quantized")
    after = transformers.AutoConfig.from_pretrained(tmp_path / "quantized")
    assert getattr(after, key) == getattr(transformers.AutoConfig.from_pretrained(tmp_path / "dense"), key)
    json.loads((tmp_path / "quantized" / "config.json").read_text(), parse_constant=pytest.fail)
    verify(tmp_path / "quantized")


def test_the_whole_reason_of_transformers_is_shown(tmp_path):
    with pytest.raises(InputError, match=r"cannot build this model: .*hidden_act.*evil") as refused:
        skeleton.build(directory(tmp_path, hidden_act=["evil"]))
    assert "\n" not in str(refused.value)


def test_roles_come_from_modules_not_names(tmp_path):
    model = skeleton.build(directory(tmp_path, model_type="bert", architectures=["BertForMaskedLM"], **BERT))
    names = ["bert.encoder.layer.0.output.dense.weight", "bert.encoder.layer.0.output.dense.bias", "unknown.weight"]
    names += ["bert.embeddings.word_embeddings.weight", "cls.predictions.transform.dense.weight"]
    names += ["bert.encoder.layer.0.output.LayerNorm.gamma"]
    roles = skeleton.roles(model, names)
    layer = roles[names[0]]
    assert (layer.module, layer.kind, layer.backbone) == ("bert.encoder.layer.0.output.dense", "linear", True)
    assert (layer.stack.name, layer.stack.index, layer.stack.length) == ("bert.encoder.layer", 0, 2)
    assert roles[names[1]].kind == "other"
    assert roles[names[2]].module == ""
    assert roles[names[3]].tied == ("cls.predictions.decoder.weight",)
    assert not roles[names[4]].backbone
    assert roles[names[5]].module == "bert.encoder.layer.0.output.LayerNorm"  # as old checkpoints spell it


def test_what_transformers_would_not_find_packed_stays_dense(tmp_path, monkeypatch):
    """Some patterns end at a name: what is written in its place, scales above all, must be renamed as well."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    model = skeleton.build(directory(tmp_path, model_type="bert", architectures=["BertForMaskedLM"], **BERT))
    renamings = [WeightRenaming(r"dense_matrix$", r"dense.weight"), WeightRenaming(r"inner\.", r"intermediate.")]
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: renamings)
    layer = "bert.encoder.layer.0"
    roles = skeleton.roles(model, [f"{layer}.output.dense_matrix", f"{layer}.inner.dense.weight"])
    assert [role.module for role in roles.values()] == [f"{layer}.output.dense", f"{layer}.intermediate.dense"]
    assert [role.keep[:45] for role in roles.values()] == ["transformers would not find its packed tensor", ""]
