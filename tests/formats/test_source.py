"""Checkpoint directories: what is found, in which order, and every lie an index can tell."""

import json
import logging
import os
import re
import threading

import pytest
import torch
from blobs import blob, honest, put, saved

from loftq.errors import InputError, StorageError
from loftq.formats import source, tensorfile
from loftq.formats.source import is_quantized_source, open_checkpoint
from loftq.formats.tensorfile import TensorInfo

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def shard(*names):
    """A safetensors file whose tensors ``names`` are bytes 0, 1, 2, ..."""
    header = {n: {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i, n in enumerate(names)}
    return blob(header, bytes(range(len(names))))


def index(weight_map, **metadata):
    """Bytes of an index."""
    return json.dumps({"metadata": metadata, "weight_map": weight_map}).encode()


@pytest.fixture
def sharded(tmp_path):
    """A sound checkpoint of two shards with tensors a, b and c."""
    put(tmp_path / FIRST, shard("c", "a"))
    put(tmp_path / SECOND, shard("b"))
    put(tmp_path / INDEX, index({"a": FIRST, "c": FIRST, "b": SECOND}, total_size=3))
    return tmp_path


@pytest.fixture
def binary(tmp_path):
    """The same for ``.bin``."""
    one, two = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"
    put(tmp_path / one, saved({"c": torch.ones(2, 3), "a": torch.arange(4, dtype=torch.bfloat16)}))
    put(tmp_path / two, saved({"b": torch.zeros(2, dtype=torch.int8)}))
    put(tmp_path / "pytorch_model.bin.index.json", index({"a": one, "c": one, "b": two}))
    return tmp_path


def test_single_file(tmp_path):
    put(tmp_path / "model.safetensors", honest())
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.kind == "safetensors"
    assert checkpoint.directory == tmp_path
    assert list(checkpoint.tensors) == ["a", "b.weight", "empty", "scalar"]
    assert checkpoint.read("scalar").item() == 22
    assert b"".join(checkpoint.chunks("a")) == bytes(range(16))


def test_a_sharded_checkpoint_is_read(sharded, caplog):
    checkpoint = open_checkpoint(sharded)
    assert list(checkpoint.tensors) == ["a", "b", "c"]
    assert [f.name for f in checkpoint.files] == [FIRST, SECOND]
    assert checkpoint.files[1].header_sha256 == tensorfile.read_header(sharded / SECOND).header_sha256
    assert checkpoint.files[1].size == (sharded / SECOND).stat().st_size
    assert [checkpoint.read(name).item() for name in "abc"] == [1, 0, 0]
    assert caplog.text == ""


def test_binary_shards(binary):
    checkpoint = open_checkpoint(binary)
    assert checkpoint.kind == "pickle"
    assert [(i.name, i.dtype, i.shape, i.nbytes) for i in checkpoint.tensors.values()] == [
        ("a", "BF16", (4,), 8),
        ("b", "I8", (2,), 2),
        ("c", "F32", (2, 3), 24),
    ]
    assert torch.equal(checkpoint.read("a"), torch.arange(4, dtype=torch.bfloat16))
    assert b"".join(checkpoint.chunks("c")) == torch.ones(6).numpy().tobytes()
    checkpoint.read("a").zero_()
    assert checkpoint.read("a").any(), "a reader changed the tensor for the next one"


def test_one_binary_shard_in_memory_at_a_time(binary, monkeypatch):
    checkpoint = open_checkpoint(binary)
    loads, real = [], source.read_pickle_tensors

    def load(path, **options):
        assert checkpoint._loaded._tensors == {}
        loads.append(path.name[:19])
        return real(path, **options)

    monkeypatch.setattr(source, "read_pickle_tensors", load)
    for name in "acbba":
        checkpoint.read(name)
    assert loads == ["pytorch_model-00001", "pytorch_model-00002", "pytorch_model-00001"]


@pytest.mark.parametrize("kind", ["sharded", "binary"])
def test_read_from_many_threads(kind, request):
    checkpoint = open_checkpoint(request.getfixturevalue(kind))
    wanted = {name: checkpoint.read(name) for name in checkpoint.tensors}
    wrong = []

    def work(seed):
        for k in range(30):
            name = "abc"[(seed + k) % 3]
            if not torch.equal(checkpoint.read(name), wanted[name]):
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_binary_changed_after_opening(binary):
    checkpoint = open_checkpoint(binary)
    os.utime(binary / "pytorch_model-00002-of-00002.bin", ns=(0, 1))
    with pytest.raises(InputError, match=r"source changed while reading"):
        checkpoint.read("b")
    assert checkpoint.read("a").any()


def test_safetensors_changed_after_opening(sharded):
    checkpoint = open_checkpoint(sharded)
    put(sharded / SECOND, shard("b", "d"))
    with pytest.raises(InputError, match=f"{SECOND}: source changed while reading"):
        checkpoint.read("b")


def test_unknown_tensor(sharded):
    checkpoint = open_checkpoint(sharded)
    for read in (checkpoint.read, lambda name: list(checkpoint.chunks(name))):
        with pytest.raises(InputError, match=r"no tensor x; check the name"):
            read("x")


def test_safetensors_win_and_it_is_said(sharded, caplog):
    caplog.set_level(logging.INFO, "loftq")
    put(sharded / "pytorch_model.bin", b"never opened")
    assert open_checkpoint(sharded).kind == "safetensors"
    assert "using safetensors, not the .bin files beside them" in caplog.text


@pytest.mark.parametrize("single", ["model.safetensors", "pytorch_model.bin"])
def test_file_and_index_together(tmp_path, single):
    put(tmp_path / single, b"")
    put(tmp_path / f"{single}.index.json", b"")
    with pytest.raises(InputError, match=f"both {single} and {single}.index.json are there; remove the one"):
        open_checkpoint(tmp_path)


LOOKED_FOR = r"model.safetensors\(.index.json\) or pytorch_model.bin\(.index.json\)"


@pytest.mark.parametrize(
    ("names", "why"),
    [
        ([], "found none of them; fetch the weights"),
        (["config.json"], "found none of them"),
        (["model.gguf", "config.json"], "found GGUF only; start from the original checkpoint"),
        ([FIRST, "config.json"], "found shards without an index; fetch the index"),
        (["pytorch_model-00001-of-00002.bin"], "found shards without an index"),
    ],
)
def test_nothing_to_open(tmp_path, names, why):
    for name in names:
        put(tmp_path / name, b"")
    with pytest.raises(InputError, match=f"no checkpoint; looked for {LOOKED_FOR}, {why}"):
        open_checkpoint(tmp_path)


def test_a_file_or_nothing_instead_of_a_directory(tmp_path):
    with pytest.raises(InputError, match=f"x: no such directory; wanted a local directory with {LOOKED_FOR}"):
        open_checkpoint(tmp_path / "x")
    with pytest.raises(InputError, match=r"model.safetensors: a file; wanted a local directory"):
        open_checkpoint(put(tmp_path / "model.safetensors", honest()))


def test_unlistable_directory(tmp_path, monkeypatch):
    def fail(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(source.os, "listdir", fail)
    with pytest.raises(StorageError, match=r"cannot be listed .Permission denied."):
        open_checkpoint(tmp_path)


FILE_NAMES = {
    "parent": "../x.safetensors",
    "parents": "../../../../etc/x.safetensors",
    "absolute": "/etc/x.safetensors",
    "drive": "C:x.safetensors",
    "unc": "\\\\host\\x.safetensors",
    "windows-parent": "..\\x.safetensors",
    "folder": "a/b.safetensors",
    "nul": "a\0.safetensors",
    "newline": "a\n.safetensors",
    "escape": "\x1b[2J.safetensors",
    "empty": "",
    "dot": ".",
    "dots": "..",
    "only-ending": ".safetensors",
    "bin": "pytorch_model.bin",
    "no-ending": "model",
    "upper-ending": "MODEL.SAFETENSORS",
    "ending-inside": "x.safetensors.py",
    "long": "x" * 250 + ".safetensors",
    "number": 3,
    "null": None,
    "list": [FIRST],
    "object": {"file": FIRST},
}


@pytest.mark.parametrize("name", FILE_NAMES)
def test_file_names_in_the_index_are_refused_before_any_shard_is_opened(sharded, monkeypatch, name):
    put(sharded / INDEX, index({"a": FIRST, "c": FIRST, "b": FILE_NAMES[name]}))
    monkeypatch.setattr(source, "read_header", lambda path: pytest.fail(f"opened {path}"))
    with pytest.raises(InputError, match=r"b: file name .*; wanted a plain name ending in .safetensors") as caught:
        open_checkpoint(sharded)
    message = str(caught.value)
    assert message.startswith(str(sharded / INDEX))
    assert "\n" not in message
    assert "\x1b" not in message


def test_case_twins(sharded):
    put(sharded / INDEX, index({"a": FIRST, "b": FIRST.replace("model", "Model")}))
    with pytest.raises(InputError, match=f"file names '?Model.* and '?{FIRST}'? differ only by case"):
        open_checkpoint(sharded)


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"[]", "wanted a JSON object, got list"),
        (b"{}", "weight_map must map tensor to file, got NoneType"),
        (b'{"weight_map": {}}', "weight_map must map tensor to file, got an empty one"),
        (b'{"weight_map": [1]}', "weight_map must map tensor to file, got list"),
        (b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "duplicate name 'a'"),
        (b'{"weight_map": {"a\\n": "x.safetensors"}}', r"a\\n: control character in the name"),
        (b'{"weight_map": {"": "x.safetensors"}}', "empty name"),
        (b'{"weight_map": NaN}', "NaN is not a JSON number"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        (b"", "not strict JSON"),
    ],
)
def test_hostile_index(sharded, raw, why):
    put(sharded / INDEX, raw)
    with pytest.raises(InputError, match=f"{INDEX}: .*{why}"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("name", [INDEX, FIRST])
def test_pipes_do_not_hang(sharded, name):
    (sharded / name).unlink()
    os.mkfifo(sharded / name)
    with pytest.raises(InputError, match=f"{name}: not a regular file"):
        open_checkpoint(sharded)


def test_all_disagreements_in_one_message(tmp_path):
    put(tmp_path / FIRST, shard("a", "twice", "extra"))
    put(tmp_path / SECOND, shard("b", "twice"))
    weight_map = {"a": FIRST, "twice": FIRST, "b": FIRST, "lost": SECOND, "c": "gone.safetensors"}
    put(tmp_path / INDEX, index(weight_map))
    with pytest.raises(InputError) as caught:
        open_checkpoint(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / INDEX}: missing files: gone.safetensors;"
        " tensors not in the file the index names: b, lost;"
        f" tensors in two files: twice ({FIRST}, {SECOND});"
        " tensors not in the index: extra; fetch the checkpoint again or repair the index"
    )


