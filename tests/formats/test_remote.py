"""Checkpoints in a store: read in ranges, as they are now, and never half. The store is fsspec's, in memory."""

import json

import fsspec
import pytest
import torch

import loftq
import models
from harness import cli, hooked, refused, run, tiny_source, tree
from loftq.errors import InputError, StorageError, UsageError
from loftq.formats import remote
from loftq.formats.source import open_checkpoint
from loftq.sources.checkpoint import hub_id

pytestmark = pytest.mark.usefixtures("memory")
URL = "memory://bucket/model"


class Late(fsspec.get_filesystem_class("memory")):
    """A store whose listings do not have yet what was written last."""

    protocol = "late"
    unlisted = ()
    refused = ""

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("late://"))

    def ls(self, path, detail=True, **kwargs):
        if self.refused and path.endswith(self.refused):
            raise PermissionError("AccessDenied")
        found = super().ls(path, detail=True, **kwargs)
        left = [info for info in found if not info["name"].endswith(self.unlisted)]
        return left if detail else [info["name"] for info in left]


fsspec.register_implementation("late", Late, clobber=True)


@pytest.fixture
def source(tmp_path, memory):
    made = tiny_source(tmp_path / "source")
    memory.put(str(made), "/bucket/model", recursive=True)
    return made


def test_the_same_bytes_as_from_a_disk(tmp_path, source, memory, monkeypatch):
    """Weights come in ranges, once, and none of them stays on this machine's disk."""
    run(source, tmp_path / "local")
    monkeypatch.setattr(remote, "RANGE", 1000)
    asked, cat_file = [], type(memory).cat_file

    def counted(self, path, start=None, end=None, **rest):
        asked.append((path.rpartition("/")[2], start, end))
        return cat_file(self, path, start, end, **rest)

    monkeypatch.setattr(type(memory), "cat_file", counted)
    run(URL, tmp_path / "streamed")
    local, streamed = tree(tmp_path / "local"), tree(tmp_path / "streamed")
    assert local.keys() == streamed.keys()
    assert [name for name, raw in local.items() if streamed[name] != raw] == [
        "loftq_manifest.json"
    ]  # the source's times
    ranges = [(start, end) for name, start, end in asked if name == "model.safetensors"]
    assert max(end - start for start, end in ranges) <= 1000
    size = memory.size("/bucket/model/model.safetensors")
    assert sum(end - start for start, end in ranges) < 1.2 * size  # its header and its first bytes twice
    (hole,) = (tmp_path / "scratch").rglob("model.safetensors")
    assert hole.stat().st_size == size
    assert hole.stat().st_blocks == 0


def test_pickles_are_read_where_they_are(tmp_path, memory, monkeypatch):
    torch.save({"a": torch.arange(50_000.0), "b": torch.ones(3)}, tmp_path / "pytorch_model.bin")
    memory.put(str(tmp_path / "pytorch_model.bin"), "/bucket/old/pytorch_model.bin")
    directory = remote.directory_of("MODEL", "memory://bucket/old")
    assert torch.equal(open_checkpoint(directory).read("a"), torch.arange(50_000.0))
    assert (directory / "pytorch_model.bin").stat().st_blocks == 0


def test_verbs_on_a_store(tmp_path, source, memory):
    run(source, tmp_path / "made")
    memory.put(str(tmp_path / "made"), "/bucket/made", recursive=True)
    ended = cli("verify", "memory://bucket/made")
    assert (ended.code, ended.out[:27]) == (0, "memory://bucket/made: 14 fi"), ended
    assert json.loads(cli("inspect", "memory://bucket/made", "--json").out)["totals"]["matrices"] == 12
    assert json.loads(cli("plan", URL, "--rank", "4", "--json").out)["coverage"] == 1
    assert loftq.verify("memory://bucket/made")["files"] == loftq.verify(tmp_path / "made")["files"]
    memory.pipe("/bucket/made/vocab.txt", b"[PAD]\nworm\n")
    refused(
        cli("verify", "memory://bucket/made"), 3, "memory://bucket/made: vocab.txt: its bytes have changed (sha256)"
    )
    memory.pipe("/bucket/made/stranger.bin", b"?")
    refused(cli("verify", "memory://bucket/made"), 3, "stranger.bin: not in the manifest")


def test_a_listing_may_be_late(tmp_path, source, memory):
    """What an index or a manifest names is asked for by its name."""
    run(source, tmp_path / "made")
    memory.put(str(tmp_path / "made"), "/bucket/made", recursive=True)
    Late.unlisted = ("json", "safetensors")
    assert loftq.verify("late://bucket/made")["files"].keys() == loftq.verify(tmp_path / "made")["files"].keys()
    assert loftq.plan("late://bucket/model", rank=4).coverage == 1
    Late.unlisted = ()


def test_a_changed_object_is_noticed(tmp_path, source, memory):
    directory = remote.directory_of("MODEL", URL)
    checkpoint = open_checkpoint(directory)
    name = next(iter(checkpoint.tensors))
    checkpoint.read(name)
    raw = memory.cat("/bucket/model/model.safetensors")
    memory.pipe("/bucket/model/model.safetensors", raw)
    with pytest.raises(InputError, match=f"{URL}/model.safetensors: source changed while reading"):
        checkpoint.read(name)
    memory.rm("/bucket/model/model.safetensors")
    with pytest.raises(InputError, match="source changed while reading"):
        checkpoint.read(name)
    assert remote.directory_of("MODEL", URL) != directory  # of what is there now


