"""``loftq merge``: what PEFT merges in memory, as a plain directory; what could not be merged right is refused."""

import json
import shutil
import warnings

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import loftq
from harness import cli, refused
from loftq.errors import ConflictError, InputError, NumericalError, UsageError
from loftq.formats.source import Checkpoint
from models import outputs, tensors

ROWS = [
    ("llama", {"bits": 2, "rank": "self_attn=3,4", "rslora": True, "alpha": 5.0}),
    ("gpt2", {"bits": 3}),
    ("bert", {"bits": 8, "embeddings": True}),
    ("mixtral", {"bits": "experts=16,4", "code": "affine", "min_coverage": 0.0}),
    ("mixtral", {"bits": "layers.0.mlp.experts.down_proj=16,3", "code": "affine", "min_coverage": 0.0}),
    ("mixtral", {"bits": "layers.0.mlp.experts.down_proj=16,3", "format": "dense", "min_coverage": 0.0}),
    ("gpt-oss", {"bits": 2, "rslora": True, "rank": "experts=3,4"}),
    ("granite-moe", {"bits": 4, "double_quant": True}),
    ("deepseek-v3", {"bits": 2}),
    ("nemotron-h", {"bits": 2}),
    ("nemotron-h", {"bits": 2, "format": "dense"}),
    ("t5", {"bits": 2, "format": "dense"}),
]
EACH = pytest.mark.parametrize(("name", "options"), ROWS, ids=[f"{name}-{o['bits']}" for name, o in ROWS])


@torch.no_grad()
def shaken(model, seed=0):
    """Move every trainable parameter off its start, as training would."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def trained(checkpoint, place, cls=None, model=None, **options):
    """An adapter of a checkpoint that was trained and saved, and what PEFT makes of it: the merged model."""
    model = checkpoint.load(cls) if model is None else model
    config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", **options)
    model = shaken(get_peft_model(model, config))
    model.save_pretrained(place)
    return model.merge_and_unload()


def same(merged, place, dtype=torch.float32):
    """The directory loads plainly, and holds what PEFT's model does, to the rounding of the dtype."""
    assert "quantization_config" not in json.loads((place / "config.json").read_text())
    found = type(merged).from_pretrained(place, dtype=dtype)
    names = {n for n, _ in merged.named_parameters()}
    assert {n for n, _ in found.named_parameters()} == names
    for name, wanted in merged.named_parameters():
        value = found.get_parameter(name)
        assert value.dtype == dtype
        # the two sum in another order, which moves a value to a neighbour; n = all weights of the rows below
        near = torch.finfo(dtype).eps
        wanted = wanted.detach().float()
        torch.testing.assert_close(
            value.detach().float(), wanted, rtol=2 * near, atol=2 * near * float(wanted.abs().max())
        )


