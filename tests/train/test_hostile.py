"""Checkpoints with code beside them and hub kernels in their configuration: nothing runs, nothing is fetched."""

import json
import os
import shutil
import socket

import datasets  # imported once, before the first fork
import huggingface_hub.constants
import pytest
import tiny

import loftq.calibration.calibrate
import loftq.finetune.evaluate
import loftq.finetune.train
import loftq.frozen.start  # noqa: F401
from harness import cli, refused
from loftq.architecture.loading import load_config, load_tokenizer, load_weights
from loftq.errors import InputError
from loftq.finetune.recipe import dump

pytestmark = pytest.mark.slow

OPTIONS = ("--bits", "4", "--rank", "4", "--workers", "1")
AUTO = {name: f"evil.{name}" for name in ("AutoConfig", "AutoModel", "AutoModelForSequenceClassification")}
KERNEL = {"_attn_implementation": "org/kernel", "_experts_implementation": "org/kernel"}
HOSTILE = {**KERNEL, "auto_map": AUTO, "custom_pipelines": {"sst2": {"impl": "evil.Pipe", "pt": ["AutoModel"]}}}
TOKENIZER = {"auto_map": {"AutoTokenizer": ["evil.Slow", "evil.Fast"]}}
VERBS = {
    "plan": ("plan", "MODEL", "--bits", "4"),
    "quantize": ("quantize", "MODEL", "-o", "PLACE/quantized", *OPTIONS),
    "calibrate": ("calibrate", "MODEL", "-o", "PLACE/statistics", "--data", "PLACE/data/train.jsonl",
                  "--column", "sentence", "--samples", "8", "--kind", "diagonal"),
    "start": ("start", "MODEL", "--weights", "PLACE/model", "-o", "PLACE/start", "--rank", "4"),
    "train": ("train", "PLACE/recipe.yaml"),
    "evaluate": ("evaluate", "MODEL", "--task", "sst2", "--data", "PLACE/data", "--adapter", "PLACE/lora/adapter",
                 "--max-length", "16"),
}  # fmt: skip


def changed(file, **values):
    file.write_text(json.dumps({**(json.loads(file.read_text()) if file.exists() else {}), **values}))


def hostile(place, **config):
    """The tiny model with code for every part of it, which leaves a file behind if it runs."""
    model = place / "hostile"
    shutil.copytree(place / "model", model)
    (model / "evil.py").write_text(f"open({str(place / 'ran')!r}, 'w')\n")
    changed(model / "config.json", **{**HOSTILE, **config}, nested=KERNEL, several=[KERNEL])
    changed(model / "tokenizer_config.json", **TOKENIZER)
    changed(model / "processor_config.json", processor_class="Evil", auto_map={"AutoProcessor": "evil.Evil"})
    changed(model / "generation_config.json", custom_generate="org/generate", auto_map={"AutoModel": "evil.Evil"})
    return model


def said_yes(place):
    """In a child: "y" to every question, a hub that is on line, and a mark where somebody reaches for the network."""

    def setup():
        read, write = os.pipe()
        os.write(write, b"y\n" * 100)
        os.dup2(read, 0)
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = False

        def connect(*_, **__):
            (place / "reached").touch()
            raise OSError("no network here")

        socket.getaddrinfo = socket.create_connection = socket.socket.connect = connect

    return setup


def run(place, model, verb):
    words = [word.replace("MODEL", str(model)).replace("PLACE", str(place)) for word in VERBS[verb]]
    ended = cli(*words, setup=said_yes(place))
    assert not (place / "ran").exists(), (verb, ended)
    assert not (place / "reached").exists(), (verb, ended)
    assert "[y/N]" not in ended.out + ended.err
    return ended


def test_classes_of_transformers_are_used_instead(place):
    """All the verbs, one after the other; what evaluates is what was trained."""
    model = hostile(place)
    recipe = tiny.recipe(place, "lora", model=str(model), quantization=None, **{"training.max_steps": 1})
    (place / "recipe.yaml").write_text(dump(recipe))
    for verb in VERBS:
        ended = run(place, model, verb)
        assert ended.code == 0, (verb, ended.err)


