"""Directories that are no checkpoint of transformers: what is said about each, and folders of links that are one."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

import loftq
from loftq.errors import InputError
from loftq.formats.source import open_checkpoint
from loftq.sources.checkpoint import open_dense
from models import tiny

MODEL = ("m/config.json", "m/model.safetensors")

ROWS = {
    "adapter": (["adapter_config.json", "adapter_model.safetensors"], r"a PEFT adapter; merge .* merge_and_unload\(\)"),
    "variant": (["model.fp16.safetensors"], r'the variant fp16 only; .* variant="fp16"'),
    "bin variant": (["pytorch_model.fp16.bin"], "the variant fp16 only"),
    "sharded variant": (
        ["model.safetensors.index.bf16.json", "model.bf16-00001-of-00002.safetensors"],
        "the variant bf16 only",
    ),
    "older sharded variant": (["model-00001-of-00002.fp16.safetensors"], "the variant fp16 only"),
    "diffusers": (["model_index.json", *MODEL], "a pipeline of diffusers; name one of the models in it: m"),
    "sentence-transformers": (["modules.json", "config.json", *MODEL], "SentenceTransformers .* name one of .*: m"),
    "cache": (["blobs/x", "refs/main", "snapshots/0/config.json"], "the hub's cache of a model; name a directory in"),
    "deepspeed": (["zero_to_fp32.py", "latest", "global_step9/x.pt"], "DeepSpeed; .* zero_to_fp32.py"),
    "fsdp": (["pytorch_model_fsdp_0/__0_0.distcp", "config.json"], r"\(FSDP\); .* `accelerate merge-weights`"),
    "distributed": (["__0_0.distcp", ".metadata"], r"\(FSDP\)"),
    "no index": (["model-00001-of-00002.safetensors"], "shards without an index"),
    "meta": (["consolidated.00.pth", "params.json"], "the original format of its authors; get the converted one"),
    "mistral": (["consolidated.safetensors", "params.json"], "the original format of its authors"),
    "gguf": (["model-q4.gguf"], "GGUF only; start from the original"),
    "tensorflow": (["tf_model.h5", "config.json"], "TensorFlow or Flax only; get the safetensors"),
    "flax": (["flax_model.msgpack", "config.json"], "TensorFlow or Flax only"),
    "onnx": (["model.onnx", "config.json"], "an exported graph only; get the checkpoint"),
    "lightning": (["last.ckpt"], "a file of torch that is no checkpoint"),
    "another name": (["llama.safetensors"], "weights of other names, llama.safetensors"),
    "a run": (["checkpoint-9/config.json", "checkpoint-9/model.safetensors"], "name one of them: checkpoint-9"),
    "runs": (["runs/a/config.json", "runs/a/model.safetensors"], "checkpoints below it; name one of them: runs/a"),
    "a part of diffusers": (["config.json", "diffusion_pytorch_model.safetensors"], "a model of diffusers, and only"),
    "half": (["config.json", ".cache/huggingface/download/x.incomplete"], "that has not ended, x.inc.*; start"),
    "half of a browser's": (["model.safetensors.crdownload"], r"a download that .*, model\.safetensors\.crdownload; "),
    "nothing": (["README.md"], "none of them; fetch the weights or check the path"),
}


@pytest.mark.parametrize("row", ROWS)
def test_what_it_is_and_what_to_do(tmp_path, row):
    files, message = ROWS[row]
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("{}")
    with pytest.raises(InputError, match=f"no checkpoint; looked for .*, found .*{message}"):
        open_checkpoint(tmp_path)


def test_half_a_download_in_the_cache_of_the_hub(tmp_path, monkeypatch):
    for file in ("blobs/x.incomplete", "snapshots/0/config.json"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text("{}")
    monkeypatch.chdir(tmp_path / "snapshots")
    for place in (Path("0"), tmp_path / "snapshots" / "0"):
        with pytest.raises(InputError, match=r"found a download that has not ended, x\.incomplete; start it again"):
            open_checkpoint(place)


def test_the_base_of_an_adapter_is_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    with pytest.raises(InputError, match=r"a PEFT adapter of org/base; .* or name the base"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"])
def test_a_pointer_of_git_lfs(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(InputError, match=f"{name}: a pointer of git-lfs, not the file; run `git lfs pull`"):
        open_checkpoint(tmp_path)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    tiny("llama").save_pretrained(directory)
    return directory


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "assets/voice.npy"])
def test_a_pointer_beside_the_weights(llama, tmp_path, name):
    source = shutil.copytree(llama, tmp_path / "source")
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(InputError, match=f"{name}: a pointer of git-lfs, not the file; run `git lfs pull`"):
        loftq.quantize(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_beside_the_weights(llama, tmp_path):
    source = shutil.copytree(llama, tmp_path / "source")
    adapted = get_peft_model(tiny("llama"), LoraConfig(r=4, target_modules=["q_proj"]))
    adapted.save_pretrained(source, save_embedding_layers=False)
    with pytest.raises(InputError, match=r"adapter_config.json: a PEFT adapter beside the weights, .*; merge it"):
        loftq.quantize(source, tmp_path / "out")
    for file in source.glob("adapter_*"):
        file.unlink()
    open_dense(source)


def test_lora_layers_that_were_not_merged(llama, tmp_path):
    source = shutil.copytree(llama, tmp_path / "source")
    (source / "model.safetensors").unlink()
    wrapped = get_peft_model(tiny("llama"), LoraConfig(r=4, target_modules=["q_proj"]))
    torch.save(wrapped.state_dict(), source / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"called base_model.model..*, as saved from inside PEFT; merge the adapter"):
        open_dense(source)


def link(source, target):
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).symlink_to(path)
    return target


def test_a_folder_of_links(llama, tmp_path):
    """Each leads to the file of its name in a directory that is a model's: followed, small files too."""
    (llama / "vocab.txt").write_text("word\n")
    links = link(llama, tmp_path / "links")
    checkpoint = open_checkpoint(links)
    wanted = load_file(llama / "model.safetensors")
    assert all(torch.equal(checkpoint.read(n), t) for n, t in wanted.items())
    loftq.quantize(links, tmp_path / "out", rank=4, workers=1)
    assert (tmp_path / "out" / "vocab.txt").read_text() == "word\n"