@pytest.mark.sampled(4)
@EACH
def test_the_initialization_merged_is_what_peft_merges(made, name, options, tmp_path):
    checkpoint = made(name, **options)
    loftq.merge(checkpoint.output, tmp_path / "merged", dtype="float32")
    merged = checkpoint.start().merge_and_unload()
    same(merged, tmp_path / "merged")
    of_source = {name: t.shape for name, t in tensors(checkpoint.source).items()}
    assert {name: t.shape for name, t in tensors(tmp_path / "merged").items()} == of_source
    if options.get("format") == "dense":
        assert {name: t.shape for name, t in tensors(checkpoint.output).items()} == of_source
        assert loftq.verify(checkpoint.output)
    again = type(merged).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(outputs(again), outputs(merged.eval()), rtol=1e-4, atol=1e-5)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_are_the_rounded_ones(made, dtype, tmp_path):
    checkpoint = made("llama")
    loftq.merge(checkpoint.output, tmp_path / "merged", dtype=dtype)
    same(checkpoint.start().merge_and_unload(), tmp_path / "merged", getattr(torch, dtype))
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize(
    "options",
    [
        {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp.up_proj": 3}, "alpha_pattern": {"o_proj": 1.5}},
        {"use_rslora": True, "modules_to_save": ["lm_head"]},
        {"bias": "all"},
        {"init_lora_weights": "gaussian", "modules_to_save": ["embed_tokens"]},
    ],
    ids=["patterns", "rslora and a head", "biases", "a table"],
)
def test_a_trained_adapter(made, options, tmp_path):
    checkpoint = made("llama")
    merged = trained(checkpoint, tmp_path / "adapter", **options)
    loftq.merge(checkpoint.output, tmp_path / "merged", adapter=tmp_path / "adapter", dtype="float32")
    same(merged, tmp_path / "merged")


@pytest.mark.parametrize("bits", [None, 8, 2])
def test_lora_on_a_table_and_a_head(made, bits, tmp_path):
    """PEFT writes the whole table beside the factors: a dense one, or if it is packed its codes."""
    checkpoint = made("llama", **({"embeddings": True, "bits": bits} if bits else {}))
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "embed_tokens", "lm_head"])
    model = shaken(get_peft_model(checkpoint.load(), config))
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        model.save_pretrained(tmp_path / "adapter")
    assert {n for n in tensors(tmp_path / "adapter") if n.endswith("embed_tokens.base_layer.weight")}
    loftq.merge(checkpoint.output, tmp_path / "merged", adapter=tmp_path / "adapter", dtype="float32")
    same(model.merge_and_unload().dequantize(), tmp_path / "merged")
    if bits:
        held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        codes = next(tensor for name, tensor in held.items() if name.endswith("embed_tokens.base_layer.weight"))
        codes[0] ^= 1
        save_file(held, tmp_path / "adapter" / "adapter_model.safetensors")
        with pytest.raises(InputError, match=r"embed_tokens\.base_layer\.weight is not what the base has"):
            loftq.merge(checkpoint.output, tmp_path / "other", adapter=tmp_path / "adapter")


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["granite-moe", "gpt-oss"])
def test_experts_that_were_trained_are_merged_one_at_a_time(made, name, tmp_path, monkeypatch):
    """PEFT numbers its layers over the stacks that are trained, not over those that there are."""
    checkpoint = made(name)
    read, whole = [], Checkpoint.read

    def watched(*given):
        read.append((tensor := whole(*given)).ndim)
        return tensor

    monkeypatch.setattr(Checkpoint, "read", watched)
    for stacks in (["experts.gate_up_proj"], ["experts.gate_up_proj", "experts.down_proj"]):
        patterns = {"rank_pattern": {stacks[-1]: 3}, "alpha_pattern": {"q_proj": 2.5}}
        config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=stacks, use_rslora=True, **patterns)
        model = shaken(get_peft_model(checkpoint.load(), config))
        place = tmp_path / f"{len(stacks)}"
        model.save_pretrained(place / "adapter")
        loftq.merge(checkpoint.output, place / "merged", adapter=place / "adapter", dtype="float32")
        assert max(read, default=0) <= 2
        same(model.merge_and_unload().dequantize(), place / "merged")


def test_biases_of_lora_and_of_layers(made, tmp_path):
    checkpoint = made("bert")
    config = LoraConfig(target_modules=["query"], lora_bias=True, init_lora_weights=True)
    model = shaken(get_peft_model(checkpoint.load(), config))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*invalid shape")  # PEFT 0.21 takes its own bias for a damaged factor
        model.save_pretrained(tmp_path / "adapter")
    loftq.merge(checkpoint.output, tmp_path / "merged", adapter=tmp_path / "adapter", dtype="float32")
    same(model.merge_and_unload().dequantize(), tmp_path / "merged")


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_head_that_was_trained_makes_the_model_of_its_class(made, name, tmp_path):
    checkpoint = made(name)
    auto = transformers.AutoModelForSequenceClassification
    model = checkpoint.load(auto, num_labels=3)
    model = shaken(loftq.load_start(model, checkpoint.output))
    model.save_pretrained(tmp_path / "adapter")
    loftq.merge(checkpoint.output, tmp_path / "merged", adapter=tmp_path / "adapter", dtype="float32")
    merged = model.merge_and_unload()
    same(merged, tmp_path / "merged")
    found, info = auto.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert type(found) is type(merged)
    assert found.config.num_labels == 3
    assert not info["missing_keys"]
    torch.testing.assert_close(outputs(found.eval()), outputs(merged.eval()), rtol=1e-4, atol=1e-5)