def test_many_missing_files_are_cut_short(tmp_path):
    put(tmp_path / INDEX, index({f"t{i:02}": f"s{i:02}.safetensors" for i in range(14)}))
    with pytest.raises(InputError, match=r"missing files: s00.safetensors, .*s09.safetensors and 4 more;"):
        open_checkpoint(tmp_path)


def test_missing_binary_shard(binary):
    (binary / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(InputError, match=r"missing files: pytorch_model-00002-of-00002.bin"):
        open_checkpoint(binary)


def test_damaged_shard_names_shard_and_tensor(sharded):
    put(sharded / SECOND, shard("b")[:-1])
    with pytest.raises(InputError, match=f"{SECOND}: header and tensors cover"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("total", [4, -1, "3", 3.5, True, []])
def test_wrong_total_size_is_a_warning(sharded, caplog, total):
    put(sharded / INDEX, index({"a": FIRST, "c": FIRST, "b": SECOND}, total_size=total))
    assert len(open_checkpoint(sharded).tensors) == 3
    assert "total_size is" in caplog.text
    assert "the tensors have 3 bytes" in caplog.text


@pytest.mark.parametrize("metadata", [None, [], {"total_size": 3.0}, {"format": "pt"}])
def test_odd_index_metadata_is_let_pass(sharded, caplog, metadata):
    content = {"weight_map": {"a": FIRST, "c": FIRST, "b": SECOND}, "metadata": metadata, "more": 1}
    put(sharded / INDEX, json.dumps(content).encode())
    open_checkpoint(sharded)
    assert caplog.text == ""


def move(path, target):
    """Replace ``path`` by a link to its content at ``target``."""
    target.parent.mkdir(parents=True, exist_ok=True)
    path.rename(target)
    path.symlink_to(os.path.relpath(target, path.parent))


@pytest.mark.parametrize("name", [INDEX, FIRST])
def test_link_inside_is_followed(sharded, name):
    move(sharded / name, sharded / "deep" / "x")
    assert open_checkpoint(sharded).read("a").item() == 1


@pytest.mark.parametrize("name", [INDEX, FIRST])
def test_link_outside_is_refused(sharded, tmp_path_factory, name):
    move(sharded / name, tmp_path_factory.mktemp("outside") / "x")
    with pytest.raises(InputError, match=f"{name}: a symbolic link out of the checkpoint, to .*/outside./x; copy"):
        open_checkpoint(sharded)


def test_link_to_a_sibling_with_the_same_prefix_is_outside(tmp_path):
    home = tmp_path / "model"
    home.mkdir()
    (tmp_path / "model-evil").mkdir()
    put(tmp_path / "model-evil" / "x", honest())
    (home / "model.safetensors").symlink_to("../model-evil/x")
    with pytest.raises(InputError, match=r"a symbolic link out of the checkpoint"):
        open_checkpoint(home)


@pytest.mark.parametrize("through", [False, True], ids=["direct", "through-a-link"])
def test_hub_cache_layout(sharded, tmp_path_factory, through):
    repository = tmp_path_factory.mktemp("cache") / "models--org--name"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for name in (INDEX, FIRST, SECOND):
        (sharded / name).rename(snapshot / name)
        move(snapshot / name, repository / "blobs" / f"sha-of-{name}")
    directory = snapshot
    if through:
        directory = repository.parent / "link"
        directory.symlink_to(snapshot)
    checkpoint = open_checkpoint(directory)
    assert [f.name for f in checkpoint.files] == [FIRST, SECOND]
    assert checkpoint.read("a").item() == 1
    move(repository / "blobs" / f"sha-of-{FIRST}", repository.parent / "models--other" / "blobs" / "x")
    with pytest.raises(InputError, match=r"a symbolic link out of the checkpoint"):
        open_checkpoint(directory)


@pytest.mark.parametrize("target", ["nowhere", FIRST], ids=["dangling", "loop"])
def test_link_to_nowhere(sharded, target):
    (sharded / FIRST).unlink()
    (sharded / FIRST).symlink_to(target)
    with pytest.raises(InputError, match=f"{FIRST}: a symbolic link that leads nowhere"):
        open_checkpoint(sharded)


def infos(**dtypes):
    """Tensors by name; ``__`` stands for a dot."""
    names = {name.replace("__", "."): dtype for name, dtype in dtypes.items()}
    return {n: TensorInfo(n, d, (1,), 1, 0, 1, None) for n, d in names.items()}


@pytest.mark.parametrize(
    ("tensors", "method"),
    [
        (infos(m__weight="F32", m__bias="F32"), None),
        (infos(m__weight="F8_E4M3", m__weight_scale="F32"), None),
        (infos(m__weight="F8_E4M3", m__weight_scale_inv="F32"), None),
        (infos(m__weight_scale="F32"), None),
        (infos(attention__W_q="F32", x__codebooks="F32", vision_blocks="F32"), None),
        (infos(m__weight_packed="I32", m__weight_scale="BF16"), r"compressed-tensors \(tensor m.weight_packed\)"),
        (infos(m__weight="I8", m__weight_scale="BF16"), "loftq or compressed-tensors .*m.weight_scale beside I8"),
        (infos(m__weight="U8", m__weight_scale="F8_E4M3"), "compressed-tensors .*beside U8"),
        (infos(m__qweight="I32", m__qzeros="I32", m__scales="F16"), "GPTQ or AWQ"),
        (infos(m__weight="U8", m__weight__absmax="F32"), "bitsandbytes 4-bit"),
        (infos(m__weight="I8", m__SCB="F32"), "bitsandbytes 8-bit"),
        (infos(m__W_q="U8", m__scale="F16"), "HQQ"),
        (infos(m__codes="I8", m__codebooks="F16"), "AQLM"),
        (infos(e__gate_up_proj_blocks="U8", e__gate_up_proj_scales="U8"), "MXFP4"),
    ],
)
def test_quantized_sources_are_recognised(tensors, method):
    found = is_quantized_source(tensors)
    assert found is None if method is None else re.search(method, found)


def test_quant_state_of_bitsandbytes():
    name = "m.weight.quant_state.bitsandbytes__nf4"
    assert is_quantized_source({name: TensorInfo(name, "U8", (1,), 1, 0, 1, None)}).startswith("bitsandbytes 4-bit")