@pytest.mark.parametrize("verb", VERBS)
def test_a_model_that_is_nothing_without_its_code_is_refused(place, verb):
    model = hostile(place, model_type="evil", architectures=["EvilModel"])
    (place / "recipe.yaml").write_text(dump(tiny.recipe(place, "lora", model=str(model))))
    if verb == "evaluate":  # which wants an adapter, and looks for it first
        (place / "lora" / "adapter").mkdir(parents=True)
        (place / "lora" / "adapter" / "adapter_config.json").write_text("{}")
    refused(run(place, model, verb), 3, "config.json: model_type evil is not one of transformers' own")


@pytest.mark.parametrize(
    "values",
    [
        {"tokenizer_class": "AutoModel"},
        {"tokenizer_class": "AutoTokenizer"},
        {"tokenizer_class": "AutoProcessor"},
        {"tokenizer_class": "evil.Evil"},
        {"tokenizer_class": "pipeline"},
        {"tokenizer_class": ["BertTokenizer"]},
    ],
)
def test_classes_that_are_no_tokenizers(place, values):
    """They give another tokenizer or one line; none reads the configuration of the directory by its own."""
    model = hostile(place)
    changed(model / "tokenizer_config.json", **values)
    try:
        found = load_tokenizer(model)
    except InputError as e:
        said = str(e)
    else:
        said = str(model) if "bad" in found.get_vocab() else "another tokenizer"
    assert said.startswith(str(model))
    assert "\n" not in said
    assert not (place / "ran").exists()


def test_a_tokenizer_that_is_nothing_without_its_code(place, monkeypatch):
    """A model type without a tokenizer of its own; what transformers asks is not asked."""
    model = hostile(place, model_type="vit")
    changed(model / "tokenizer_config.json", tokenizer_class="Evil")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(InputError, match=r"no tokenizer that can be read: .*custom code"):
        load_tokenizer(model)
    assert not (place / "ran").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "merges.txt"])
def test_files_that_transformers_reads_are_looked_at_first(place, name):
    """One that is nested, and a pipe, on which transformers would wait."""
    model = place / "odd"
    shutil.copytree(place / "model", model)
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    for load in (load_tokenizer, lambda model: load_weights(None, model, None)):
        with pytest.raises(InputError, match=f"{name}: not a regular file"):
            load(model)
    (model / name).unlink()
    (model / name).write_text("[" * 5000)
    if name.endswith(".json"):
        with pytest.raises(InputError, match=f"{name}: more than 100 levels of nesting"):
            load_tokenizer(model)


def test_no_tokenizer_is_made_up(place):
    """transformers gives one that knows no word, and training goes on with it."""
    model = place / "bare"
    shutil.copytree(place / "model", model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    with pytest.raises(InputError, match=r"none of .*tokenizer\.json.* exists; fetch the tokenizer's files"):
        load_tokenizer(model)


def test_what_steers_transformers_is_not_taken_from_a_file(place):
    config = load_config(hostile(place))
    assert config._attn_implementation != "org/kernel"
    assert not hasattr(config, "auto_map")
    assert not hasattr(config, "custom_pipelines")
    assert (config.nested, config.several) == ({}, [{}])
    changed(place / "hostile" / "config.json", text_config=KERNEL)
    with pytest.raises(InputError, match="text_config is none that model_type bert has"):
        load_config(place / "hostile")


def test_an_adapter_cannot_name_modules_to_import(place):
    model = hostile(place)
    (place / "recipe.yaml").write_text(dump(tiny.recipe(place, "lora", **{"training.max_steps": 1})))
    assert run(place, place / "model", "train").code == 0
    config = place / "lora" / "adapter" / "adapter_config.json"
    changed(config, base_model_name_or_path="org/base", auto_mapping={"parent_library": "evil"})
    assert run(place, model, "evaluate").code == 0
    changed(config, megatron_config={"a": 1}, megatron_core="evil")
    refused(run(place, model, "evaluate"), 3, "its megatron_config has PEFT import modules; take it out")