def test_a_store_that_does_not_answer_says_nothing_of_the_source(tmp_path, source):
    """A run whose last look at the source fails stays as it is, to be continued."""
    looks = []

    def cut(op, path):
        if op == "look" and (tmp_path / "out.loftq-partial" / "output" / "README.md").exists():
            looks.append(path)
            raise ConnectionError("connection reset")

    with hooked(cut), pytest.raises(StorageError, match="run the same command again"):
        run(URL, tmp_path / "out")
    assert looks
    assert (tmp_path / "out.loftq-partial" / "identity.json").exists()
    run(URL, tmp_path / "out")
    loftq.verify(tmp_path / "out")


@pytest.mark.parametrize("op", ["list", "look", "get"])
def test_a_request_that_fails_is_one_line(op, source):
    def cut(called, path):
        if called == op:
            raise OSError("no route to https://user:secret@host/x?X-Amz-Signature=secret (timed out)")

    with hooked(cut), pytest.raises(StorageError, match=rf"memory://bucket/model.*: {op} failed \(no route") as caught:
        loftq.plan(URL, rank=4)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("directory", ["model", "1_Pooling"])
def test_a_directory_that_cannot_be_listed_is_not_left_out(directory, source, monkeypatch):
    """Without its files a model would be another one, or none."""
    monkeypatch.setattr(Late, "refused", directory)
    with pytest.raises(StorageError, match=r"late://bucket/model: list was refused \(AccessDenied\).*credentials"):
        loftq.plan("late://bucket/model", rank=4)


def test_names_that_lead_out_of_a_directory(tmp_path, memory):
    fs = fsspec.filesystem("memory")
    for name in ("../evil", "a//b", "x\ny", "n" * 300, "both", "both/inner"):
        fs.store[f"/bucket/odd/{name}"] = fs.store.get("x") or _object(fs, name)
    found = remote.store("MODEL", "memory://bucket/odd").objects()
    assert set(found) <= {"both", "both/inner"}
    assert len(found) <= 1
    assert not (tmp_path / "evil").exists()


def _object(fs, name):
    from fsspec.implementations.memory import MemoryFile

    return MemoryFile(fs, name, b"x")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("memory://bucket/nothing", "memory://bucket/nothing: nothing there; check the URL"),
        ("s3://key:secret@bucket/model", "leave user, keys and `?…` out"),
        ("s3://bucket/model?sig=secret", "leave user, keys and `?…` out"),
        ("nowhere://bucket/model", "a URL, and only paths of this machine are read"),
        ("simplecache::s3://bucket/model", "a URL, and only paths of this machine are read"),
        ("memory://", "names no directory; wanted memory://place/name"),
        ("memory:", "names no directory; wanted memory://place/name"),  # a Path("memory://")
        ("memory://bucket/../x", "names no directory"),
    ],
)
def test_what_no_url_is(url, words):
    for call in (loftq.verify, loftq.inspect, lambda url: loftq.plan(url, rank=4)):
        with pytest.raises((InputError, UsageError), match=words.replace("?", r"\?")) as caught:
            call(url)
        assert "secret" not in str(caught.value)


def test_a_package_that_is_missing(monkeypatch):
    """fsspec knows the scheme, and its package is not there."""

    def missing(*_, **__):
        raise ImportError("Install adlfs to access Azure Datalake Gen2 and Azure Blob Storage")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(UsageError, match=r"pip install 'loftq\[s3\]'"):
        loftq.verify("s3://bucket/missing")
    with pytest.raises(UsageError, match="not installed: Install adlfs"):
        loftq.verify("abfs://bucket/missing")


def test_revisions_and_names(source, tmp_path):
    with pytest.raises(UsageError, match="hf://org/name@REVISION"):
        loftq.plan(URL, rank=4, revision="main")
    assert hub_id("hf://org/name@v1") == "org/name"
    assert hub_id("s3://org/name") is None
    assert hub_id("org/name") == "org/name"
    assert hub_id(str(source)) is None
    assert loftq.plan(f"file://{source}", rank=4).coverage == 1


def test_a_scratch_directory_is_this_users_alone(tmp_path, source, monkeypatch):
    import os

    (tmp_path / "scratch" / f"loftq-{os.getuid()}").mkdir(mode=0o777)
    (tmp_path / "scratch" / f"loftq-{os.getuid()}").chmod(0o777)
    with pytest.raises(StorageError, match="not a directory of this user alone"):
        loftq.plan(URL, rank=4)


def test_stacks_of_a_model_in_shards(tmp_path, memory, monkeypatch):
    """An index, several shards, and a tokenizer: as they would lie in a bucket."""
    models.tiny("llama").save_pretrained(tmp_path / "llama", max_shard_size="40KB")
    memory.put(str(tmp_path / "llama"), "/bucket/llama", recursive=True)
    assert len(list((tmp_path / "llama").glob("*.safetensors"))) > 2
    looked = []
    with hooked(lambda op, path: looked.append(path.name) if op == "look" else None):
        there = loftq.plan("memory://bucket/llama", rank=4)
    here = loftq.plan(tmp_path / "llama", rank=4)
    assert not [name for name in looked if "layers" in name]  # a tensor is no file
    assert there.digest() == here.digest()
