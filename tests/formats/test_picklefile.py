"""``.bin`` files: gadgets that must never run, archives that lie, tensors that are not what they seem."""

import builtins
import collections
import functools
import io
import os
import pathlib
import pickle
import re
import struct
import subprocess
import tarfile
import zipfile

import pytest
import torch
from blobs import Calls, Storage, archive, dumped, pickled, put, saved, view

from loftq.errors import InputError, StorageError, UsageError
from loftq.formats import picklefile
from loftq.formats.picklefile import read_pickle_tensors
from loftq.formats.regular import open_regular

EIGHT = b"\0" * 8


def rebuilt(offset=0, shape=(2,), strides=(1,), numel=2, data=EIGHT):
    """An archive with one float32 view ``w``."""
    return pickled(dumped({"w": view(Storage("0", numel), offset, shape, strides)}), **{"0": data})


def test_reads_what_torch_saves(tmp_path, caplog):
    tensors = {
        "a": torch.arange(6.0).reshape(2, 3),
        "bf16": torch.ones(3, dtype=torch.bfloat16),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "transposed": torch.arange(6.0).reshape(2, 3).t(),
        "part": torch.arange(10.0)[2:5],
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(7),
    }
    read = read_pickle_tensors(put(tmp_path / "x.bin", saved(tensors)))
    assert read.keys() == tensors.keys()
    for name, tensor in read.items():
        assert type(tensor) is torch.Tensor
        assert tensor.is_contiguous()
        assert not tensor.requires_grad
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
        assert torch.equal(tensor, tensors[name].detach())
    assert "x.bin: a pickle; safetensors is safer" in caplog.text


def test_reads_a_module_and_one_level_of_state_dict(tmp_path):
    state = torch.nn.Linear(2, 3).state_dict()
    assert state._metadata
    for obj in (state, {"state_dict": state}):
        read = read_pickle_tensors(put(tmp_path / "x.bin", saved(obj)))
        assert {name: tuple(t.shape) for name, t in read.items()} == {"weight": (3, 2), "bias": (3,)}


def test_tied_weights_stay_cheap(tmp_path):
    weight = torch.ones(100, 10)
    raw = saved({f"w{i}": weight for i in range(50)})
    assert len(read_pickle_tensors(put(tmp_path / "x.bin", raw))) == 50


GADGETS = {
    "os.system": lambda c: Calls(os.system, f"touch {c}"),
    "posix.open": lambda c: Calls(os.open, str(c), os.O_CREAT | os.O_WRONLY),
    "mkdir": lambda c: Calls(os.mkdir, str(c)),
    "eval": lambda c: Calls(eval, f"open({str(c)!r}, 'w')"),
    "exec": lambda c: Calls(exec, f"open({str(c)!r}, 'w')"),
    "open": lambda c: Calls(open, str(c), "w"),
    "io.open": lambda c: Calls(io.FileIO, str(c), "w"),
    "getattr": lambda c: Calls(Calls(getattr, pathlib.Path(c), "touch")),
    "import": lambda c: Calls(builtins.__import__, "os"),
    "subprocess": lambda c: Calls(subprocess.check_output, ["touch", str(c)]),
    "popen": lambda c: Calls(subprocess.Popen, ["touch", str(c)]),
    "path": lambda c: Calls(pathlib.Path.touch, pathlib.Path(c)),
    "partial": lambda c: Calls(functools.partial(os.mkdir, str(c))),
    "reduce": lambda c: Calls(functools.reduce, os.mkdir, [str(c)]),
    "map": lambda c: Calls(list, Calls(map, os.mkdir, [str(c)])),
    "defaultdict": lambda c: Calls(collections.defaultdict, os.getcwd),
    "inner-pickle": lambda c: Calls(pickle.loads, pickle.dumps(Calls(os.mkdir, str(c)))),
    "torch.load": lambda c: Calls(torch.load, str(c)),
    "torch.hub": lambda c: Calls(torch.hub.load_state_dict_from_url, "http://localhost:9/x"),
    "torch.save": lambda c: Calls(torch.save, 1, str(c)),
    "jit": lambda c: Calls(torch.jit.load, str(c)),
}


