"""The start names its base by where it lies from it: moved, copied or uploaded together, both are found."""

import json
import os
import shutil

import pytest
import torch
import transformers
from peft import AutoPeftModel, AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import loftq
from loftq.adapters.bases import resolved
from loftq.errors import InputError
from models import outputs


@pytest.fixture
def moved(made, tmp_path):
    """A checkpoint at a place where it was not made."""
    return shutil.copytree(made("llama").output, tmp_path / "moved" / "here")


@pytest.fixture
def logits(made):
    with torch.no_grad():
        return outputs(made("llama").start())


def same(model, logits):
    with torch.no_grad():
        return torch.equal(outputs(model), logits)


def base_of(directory):
    return json.loads((directory / "adapter_config.json").read_text())["base_model_name_or_path"]


def test_the_base_is_the_directory_above(made, moved):
    assert base_of(moved / "loftq_init") == ".."
    assert PeftConfig.from_pretrained(moved / "loftq_init").base_model_name_or_path == str(moved)
    assert PeftConfig.from_pretrained(moved, subfolder="loftq_init").base_model_name_or_path == str(moved)


LOADERS = {
    "AutoPeftModel": lambda d: AutoPeftModelForCausalLM.from_pretrained(d / "loftq_init"),
    "AutoPeftModel, subfolder": lambda d: AutoPeftModelForCausalLM.from_pretrained(d, subfolder="loftq_init"),
    "AutoModel": lambda d: AutoModelForCausalLM.from_pretrained(d / "loftq_init"),
    "AutoModel of a relative path": lambda d: AutoModelForCausalLM.from_pretrained(os.path.relpath(d / "loftq_init")),
    "PeftModel": lambda d: PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(d), d, subfolder="loftq_init", is_trainable=True
    ),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("loader", LOADERS)
def test_a_directory_that_was_moved_loads(moved, logits, loader, monkeypatch):
    monkeypatch.chdir(moved.parent)
    assert same(LOADERS[loader](moved), logits)


def test_another_model_above_the_current_directory_is_not_taken(made, moved, logits, monkeypatch):
    (moved.parent / "cwd").mkdir()
    shutil.copy(made("gpt2").output / "config.json", moved.parent)
    monkeypatch.chdir(moved.parent / "cwd")
    assert same(AutoPeftModelForCausalLM.from_pretrained(moved / "loftq_init"), logits)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("start", ["PeftModel", "load_start", "AutoPeftModel"])
def test_what_was_trained_from_it_names_it_whole(moved, logits, start, tmp_path, monkeypatch):
    base = AutoModelForCausalLM.from_pretrained(moved)
    model = {
        "PeftModel": lambda: PeftModel.from_pretrained(base, moved, subfolder="loftq_init", is_trainable=True),
        "load_start": lambda: loftq.load_start(base, moved),
        "AutoPeftModel": lambda: AutoPeftModelForCausalLM.from_pretrained(moved / "loftq_init", is_trainable=True),
    }[start]()
    model.save_pretrained(tmp_path / "trained")
    assert base_of(tmp_path / "trained") == str(moved)
    monkeypatch.chdir("/")
    for auto in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        assert same(auto.from_pretrained(tmp_path / "trained"), logits)


@pytest.mark.parametrize("loader", ["AutoPeftModel", "AutoModel"])
def test_what_was_trained_and_moved_together_with_it(moved, logits, tmp_path, loader):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(moved), moved, subfolder="loftq_init")
    model.save_pretrained(tmp_path / "moved" / "runs" / "trained")
    (tmp_path / "moved").rename(tmp_path / "again")
    auto = {"AutoPeftModel": AutoPeftModelForCausalLM, "AutoModel": AutoModelForCausalLM}[loader]
    with pytest.warns(UserWarning, match=r"base .*moved/here is not there; .*again/here is taken, as moved with it"):
        assert same(auto.from_pretrained(tmp_path / "again" / "runs" / "trained"), logits)