def test_links_of_older_hub_versions(llama, tmp_path):
    """``local_dir`` was once filled with links to the blobs of the cache, which are called by their hashes."""
    blobs = tmp_path / "hub" / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    local = tmp_path / "local"
    local.mkdir()
    for i, path in enumerate(sorted(llama.iterdir())):
        (local / path.name).symlink_to(shutil.copy(path, blobs / f"{i:040x}"))
    assert open_checkpoint(local).tensors


def test_a_directory_in_a_snapshot(llama, tmp_path):
    repository = tmp_path / "hub" / "models--org--name"
    inner = repository / "snapshots" / "0123abcd" / "text_encoder"
    inner.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for path in llama.iterdir():
        shutil.copy(path, repository / "blobs" / f"of-{path.name}")
        (inner / path.name).symlink_to(os.path.relpath(repository / "blobs" / f"of-{path.name}", inner))
    assert open_checkpoint(inner).tensors


@pytest.mark.parametrize("target", ["secret.txt", "elsewhere/vocab.txt"])
def test_a_link_to_what_is_no_model_is_refused(llama, tmp_path, target):
    """Else a downloaded directory could carry a private file into an output that is published."""
    source = shutil.copytree(llama, tmp_path / "source")
    secret = tmp_path / target
    secret.parent.mkdir(exist_ok=True)
    secret.write_text("not yours")
    (source / "vocab.txt").unlink(missing_ok=True)
    (source / "vocab.txt").symlink_to(secret)
    with pytest.raises(InputError, match=r"vocab.txt: a symbolic link out of the checkpoint, .*; copy .*`cp -RL`"):
        loftq.quantize(source, tmp_path / "out", rank=4)