@pytest.mark.parametrize("placed", ["root", "value", "key-path", "beside-a-tensor"])
@pytest.mark.parametrize("gadget", GADGETS)
def test_gadget_is_refused_and_never_runs(tmp_path, gadget, placed):
    canary = tmp_path / "canary"
    call = GADGETS[gadget](canary)
    obj = {
        "root": call,
        "value": {"w": call},
        "key-path": {"state_dict": {"w": call}},
        "beside-a-tensor": {"w": view(Storage("0", 2), 0, (2,), (1,)), "x": [{"y": (call,)}]},
    }[placed]
    path = put(tmp_path / "x.bin", pickled(dumped(obj), **{"0": EIGHT}))
    with pytest.raises(InputError, match=r"x.bin: the pickle calls [\w.]+, which is more than tensors") as caught:
        read_pickle_tensors(path)
    assert not canary.exists()
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value), "the advice of torch to switch the check off got through"
    assert "convert it to safetensors where you trust it" in str(caught.value)


def test_gadget_name_is_told(tmp_path):
    path = put(tmp_path / "x.bin", pickled(dumped({"w": Calls(os.system, "true")})))
    with pytest.raises(InputError, match=r"calls (posix|nt)\.system, which"):
        read_pickle_tensors(path)


OPCODES = {
    "nested-global": b"\x80\x02ctorch\nserialization.os.system\nq\x00X\x04\x00\x00\x00true\x85R.",
    "stack-global": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
    "inst": b"(S'true'\nios\nsystem\n.",
    "obj": b"(cos\nsystem\nS'true'\no.",
    "extension": b"\x80\x02\x82\x01.",
    "empty": b"",
    "no-stop": b"\x80\x02}",
    "no-memo": b"\x80\x02h\x05.",
    "underflow": b"\x80\x02R.",
    "cut-string": b"\x80\x02X\xff\xff\xff\x7fab",
    "unknown-opcode": b"\x80\x02\xff.",
    "persid": b"\x80\x02K\x01Q.",
    "no-record": dumped({"w": view(Storage("missing", 2), 0, (2,), (1,))}),
    "climbing-record": dumped({"w": view(Storage("../../version", 2), 0, (2,), (1,))}),
}


@pytest.mark.parametrize("raw", OPCODES.values(), ids=OPCODES)
def test_hand_made_pickles_end_in_one_line(tmp_path, raw):
    with pytest.raises(InputError) as caught:
        read_pickle_tensors(put(tmp_path / "x.bin", pickled(raw)))
    assert "\n" not in str(caught.value)