def test_what_was_trained_in_it_and_the_whole_renamed(moved, logits, tmp_path):
    AutoPeftModelForCausalLM.from_pretrained(moved / "loftq_init").save_pretrained(moved / "trained")
    moved.rename(tmp_path / "renamed")
    with pytest.warns(UserWarning, match=r"base .*moved/here is not there; .*/renamed is taken, as moved with it"):
        assert same(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "renamed" / "trained"), logits)


def test_another_packed_model_around_it_is_not_taken(made, moved, tmp_path):
    AutoPeftModelForCausalLM.from_pretrained(moved / "loftq_init").save_pretrained(tmp_path / "trained")
    other = shutil.copytree(made("gpt2").output, tmp_path / "other")
    (tmp_path / "trained").rename(other / "trained")
    moved.rename(tmp_path / "gone")
    assert base_of(other / "trained") == resolved(str(moved), other / "trained") == str(moved)


def test_where_no_task_tells_the_class(made, tmp_path):
    checkpoint = made("bert")
    shutil.copytree(checkpoint.output, tmp_path / "moved")
    model = AutoPeftModel.from_pretrained(tmp_path / "moved" / "loftq_init")
    with torch.no_grad():
        assert torch.equal(outputs(model), outputs(checkpoint.start()))


def test_a_dense_model_at_the_end_of_the_path_is_not_taken(made, tmp_path):
    shutil.copytree(made("llama").source, tmp_path / "here")
    assert resolved("/elsewhere/here", tmp_path) == "/elsewhere/here"


def test_a_base_of_a_relative_path_is_found_from_elsewhere(moved, tmp_path, monkeypatch):
    monkeypatch.chdir(moved.parent)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained("here"), LoraConfig(r=4, init_lora_weights="loftq"))
    model.save_pretrained("trained")
    assert base_of(moved.parent / "trained") == str(moved)
    assert model.peft_config["default"].base_model_name_or_path == "here"


def test_a_start_without_the_directory_around_it(moved, tmp_path):
    shutil.copytree(moved / "loftq_init", tmp_path / "alone" / "start")
    with pytest.raises(InputError, match=r"alone/start: its base lay around it, and is not there; write where it is"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "alone" / "start")


def test_a_link_to_the_start(moved, logits, tmp_path):
    (tmp_path / "link").symlink_to(moved / "loftq_init")
    assert same(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "link"), logits)


def test_pipelines(moved):
    tokenizer = transformers.BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1, "word": 2, "[CLS]": 3, "[SEP]": 4})
    texts = []
    for place in (moved, moved / "loftq_init"):
        pipe = transformers.pipeline("text-generation", model=str(place), tokenizer=tokenizer)
        texts.append(pipe.model.config.name_or_path)
        assert any("lora_" in n for n, _ in pipe.model.named_parameters()) == (place != moved)
    assert texts == [str(moved)] * 2


def test_a_repository_of_the_hub(made, logits, tmp_path):
    """As the cache has it; the adapter is in a subfolder, the base in the same repository."""
    repository = tmp_path / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(made("llama").output, repository / "snapshots" / ("0" * 40))
    options = {"subfolder": "loftq_init", "cache_dir": tmp_path}
    assert PeftConfig.from_pretrained("org/name", **options).base_model_name_or_path == "org/name"
    assert same(AutoPeftModelForCausalLM.from_pretrained("org/name", **options), logits)


def test_bases_of_others_are_left_alone(made, tmp_path, monkeypatch):
    """What PEFT wrote as seen from the current directory, and ids of the hub."""
    dense = shutil.copytree(made("llama").source, tmp_path / "dense")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    model = AutoModelForCausalLM.from_pretrained("../dense")
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapters" / "mine")
    assert PeftConfig.from_pretrained(tmp_path / "adapters" / "mine").base_model_name_or_path == "../dense"
    assert resolved("org/name", tmp_path) == "org/name"
    assert resolved(None, tmp_path) is None
    assert resolved("..", tmp_path / "adapters") == "..", "no config.json there"
    assert resolved("..", "org/name") == "..", "the adapter is not in a subfolder"
    assert dense.exists()