def test_without_an_adapter_it_is_the_backbone(made, tmp_path):
    checkpoint = made("llama")
    loftq.merge(checkpoint.output, tmp_path / "merged", adapter="none", dtype="float32")
    found = checkpoint.family.auto_class.from_pretrained(tmp_path / "merged")
    assert torch.equal(outputs(found.eval()), outputs(checkpoint.backbone().eval()))


def test_small_files_come_along_and_the_adapters_tokenizer_wins(made, tmp_path):
    checkpoint = made("llama")
    base = shutil.copytree(checkpoint.output, tmp_path / "base")
    for name in ("tokenizer_config.json", "tokenizer.json", "LICENSE"):
        (base / name).write_text("{}")
    adapter = shutil.copytree(base / "loftq_init", tmp_path / "adapter")
    (adapter / "tokenizer_config.json").write_text('{"a": 1}')
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    (adapter / "training_args.bin").write_text("no part of a model")
    loftq.merge(base, tmp_path / "merged", adapter=adapter, max_shard_bytes=20_000)
    made_files = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"LICENSE", "tokenizer.json", "chat_template.jinja", "README.md", "generation_config.json"} <= made_files
    assert not {"training_args.bin", "loftq_manifest.json", "loftq_init", "adapter_config.json"} & made_files
    assert (tmp_path / "merged" / "tokenizer_config.json").read_text() == '{"a": 1}'
    assert "model.safetensors.index.json" in made_files
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert found.dtype == torch.bfloat16
    card = (tmp_path / "merged" / "README.md").read_text()
    assert checkpoint.manifest["sha256"] in card


REFUSED = {
    "DoRA": ({"use_dora": True}, {}, "use_dora"),
    "another tuner": ({"peft_type": "IA3"}, {}, "IA3"),
    "an option of a later PEFT": ({"use_something": True}, {}, "use_something"),
    "PiSSA": ({"init_lora_weights": "pissa"}, {}, "pissa"),
    "another rank": ({"r": 5}, {}, "rank"),
    "no scaling": ({"lora_alpha": 0}, {}, "alpha"),
    "no such module": ({}, {"base_model.model.other.lora_A.weight": (4, 72)}, "other"),
    "another shape": ({}, {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": (4, 71)}, "71"),
    "a part of another adapter": ({}, {"base_model.model.lm_head.lora_magnitude_vector": (101,)}, "plain LoRA"),
    "a resized table": ({}, {"base_model.model.model.embed_tokens.weight": (103, 72)}, "resized"),
    "a head of no class": ({}, {"base_model.model.score.weight": (3, 72)}, "score"),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_plain_lora_of_this_base_is_refused(made, what, tmp_path):
    config, more, word = REFUSED[what]
    checkpoint = made("llama")
    adapter = shutil.copytree(checkpoint.output / "loftq_init", tmp_path / "adapter")
    old = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**old, **config}))
    held = load_file(adapter / "adapter_model.safetensors")
    held |= {name: torch.zeros(shape) for name, shape in more.items()}
    save_file(held, adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match=word):
        loftq.merge(checkpoint.output, tmp_path / "merged", adapter=adapter)
    assert not (tmp_path / "merged").exists()


def test_one_of_two_tied_tensors_is_refused(made, tmp_path):
    checkpoint = made("qwen3")
    with pytest.warns(UserWarning, match="tie"):
        trained(checkpoint, tmp_path / "adapter", modules_to_save=["embed_tokens"])
    with pytest.raises(InputError, match="tied to"):
        loftq.merge(checkpoint.output, tmp_path / "merged", adapter=tmp_path / "adapter")


