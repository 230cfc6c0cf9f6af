"""Results in a store: whatever stops a run, nothing half is readable as whole, and the same command continues.

The store is fsspec's in memory; ``test_s3.py`` does the same with a server.
"""

import collections
import contextlib
import dataclasses
import json
import os
import shutil
from typing import ClassVar

import fsspec
import huggingface_hub
import pytest
import transformers

import loftq
from harness import OPTIONS, cli, hooked, one_skeleton, run, tiny_source, tree
from loftq.checkpoint import quantize as module
from loftq.errors import ConflictError, InputError, StorageError, UsageError

pytestmark = pytest.mark.usefixtures("memory")
URL = "memory://bucket/made"
REQUESTS = ("list", "look", "get", "put", "remove")


class Cut(ConnectionError):
    """The network is gone."""


class Half(fsspec.get_filesystem_class("memory")):
    """A store that keeps what came before the connection broke, under the object's name."""

    protocol = "half"
    breaks = ""

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("half://"))

    def put_file(self, lpath, rpath, **rest):
        super().put_file(lpath, rpath, **rest)
        if Half.breaks and rpath.endswith(Half.breaks):
            raw = self.cat_file(rpath)
            self.pipe_file(rpath, raw[: len(raw) // 2])
            raise Cut("broken pipe")


fsspec.register_implementation("half", Half, clobber=True)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A source, and what a run makes of it on a disk."""
    place = tmp_path_factory.mktemp("local")
    source = tiny_source(place / "source")
    with one_skeleton():
        run(source, place / "out")
        yield source, tree(place / "out")


def objects(fs, directory="/bucket/made"):
    return {path.removeprefix(f"{directory}/"): fs.cat_file(path) for path in fs.find(directory)}


def check_crashed(fs, golden):
    """Without a manifest nothing is there that a loader takes for a model; with one, all of it."""
    there = objects(fs)
    if "loftq_manifest.json" in there:
        assert {name: raw for name, raw in there.items() if not name.startswith(".loftq-partial/")} == golden
        return
    with pytest.raises(InputError, match=r"nothing there|loftq_manifest\.json: missing"):
        loftq.verify(URL)
    if "config.json" in there:  # all weights are there, and only the mark of a result is not
        assert {name for name in golden if name != "loftq_manifest.json"} <= there.keys()


def test_the_same_bytes_as_on_a_disk(tmp_path, memory, local):
    source, golden = local
    puts = []
    with hooked(
        lambda op, path: puts.append(path.as_posix().removeprefix("memory:/bucket/made/")) if op == "put" else 0
    ):
        manifest = run(source, URL)
    assert objects(memory) == golden
    assert tree(tmp_path / "scratch") == {f"loftq-{os.getuid()}/": b""}
    assert loftq.verify(URL)["sha256"] == manifest["sha256"]
    assert puts[0] == ".loftq-partial/identity.json"
    assert puts[-3:] == ["model.safetensors.index.json", "config.json", "loftq_manifest.json"]
    puts.clear()
    with hooked(lambda op, path: puts.append(op) if op in ("put", "remove") else 0):
        assert run(source, URL) == manifest  # done already
    assert not puts


def test_a_finished_shard_takes_no_space_here(tmp_path, memory, local):
    """When the last shard is made, the others have gone."""
    held = []

    def measure(op, path):
        if op == "put" and "model-" in path.name:
            files = [p for p in (tmp_path / "scratch").rglob("*.safetensors") if p.is_file()]
            held.append(sum(p.stat().st_blocks > 0 for p in files if p.name.startswith("model-")))

    with hooked(measure):
        run(local[0], URL)
    assert len(held) > 3
    assert set(held) == {1}


class Turns:
    """Lets every request fail the first time that it is made: run after run, each gets one request further."""

    def __init__(self, kinds):
        self.kinds = kinds
        self.had, self.failed = set(), ""
        self.counts = collections.Counter()

    def begin(self):
        self.counts.clear()
        self.failed = ""

    def __call__(self, op, path):
        if op not in self.kinds:
            return
        self.counts[op, path.name] += 1
        turn = f"{op} {path.name} {self.counts[op, path.name]}"
        if not self.failed and turn not in self.had:
            self.failed = turn
            self.had.add(turn)
            raise Cut("connection reset by peer")


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["request", "answer"])
def test_cut_at_every_request_once(tmp_path, memory, local, lost):
    """The request does not arrive, or it does and its answer is lost. Each time the same command continues.

    An answer that is lost is no news where the request changes nothing.
    """
    source, two = local[0], {"max_shard_bytes": 30_000}
    run(source, tmp_path / "out", **two)
    kinds = REQUESTS if lost == "request" else ("put", "remove")
    golden, turns, runs = tree(tmp_path / "out"), Turns(kinds), 0
    while True:
        turns.begin()
        runs += 1
        hooks = (turns, None) if lost == "request" else (lambda op, path: None, turns)
        with contextlib.suppress(StorageError), hooked(*hooks):
            run(source, URL, **two)
            break
        check_crashed(memory, golden)
    assert objects(memory) == golden
    assert {turn.split()[0] for turn in turns.had} == set(kinds)
    assert runs == len(turns.had) + 1 > 20


def test_another_machine_continues(tmp_path, memory, local, monkeypatch):
    """The scratch directory is lost; units that the store has are not solved again."""
    source, golden = local
    solved, solve = [], module.solve_matrix
    monkeypatch.setattr(
        module, "solve_matrix", lambda matrix, *rest: (solved.append(matrix.name), solve(matrix, *rest))[1]
    )
    for lost in ("model-00002", "model-00004"):

        def cut(op, path, lost=lost):
            if op == "put" and path.name.startswith(lost):
                raise Cut("gone")

        with hooked(cut), pytest.raises(StorageError):
            run(source, URL)
        shutil.rmtree(tmp_path / "scratch")
        (tmp_path / "scratch").mkdir()
    sent = sum(
        len(json.loads(raw)["matrices"])
        for name, raw in objects(memory).items()
        if "units/" in name[:-5] and name.endswith("json")
    )
    before = len(solved)
    run(source, URL)
    assert objects(memory) == golden
    assert 0 < sent == 12 - (len(solved) - before)


def test_stores_that_keep_half_of_an_object(memory, local):
    """As some servers do: it never counts, and is made whole."""
    source, golden = local
    for name in ("identity.json", "00001-of", "00000.safetensors", "00000.json", "config.json", "loftq_manifest.json"):
        Half.breaks = next((n for n in golden if name in n), name)
        with pytest.raises(StorageError, match="broken pipe"):
            run(source, "half://bucket/made")
        with pytest.raises(InputError):
            loftq.verify("half://bucket/made")
    Half.breaks = ""
    run(source, "half://bucket/made")
    assert objects(memory) == golden


def test_a_shard_that_was_changed_is_made_again(memory, local, caplog):
    source, golden = local

    def cut(op, path):
        if op == "put" and path.name == "README.md":
            raise Cut("gone")

    with hooked(cut), pytest.raises(StorageError):
        run(source, URL)
    (first,) = memory.glob("/bucket/made/model-00001*")
    memory.pipe(first, b"x" * memory.size(first))
    run(source, URL)
    assert objects(memory) == golden


def test_an_earlier_result(memory, local):
    """Kept until the first new shard comes, and no part of it left when the new one stands."""
    source, golden = local
    other = dataclasses.replace(OPTIONS.policy, bits="4", rank="4")
    run(source, URL, policy=other, max_shard_bytes=20_000)
    old = objects(memory)
    assert old.keys() - golden.keys()
    with pytest.raises(ConflictError, match="memory://bucket/made: made by another command"):
        run(source, URL)
    assert objects(memory) == old

    def cut(op, path):
        if op == "put" and path.name == "vocab.txt":
            raise Cut("gone")

    with hooked(cut), pytest.raises(StorageError):
        run(source, URL, overwrite=True)
    with pytest.raises(InputError, match=r"loftq_manifest\.json: missing"):
        loftq.verify(URL)
    with pytest.raises(ConflictError, match=r"memory://bucket/made/\.loftq-partial: holds unfinished work of another"):
        run(source, URL, policy=other, max_shard_bytes=20_000)
    run(source, URL, overwrite=True)
    assert objects(memory) == golden


def test_what_is_not_ours_is_left_alone(memory, local):
    memory.pipe("/bucket/made/notes.txt", b"mine")
    for overwrite in (False, True):
        with pytest.raises(
            ConflictError, match="memory://bucket/made: exists and is a directory that loftq did not make"
        ):
            run(local[0], URL, overwrite=overwrite)
    assert objects(memory) == {"notes.txt": b"mine"}


def test_an_output_in_its_source(memory, local):
    memory.put(str(local[0]), "/bucket/model", recursive=True)
    for url in ("memory://bucket/model", "memory://bucket/model/made"):
        with pytest.raises(UsageError, match="is, holds or lies in the source memory://bucket/model"):
            module.quantize("memory://bucket/model", url, OPTIONS)


def test_the_command_takes_urls(memory, local, tmp_path):
    source, _ = local
    memory.put(str(source), "/bucket/model", recursive=True)
    flags = ("--bits", "2", "--rank", "4", "--steps", "1", "--workers", "1")
    ended = cli("quantize", "memory://bucket/model", "-o", URL, *flags)
    assert ended.code == 0, ended.err
    assert f"Saved to {URL}. Its README.md" in ended.out
    with pytest.raises(UsageError, match="private=True needs push_to_hub"):
        loftq.quantize(source, URL, private=True)
    with pytest.raises(UsageError, match="push_to_hub needs a directory of this machine"):
        loftq.quantize(source, URL, push_to_hub="a/b")
    with pytest.raises(UsageError, match="output nowhere://x/y: a URL, and only paths"):
        loftq.quantize(source, "nowhere://x/y")


class Hub:
    """What is asked of the hub."""

    calls: ClassVar[list] = []
    fails = ""
    files: ClassVar[tuple] = ()

    def create_repo(self, name, **options):
        return self._said("create_repo", name, **options)

    def list_repo_files(self, name):
        return list(self.files)

    def create_commit(self, name, operations, commit_message):
        self._said("create_commit", name, operations=operations)

    def _said(self, call, name, **options):
        if call == Hub.fails:
            raise OSError("401 for https://hub/api?token=hf_secret")
        Hub.calls.append((call, name, options))
        return huggingface_hub.RepoUrl(f"https://huggingface.co/org/{name.rpartition('/')[2]}")


def test_a_push_is_one_commit(tmp_path, monkeypatch, local):
    """Of exactly the result's files; old weights go in the same commit. A failure loses nothing."""
    source, golden = local
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    monkeypatch.setattr(Hub, "fails", "create_repo")
    with pytest.raises(StorageError, match="hf auth login") as caught:
        run(source, tmp_path / "out", push_to_hub="org/made", private=True)
    assert "secret" not in str(caught.value)
    assert not (tmp_path / "out").exists()  # told before any work
    Hub.fails = "create_commit"
    with pytest.raises(StorageError, match="what is made is kept"):
        run(source, tmp_path / "out", push_to_hub="made", private=True)
    (tmp_path / "out" / "notes.md").write_text("mine")
    Hub.fails, Hub.files = "", ("model-00001-of-00009.safetensors", "loftq_init/old", "notes.md", "config.json")
    Hub.calls.clear()
    run(source, tmp_path / "out", push_to_hub="org/made", private=True)
    (create, _, private), (commit, name, asked) = Hub.calls
    assert (create, private["private"], commit, name) == ("create_repo", True, "create_commit", "org/made")
    added = {o.path_in_repo for o in asked["operations"] if isinstance(o, huggingface_hub.CommitOperationAdd)}
    removed = {o.path_in_repo for o in asked["operations"] if isinstance(o, huggingface_hub.CommitOperationDelete)}
    assert added == golden.keys()
    assert removed == {"model-00001-of-00009.safetensors", "loftq_init/old"}
    with pytest.raises(UsageError, match="no name of the hub"):
        run(source, tmp_path / "out", push_to_hub="a/b/c")


def test_what_is_in_a_store_can_be_loaded(tmp_path, memory, local):
    """Fetched with the store's own tools, it is any other result."""
    run(local[0], URL)
    memory.get("/bucket/made/", str(tmp_path / "fetched"), recursive=True)
    loftq.verify(tmp_path / "fetched")
    assert json.loads((tmp_path / "fetched" / "config.json").read_bytes())["quantization_config"]
    transformers.AutoModel.from_pretrained(tmp_path / "fetched")