def test_environment_cannot_switch_the_check_off(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    canary = tmp_path / "canary"
    with pytest.raises(InputError, match=r"more than tensors"):
        read_pickle_tensors(put(tmp_path / "x.bin", pickled(dumped(Calls(os.mkdir, str(canary))))))
    assert not canary.exists()


def tar():
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as out:
        info = tarfile.TarInfo("storages")
        info.size = 4
        out.addfile(info, io.BytesIO(b"abcd"))
    return stream.getvalue()


def torchscript():
    return archive({"x/data.pkl": b"\x80\x02}.", "x/constants.pkl": b"\x80\x02).", "x/code/__torch__.py": b""})


def compressed():
    return archive({"archive/data.pkl": b"\x80\x02}." + b"0" * 10**7}, zipfile.ZIP_DEFLATED)


def twice(raw, old, new):
    """``raw`` with the zip record name ``old`` changed to ``new`` of the same length, in both places."""
    assert len(old) == len(new)
    assert raw.count(old) == 2
    return raw.replace(old, new)


def directory_entry(raw, name, at, layout, value):
    """``raw`` with one field of the central directory entry of ``name`` overwritten."""
    start = raw.rindex(b"PK\x01\x02", 0, raw.rindex(name))
    return raw[: start + at] + struct.pack(layout, value) + raw[start + at + struct.calcsize(layout) :]


SOUND = rebuilt()
ZERO = b"archive/data/0"
ARCHIVES = {
    "legacy": (lambda: saved({"w": torch.ones(2)}, _use_new_zipfile_serialization=False), "not a PyTorch zip archive"),
    "raw-pickle": (lambda: pickle.dumps({"w": 1}), "not a PyTorch zip archive"),
    "tar": (tar, "not a PyTorch zip archive .a legacy or raw pickle, a tar"),
    "empty": (lambda: b"", "an empty file; fetch it again"),
    "gguf": (lambda: b"GGUF" + bytes(100), "not a PyTorch zip archive"),
    "torchscript": (torchscript, "a TorchScript archive, which holds code .record x/constants.pkl"),
    "code-folder": (lambda: archive({"x/data.pkl": b"", "x/code/a.py": b""}), "a TorchScript archive"),
    "bomb": (compressed, "compressed zip record archive/data.pkl"),
    "no-pickle": (lambda: archive({"x/version": b"3"}), "exactly one record data.pkl"),
    "two-pickles": (lambda: archive({"x/data.pkl": b"", "y/data.pkl": b""}), "exactly one record data.pkl"),
    "duplicate": (
        lambda: twice(pickled(b"\x80\x02}.", **{"0": EIGHT, "1": EIGHT}), b"archive/data/1", ZERO),
        "duplicate zip record archive/data/0",
    ),
    "other-local-name": (lambda: SOUND.replace(ZERO, b"archive/data/9", 1), "another name in its own header"),
    "encrypted": (lambda: directory_entry(SOUND, ZERO, 8, "<H", 1), "encrypted zip record archive/data/0"),
    "claims-deflate": (lambda: directory_entry(SOUND, ZERO, 10, "<H", 8), "compressed zip record archive/data/0"),
    "claims-more": (lambda: directory_entry(SOUND, ZERO, 24, "<I", 64), "8 bytes expand to 64"),
    "too-long": (
        lambda: directory_entry(directory_entry(SOUND, ZERO, 24, "<I", 1 << 20), ZERO, 20, "<I", 1 << 20),
        "overlaps another or leaves the file",
    ),
    "overlap": (lambda: directory_entry(SOUND, ZERO, 42, "<I", 0), "overlaps another or leaves the file"),
    "outside": (lambda: directory_entry(SOUND, ZERO, 42, "<I", 1 << 30), "overlaps another or leaves the file"),
    "trailing": (lambda: SOUND + b"junk", "bytes after the end of the zip archive|not a sound zip"),
    "comment": (lambda: SOUND[:-2] + b"\x04\0junk", "bytes after the end of the zip archive"),
    "prefix": (lambda: b"PK\x03\x04" + bytes(60) + SOUND, "64 bytes before the zip archive"),
    "cut": (lambda: SOUND[:-30], "or one cut short .*; fetch the file again"),
    "half": (lambda: SOUND[: len(SOUND) // 2], "not a sound zip archive"),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_archive_is_refused(tmp_path, name):
    make, why = ARCHIVES[name]
    with pytest.raises(InputError, match=f"x.bin: .*({why})") as caught:
        read_pickle_tensors(put(tmp_path / "x.bin", make()))
    cure = "fetch" if name in ("empty", "cut", "half") else "convert it to safetensors"
    assert cure in str(caught.value)


def test_the_sound_archive_is_sound(tmp_path):
    assert read_pickle_tensors(put(tmp_path / "x.bin", SOUND))["w"].tolist() == [0, 0]


def test_record_of_another_size_than_the_pickle_says(tmp_path):
    with pytest.raises(InputError, match=r"PyTorch refuses it|tensors of 64 bytes, the file stores 8"):
        read_pickle_tensors(put(tmp_path / "x.bin", rebuilt(shape=(16,), numel=16)))


VIEWS = {
    "outside": ({"offset": 1}, "PyTorch refuses it .*resiz|element 2 in a storage of 2"),
    "negative-offset": ({"offset": -1}, "PyTorch refuses"),
    "stride-0": ({"shape": (1000, 2), "strides": (0, 1)}, r"w: wanted a plain .* overlapping strides \(0, 1\)"),
    "sliding": ({"shape": (2, 1, 2), "strides": (1, 1, 0)}, "overlapping strides"),
    "overlapping": ({"shape": (2, 2), "strides": (1, 1), "numel": 4, "data": bytes(16)}, "overlapping strides"),
}


@pytest.mark.parametrize("name", VIEWS)
def test_view_is_refused(tmp_path, name):
    options, why = VIEWS[name]
    with pytest.raises(InputError, match=why):
        read_pickle_tensors(put(tmp_path / "x.bin", rebuilt(**options)))


def test_views_that_multiply_the_file_are_refused(tmp_path):
    part = view(Storage("0", 100), 0, (99,), (1,))
    raw = pickled(dumped({f"w{i}": part for i in range(10)}), **{"0": bytes(400)})
    with pytest.raises(InputError, match=r"views that expand to 3960 bytes, the file stores 400"):
        read_pickle_tensors(put(tmp_path / "x.bin", raw))


def test_attributes_on_tensors_and_dicts_are_dropped(tmp_path):
    hung = dict.fromkeys(("numel", "stride", "detach", "clone", "untyped_storage", "is_neg", "items", "keys"), 5)
    plain = (torch._utils._rebuild_tensor_v2, (Storage("0", 2), 0, (2,), (1,), False, {}))
    tensor = Calls(torch._tensor._rebuild_from_type_v2, plain[0], torch.Tensor, plain[1], hung)
    parameter = Calls(torch._utils._rebuild_parameter_with_state, Calls(plain[0], *plain[1]), False, {}, hung)
    state = Calls(collections.OrderedDict)
    state.call += (hung, None, iter([("tensor", tensor), ("parameter", parameter)]))
    read = read_pickle_tensors(put(tmp_path / "x.bin", pickled(dumped(state), **{"0": EIGHT})))
    assert {name: vars(t) for name, t in read.items()} == {"tensor": {}, "parameter": {}}


def test_tensors_from_nowhere_are_refused(tmp_path):
    path = put(tmp_path / "x.bin", pickled(dumped({"w": Calls(torch.Tensor, 1000)})))
    with pytest.raises(InputError, match=r"tensors of 4000 bytes, the file stores 0|PyTorch refuses"):
        read_pickle_tensors(path)


ODD = {
    "sparse": (lambda: torch.eye(2).to_sparse(), "a sparse or nested tensor"),
    "meta": (lambda: torch.empty(2, device="meta"), "a tensor on meta"),
    "negated": (lambda: torch._neg_view(torch.ones(2)), "a lazily negated tensor"),
    "complex": (lambda: torch.ones(2, dtype=torch.complex64), "dtype torch.complex64"),
    "int": (lambda: 3, "int"),
    "none": (lambda: None, "NoneType"),
    "list": (lambda: [torch.ones(1)], "list"),
    "text": (lambda: "x", "str"),
}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", ODD)
def test_values_that_are_no_plain_tensors(tmp_path, name, wrapped):
    make, got = ODD[name]
    state = {"ok": torch.ones(1), "w": make()}
    raw = saved({"state_dict": state} if wrapped else state)
    where = "state_dict.w" if wrapped else "w"
    with pytest.raises(InputError, match=f"x.bin: {where}: wanted a plain dense CPU tensor, got {re.escape(got)};"):
        read_pickle_tensors(put(tmp_path / "x.bin", raw))


def test_quantized_tensor_is_refused(tmp_path):
    quantizer = (torch.per_tensor_affine, 0.1, 0)
    storage = Storage("0", 2, torch.QInt8Storage)
    tensor = Calls(torch._utils._rebuild_qtensor, storage, 0, (2,), (1,), quantizer, False, {})
    raw = pickled(dumped({"w": tensor}), **{"0": b"\0\0"})
    with pytest.raises(InputError, match=r"w: wanted a plain|PyTorch refuses"):
        read_pickle_tensors(put(tmp_path / "x.bin", raw))


@pytest.mark.parametrize(
    ("obj", "why"),
    [
        (torch.ones(2), "wanted a dict of tensors, got Tensor"),
        ([torch.ones(2)], "wanted a dict of tensors, got list"),
        ({"state_dict": [1]}, "wanted a dict of tensors, got list"),
        ({"state_dict": {"state_dict": {}}}, "state_dict.state_dict: wanted a tensor, got a dict of 0"),
        ({"model": {"w": torch.ones(1)}, "epoch": 3}, "model: wanted a tensor, got a dict of 1; .* save it alone"),
        ({1: torch.ones(1)}, "1: wanted text as key, got int"),
        ({"state_dict": {("a",): torch.ones(1)}}, r"state_dict.\('a',\): wanted text as key, got tuple"),
        ({"": torch.ones(1)}, "empty name"),
        ({"a\nb": torch.ones(1)}, r"a\\nb: control character"),
    ],
)
def test_other_shapes_of_content(tmp_path, obj, why):
    with pytest.raises(InputError, match=why):
        read_pickle_tensors(put(tmp_path / "x.bin", saved(obj)))


def data_starts(raw):
    """Where each record's bytes begin, and how many they are."""
    with zipfile.ZipFile(io.BytesIO(raw)) as members:
        for member in members.infolist():
            start = member.header_offset
            name_size, extra_size = struct.unpack("<HH", raw[start + 26 : start + 30])
            yield member.filename, start + 30 + name_size + extra_size, member.file_size


def test_damage_in_any_record_is_noticed(tmp_path):
    """Every bit that a record holds counts in its CRC-32; PyTorch does not look at it."""
    for name, start, size in data_starts(SOUND):
        for at in {start, start + size // 2, start + size - 1}:
            raw = bytearray(SOUND)
            raw[at] ^= 1
            with pytest.raises(InputError, match=rf"zip record {re.escape(name)} is damaged: its CRC-32 is "):
                read_pickle_tensors(put(tmp_path / "x.bin", bytes(raw)))


def test_a_file_that_was_checked_is_not_checked_again(tmp_path):
    raw = bytearray(SOUND)
    start = next(start for name, start, _ in data_starts(SOUND) if "/data/" in name)
    raw[start] ^= 1
    assert read_pickle_tensors(put(tmp_path / "x.bin", bytes(raw)), checked=True)


def test_files_without_checksums_are_read_with_a_word(tmp_path, caplog):
    torch.serialization.set_crc32_options(False)
    try:
        raw = saved({"w": torch.arange(4.0)})
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_pickle_tensors(put(tmp_path / "x.bin", raw))["w"], torch.arange(4.0))
    assert "saved without checksums" in caplog.text


def test_size_bound(tmp_path):
    with pytest.raises(InputError, match=r"x.bin: file has \d+ bytes, at most 100 are read"):
        read_pickle_tensors(put(tmp_path / "x.bin", SOUND), max_bytes=100)


def test_large_pickle_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(picklefile, "MAX_PICKLE_BYTES", 10)
    with pytest.raises(InputError, match=r"archive/data.pkl has \d+ bytes, at most 10"):
        read_pickle_tensors(put(tmp_path / "x.bin", SOUND))


def test_many_records_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(picklefile, "MAX_RECORDS", 2)
    with pytest.raises(InputError, match=r"4 zip records, at most 2 are read"):
        read_pickle_tensors(put(tmp_path / "x.bin", SOUND))


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (MemoryError(), "x.bin: not enough memory to load it"),
        (OSError(5, "Input/output error"), "x.bin: reading failed .Input/output error.; check the disk"),
    ],
)
def test_faults_of_the_machine_while_loading(tmp_path, monkeypatch, error, why):
    def load(stream, **options):
        raise error

    monkeypatch.setattr(picklefile.torch, "load", load)
    with pytest.raises(StorageError, match=why):
        read_pickle_tensors(put(tmp_path / "x.bin", SOUND))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_not_a_regular_file(tmp_path, make):
    make(tmp_path / "x.bin")
    with pytest.raises(InputError, match=r"x.bin: not a regular file"):
        read_pickle_tensors(tmp_path / "x.bin")


def test_changed_since_it_was_first_seen(tmp_path):
    path = put(tmp_path / "x.bin", SOUND)
    with open_regular(path) as file:
        stamp = file.stamp
    read_pickle_tensors(path, expected=stamp)
    os.utime(path, ns=(0, 1))
    with pytest.raises(InputError, match=r"source changed while reading"):
        read_pickle_tensors(path, expected=stamp)


@pytest.mark.parametrize(
    ("version", "fine"), [("2.9.1", False), ("2.10.0", True), ("2.10.0a0+git", False), ("3.0", True)]
)
def test_torch_floor(tmp_path, monkeypatch, version, fine):
    path = put(tmp_path / "x.bin", SOUND)
    monkeypatch.setattr(picklefile.torch, "__version__", version)
    if fine:
        read_pickle_tensors(path)
        return
    with pytest.raises(UsageError, match=rf"needs torch 2.10 or newer .*, this is {re.escape(version)}; upgrade"):
        read_pickle_tensors(path)


def test_truncated_anywhere_is_refused(tmp_path):
    for length in range(0, len(SOUND), 3):
        with pytest.raises(InputError):
            read_pickle_tensors(put(tmp_path / "x.bin", SOUND[:length]))