def test_values_beyond_float16(made, tmp_path):
    checkpoint = made("llama")
    adapter = shutil.copytree(checkpoint.output / "loftq_init", tmp_path / "adapter")
    held = load_file(adapter / "adapter_model.safetensors")
    save_file({name: 1e4 * t.abs() for name, t in held.items()}, adapter / "adapter_model.safetensors")
    loftq.merge(checkpoint.output, tmp_path / "wide", adapter=adapter, dtype="bfloat16")
    with pytest.raises(NumericalError, match=r"layers.*beyond float16; use dtype='bfloat16'"):
        loftq.merge(checkpoint.output, tmp_path / "narrow", adapter=adapter, dtype="float16")
    assert not (tmp_path / "narrow").exists()


def test_outputs_that_exist(made, tmp_path):
    checkpoint, place = made("llama"), tmp_path / "merged"
    first = loftq.merge(checkpoint.output, place)
    written = (place / "model.safetensors").stat().st_mtime_ns
    assert loftq.merge(checkpoint.output, place) == first
    assert (place / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(ConflictError, match=r"dtype.*overwrite=True"):
        loftq.merge(checkpoint.output, place, dtype="float32")
    loftq.merge(checkpoint.output, place, dtype="float32", overwrite=True)
    assert tensors(place)["model.layers.0.mlp.up_proj.weight"].dtype == torch.float32
    with pytest.raises(ConflictError, match="did not make"):
        loftq.merge(checkpoint.output, checkpoint.source, overwrite=True)
    with pytest.raises(ConflictError, match="a directory that another command of loftq made"):
        loftq.quantize(checkpoint.source, place)
    with pytest.raises(UsageError, match="in the source"):
        loftq.merge(checkpoint.output, checkpoint.output / "merged")
    with pytest.raises(InputError, match="not a directory that"):
        loftq.merge(checkpoint.source, tmp_path / "other")
    with pytest.raises(UsageError, match="dtype"):
        loftq.merge(checkpoint.output, tmp_path / "other", dtype="int8")
    assert not (tmp_path / "merged.loftq-partial").exists()


def test_on_the_command_line(made, tmp_path):
    checkpoint = made("llama")
    ended = cli("merge", checkpoint.output, "-o", tmp_path / "merged", "--dtype", "float16")
    assert ended.code == 0, ended.err
    assert "float16" in ended.out
    (tmp_path / "run" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-3" / "adapter_config.json").write_text("{}")
    ended = cli("merge", checkpoint.output, "-o", tmp_path / "other", "--adapter", tmp_path / "run")
    refused(ended, 3, "no adapter_config.json", "checkpoint-3")
    for verb in (("merge",), ("export", "--to", "gguf")):
        ended = cli(*verb, tmp_path / "run" / "checkpoint-3", "-o", tmp_path / "other")
        refused(ended, 3, "an adapter; name the quantized directory that it was trained on, and --adapter ")


def test_what_was_trained_and_saved_beside_the_weights_is_not_passed_over(made, tmp_path):
    """transformers loads such an adapter with the weights; no verb takes another one in silence, or both."""
    checkpoint = made("llama")
    directory = shutil.copytree(checkpoint.output, tmp_path / "made")
    trained(checkpoint, directory)
    verbs = (
        lambda: loftq.merge(directory, tmp_path / "out"),
        lambda: loftq.merge(directory, tmp_path / "out", adapter=directory),
        lambda: loftq.export(directory, tmp_path / "out", to="lora-for-original"),
        lambda: loftq.start(directory, checkpoint.source, tmp_path / "out"),
    )
    for verb in verbs:
        with pytest.raises(InputError, match=r"adapter_config.json: .*, or move the adapter_\* files into a directory"):
            verb()
    assert not (tmp_path / "out").exists()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(directory)
    with pytest.raises(UsageError, match="the model has an adapter already"):
        loftq.load_start(loaded, directory)
    (tmp_path / "adapter").mkdir()
    for file in directory.glob("adapter_*"):
        file.rename(tmp_path / "adapter" / file.name)
    loftq.merge(directory, tmp_path / "out", adapter=tmp_path / "adapter")
    assert not [file.name for file in (tmp_path / "out").iterdir() if "adapter" in file.name]
