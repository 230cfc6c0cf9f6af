"""``loftq verify`` and the reading side of ``inspect``: every kind of change is noticed, hostile manifests refused."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness import POLICY, cli, refused, run, tiny_source
from loftq.checkpoint.verify import read_manifest, verify
from loftq.errors import InputError
from loftq.formats import fsio, hashed_json


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("verify")
    run(tiny_source(root / "source"), root / "out")
    return root / "out"


@pytest.fixture
def out(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "out"))


def test_a_sound_one(out):
    ended = cli("verify", out)
    assert ended.code == 0
    assert "all good" in ended.out
    assert "12 matrices" in ended.out
    assert ended.err == ""  # a bar is shown to those who wait


def test_every_file_is_told_of_when_it_is_read(out):
    """Once for its hash, and tensors once more for their values."""
    told = []

    def begin(total):
        told.append(total)
        return lambda: told.append("read")

    manifest = verify(out, begin)
    shards = sum(name.endswith(".safetensors") for name in manifest["files"])
    assert told[0] == told.count("read") == len(manifest["files"]) + shards


def test_a_checkpoint_near_the_directory_is_named(out):
    """In a run of ``loftq train`` it is the backbone; its initialization lies in it."""
    for directory in (out.parent, out / "loftq_init"):
        refused(cli("inspect", directory), 3, f"finished; name {out}")
    far = out.parent / "other" / "far"
    far.mkdir(parents=True)
    assert refused(cli("verify", far), 3).endswith("not a directory that `loftq quantize` finished")


def flip(path, at=None):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2 if at is None else at] ^= 1
    path.write_bytes(raw)


FILES = [
    "model-00003-of-00007.safetensors",
    "model.safetensors.index.json",
    "loftq_init/adapter_model.safetensors",
    "loftq_init/adapter_config.json",
    "config.json",
    "vocab.txt",
    "1_Pooling/config.json",
    "README.md",
]


def test_these_are_all_kinds_of_file(out):
    kinds = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file() and "model-" not in p.name}
    assert kinds == {f for f in FILES if "model-" not in f} | {"loftq_manifest.json"}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("file", FILES)
def test_a_flipped_bit(out, file):
    flip(out / file)
    refused(cli("verify", out), 3, f"{file}: its bytes have changed")


@pytest.mark.slow
def test_every_byte_counts(out):
    file = out / "loftq_init" / "adapter_config.json"
    raw = file.read_bytes()
    for at in (0, *range(len(raw) // 2, len(raw), 29), len(raw) - 1):
        flip(file, at)
        with pytest.raises(InputError, match="its bytes have changed"):
            verify(out)
        file.write_bytes(raw)
    verify(out)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("file", FILES)
def test_a_missing_file(out, file):
    (out / file).unlink()
    refused(cli("verify", out), 3, f"{file}: missing")


def test_a_longer_file(out):
    with open(out / FILES[0], "ab") as file:
        file.write(b"\0")
    refused(cli("verify", out), 3, FILES[0], "bytes, the manifest says")


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "modeling_evil.py", "loftq_init/adapter_model.bin"]
)
def test_a_file_too_many(out, name):
    """A loader might prefer it to ours."""
    (out / name).write_bytes(b"")
    refused(cli("verify", out), 3, f"{name}: not in the manifest")


def test_notes_and_checkpoints_beside_it_are_fine(out):
    (out / ".gitattributes").write_text("")
    (out / "notes.md").write_text("")
    (out / "checkpoint-7").mkdir()
    (out / "checkpoint-7" / "adapter_model.safetensors").write_bytes(b"")
    assert cli("verify", out).code == 0


@pytest.mark.slow
def test_an_adapter_of_another_run(out, tmp_path, finished):
    """The same command elsewhere makes the same adapter; other options another one."""
    run(finished.parent / "source", tmp_path / "other", policy=POLICY, max_shard_bytes=1 << 30)
    for changed in ({"alpha": 8.0}, {"bits": "4"}):
        import dataclasses

        shutil.rmtree(tmp_path / "other")
        run(finished.parent / "source", tmp_path / "other", policy=dataclasses.replace(POLICY, **changed))
        shutil.copytree(tmp_path / "other" / "loftq_init", out / "loftq_init", dirs_exist_ok=True)
        if changed:
            refused(cli("verify", out), 3, "loftq_init")
        else:
            assert cli("verify", out).code == 0


def test_an_edited_shard_that_is_still_sound(out):
    tensors = load_file(out / FILES[0])
    name = next(n for n in tensors if n.endswith("weight_scale"))
    tensors[name] = tensors[name] * 2
    save_file(tensors, out / FILES[0], {"format": "pt"})
    refused(cli("verify", out), 3, FILES[0])


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("old", "new"),
    [('"kept": 2', '"kept": 1'), ('"rank": 4', '"rank": 3'), ('"format": "loftq"', '"format": "dense"')],
)
def test_an_edited_manifest(out, old, new):
    manifest = out / "loftq_manifest.json"
    assert old in manifest.read_text()
    manifest.write_text(manifest.read_text().replace(old, new, 1))
    refused(cli("verify", out), 3, "loftq_manifest.json", "was changed")
    refused(cli("inspect", out), 3, "loftq_manifest.json", "was changed")


def test_no_manifest(out):
    (out / "loftq_manifest.json").unlink()
    refused(cli("verify", out), 3, "loftq_manifest.json", "missing")


def resealed(out, change):
    """A manifest with a sound hash and other content: what a hostile one may be."""
    manifest = json.loads((out / "loftq_manifest.json").read_text())
    del manifest["sha256"]
    change(manifest)
    hashed_json.write(out / "loftq_manifest.json", manifest)


def rehash(out, *files):
    def change(manifest):
        for file in files:
            digest = fsio.sha256_file(out / file)
            manifest["files"][file] = {"size": digest.size, "sha256": digest.sha256}

    resealed(out, change)


def test_values_that_are_not_finite(out):
    file = "loftq_init/adapter_model.safetensors"
    tensors = load_file(out / file)
    name = next(iter(tensors))
    tensors[name][0, 0] = torch.nan
    save_file(tensors, out / file, {"format": "pt"})
    rehash(out, file)
    refused(cli("verify", out), 3, name, "not finite")


def test_tensors_that_do_not_fit_the_plan(out):
    tensors = load_file(out / FILES[0])
    name = next(n for n in tensors if n.endswith("weight_scale"))
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, out / FILES[0], {"format": "pt"})
    rehash(out, FILES[0])
    refused(cli("verify", out), 3, name, "the plan says")


def test_a_config_that_does_not_fit_the_plan(out):
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["groups"][0]["bits"] = 4
    (out / "config.json").write_text(json.dumps(config))
    rehash(out, "config.json")
    refused(cli("verify", out), 3, "config.json", "not those of the plan")


def put(*path, value):
    def change(manifest):
        for key in path[:-1]:
            manifest = manifest[key]
        if value is KeyError:
            del manifest[path[-1]]
        else:
            manifest[path[-1]] = value

    return change


HOSTILE = [
    put("files", value=[]),
    put("files", value=KeyError),
    put("files", "config.json", value=None),
    put("files", "../../etc/passwd", value={"size": 1, "sha256": ""}),
    put("files", "/etc/passwd", value={"size": 1, "sha256": ""}),
    put("matrices", value={}),
    put("matrices", 0, value=7),
    put("matrices", 0, "errors", value="no"),
    put("matrices", 0, "errors", value=[]),
    put("matrices", 0, "errors", value=[0.5, "x", 0.5]),
    put("matrices", 0, "kept", value=99),
    put("matrices", 0, "kept", value=-1),
    put("matrices", 0, "shape", value=[1]),
    put("matrices", 0, "name", value="\x1b[2Jboo"),
    put("matrices", 0, "qlora_error", value=None),
    put("plan", value=[]),
    put("plan", "matrices", 0, "quant", value={"bits": 2, "zap": 1}),
    put("plan", "matrices", 0, "quant", value=None),
    put("plan", "matrices", 0, "shape", value=[72, "72"]),
    put("plan", "matrices", 0, "rank", value="4"),
    put("totals", value={}),
    put("totals", "error", value="small"),
    put("identity", value=None),
    put("identity", "options", "format", value=None),
]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("change", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_manifest(out, change):
    resealed(out, change)
    with pytest.raises((InputError, ValueError)) as caught:
        verify(out)
    assert getattr(caught.value, "exit_code", None) == 3, repr(caught.value)
    assert "\x1b" not in str(caught.value)


def test_a_link_for_a_file_is_read(out, tmp_path):
    """As in the cache of the Hugging Face hub."""
    snapshot = tmp_path / "models--x" / "snapshots" / "main"
    blobs = tmp_path / "models--x" / "blobs"
    snapshot.parent.mkdir(parents=True)
    blobs.mkdir()
    out.rename(snapshot)
    for i, name in enumerate((FILES[0], FILES[2])):
        (snapshot / name).rename(blobs / str(i))
        (snapshot / name).symlink_to(blobs / str(i))
    ended = cli("verify", snapshot)
    assert ended.code == 0, ended.err


def test_a_link_that_leads_out(out, tmp_path):
    """Whoever owns its target may change it after this."""
    (out / FILES[0]).rename(tmp_path / "elsewhere")
    (out / FILES[0]).symlink_to(tmp_path / "elsewhere")
    refused(cli("verify", out), 3, FILES[0], "a symbolic link out of the checkpoint", "name that")


def test_a_directory_that_is_linked(out, tmp_path):
    (out / "loftq_init").rename(tmp_path / "elsewhere")
    (out / "loftq_init").symlink_to(tmp_path / "elsewhere")
    refused(cli("verify", out), 3, "loftq_init: a link, and not in the manifest")


@pytest.mark.parametrize("name", ["1_Pooling/sub/modeling.py", "a/b/c/model.safetensors", "loftq_init/extra/vocab.txt"])
def test_an_added_file_at_any_depth(out, name):
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_bytes(b"")
    refused(cli("verify", out), 3, f"{name}: not in the manifest")


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (os.mkdir, "a directory where a file should be"),
        (os.mkfifo, "a pipe, device or socket where a file should be"),
        (lambda path: path.symlink_to("/dev/zero"), "a symbolic link out of the checkpoint"),
        (lambda path: path.symlink_to("nowhere"), "a symbolic link that leads nowhere"),
        (lambda path: path.symlink_to("1_Pooling"), "a link where a file should be"),
    ],
    ids=["directory", "pipe", "device", "dangling", "link-to-directory"],
)
def test_no_file_where_one_should_be(out, make, word):
    (out / "config.json").unlink()
    make(out / "config.json")
    refused(cli("verify", out), 3, "config.json", word)


def test_an_added_pipe(out):
    os.mkfifo(out / "1_Pooling" / "notes.md")
    refused(cli("verify", out), 3, "1_Pooling/notes.md: a pipe, device or socket")


@pytest.mark.parametrize("absolute", [False, True])
def test_a_manifest_that_names_files_elsewhere(out, tmp_path, absolute):
    """Their bytes are as the manifest says; they are not looked at."""
    (tmp_path / "secret").write_text("x")
    digest = fsio.sha256_file(tmp_path / "secret")
    name = str(tmp_path / "secret") if absolute else "../secret"
    resealed(out, put("files", name, value={"size": digest.size, "sha256": digest.sha256}))
    refused(cli("verify", out), 3, "secret: not a name inside the directory")


@pytest.mark.sampled(5)
@pytest.mark.parametrize("verb", ["verify", "inspect"])
@pytest.mark.parametrize(
    ("change", "place"),
    [
        (put("matrices", 0, "errors", value=[0.5] * 2_000), ""),
        (put("matrices", 0, "errors", value=[0.5] * 20_000), "matrices.0.errors"),
        (put("matrices", 1, "bytes", value=-1), "matrices.1.bytes"),
        (put("matrices", 1, "rank", value=True), "matrices.1.rank"),
        (put("plan", "matrices", 0, "quant", "bits", value=5), "plan.matrices.0.quant"),
        (put("totals", "disk_bytes", value=10**90), "totals.disk_bytes"),
        (put("files", "config.json", "size", value=-5), "files.config.json.size"),
        (put("files", "a\0b", value={"size": 1, "sha256": "0" * 64}), "control character"),
        (put("identity", "options", "solve", value=[]), "identity.options.solve"),
    ],
    ids=["long", "longer", "negative", "boolean", "quant", "huge", "size", "nul", "options"],
)
def test_manifests_that_every_verb_refuses(out, verb, change, place):
    resealed(out, change)
    ended = cli(verb, out)
    if place:
        refused(ended, 3, "loftq_manifest.json", place)
    else:
        assert ended.code == 0, ended.err


@pytest.mark.parametrize("value", [None, [], {"groups": 3}, {"format_version": 1, "groups": [[]]}])
def test_a_hostile_quantization_config(out, value):
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = value
    (out / "config.json").write_text(json.dumps(config))
    rehash(out, "config.json")
    refused(cli("verify", out), 3, "config.json", "quantization_config")


def test_a_changed_hashed_json_is_refused(tmp_path):
    hashed_json.write(tmp_path / "x.json", {"a": [1, 2.5, None, "ü"]})
    assert hashed_json.load(tmp_path / "x.json")["a"] == [1, 2.5, None, "ü"]
    (tmp_path / "x.json").write_text((tmp_path / "x.json").read_text().replace("2.5", "2.50001"))
    with pytest.raises(InputError, match="was changed"):
        hashed_json.load(tmp_path / "x.json")


def test_reading_a_manifest_gives_it_all(finished):
    manifest = read_manifest(finished)
    assert len(manifest["matrices"]) == len(manifest["plan"]["matrices"]) == 12
