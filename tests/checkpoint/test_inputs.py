"""Sources that must be refused, by the file or tensor that is wrong with them, and odd ones that must not."""

import dataclasses
import json
import os
import pickle
import shutil
import socket
import struct
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import reader
from harness import FLAGS, POLICY, cli, refused, run, tiny_source, tree
from loftq.options import SCALES
from models import BERT
from quantizers import WIDTHS

MATRIX = "encoder.layer.1.intermediate.dense.weight"
KEPT = "encoder.layer.1.output.dense.bias"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return tiny_source(tmp_path_factory.mktemp("inputs") / "source")


@pytest.fixture
def source(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "source"))


def edit(source, change):
    """Let ``change`` edit the dictionary of tensors."""
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    return source


def quantize(source, *flags):
    return cli("quantize", source, "-o", source.parent / "out", *FLAGS, *flags)


def refuse(source, code, *words, flags=()):
    """Refused with ``code`` and one line with ``words``; no output; the source as before; the line."""
    before = tree(source) if source.is_dir() else None
    line = refused(quantize(source, *flags), code, *words)
    assert not (source.parent / "out").exists()
    assert before is None or tree(source) == before
    return line


# Values


@pytest.mark.sampled(4)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", [MATRIX, KEPT, "embeddings.word_embeddings.weight"])
def test_not_finite(source, name, value):
    def spoil(tensors):
        tensors[name].flatten()[7] = float(value)
        tensors[name].flatten()[5] = float(value)

    edit(source, spoil)
    tensor = load_file(source / "model.safetensors")[name]
    place = [5] if tensor.ndim == 1 else [0, 5]
    refuse(source, 6, name, f"2 of {tensor.numel()} values", f"the first at {place}")


def zero(w):
    w.zero_()


def constant(w):
    w.fill_(0.25)


def outlier(w):
    w[3, 4] = 1e38


def denormal(w):
    w.mul_(1e-42)


def negative_zero(w):
    w.zero_().neg_()


@pytest.mark.sampled(6)
@pytest.mark.parametrize("change", [zero, constant, outlier, denormal, negative_zero])
@pytest.mark.parametrize("code", ["nf", "uniform", "uniform-tensor", "affine", "lloyd --scales fitted"])
def test_extreme_values(source, change, code):
    """Finite results with an error no larger than the matrix, or a refusal that names it."""
    edit(source, lambda tensors: change(tensors[MATRIX]))
    ended = quantize(source, "--code", *code.split(), "--scale-dtype", "float32")
    if ended.code == 6 and change is outlier:
        refused(ended, 6, MATRIX)
        return
    assert ended.code == 0, ended.err
    manifest = json.loads((source.parent / "out" / "loftq_manifest.json").read_text())
    (report,) = (m for m in manifest["matrices"] if m["name"] == MATRIX)
    absolute = change is denormal and code == "uniform-tensor"  # LoftQ's own formula adds 1e-8 to the range
    assert all(0 <= e < (1e40 if absolute else 1.5) for e in report["errors"])
    if change in (zero, negative_zero) and code != "uniform-tensor":
        backbone, product = reader.matrices(source.parent / "out")[MATRIX.removesuffix(".weight")]
        assert not backbone.any()
        assert not product.any()
    assert cli("verify", source.parent / "out").code == 0


def test_a_scale_that_does_not_fit_its_type(source):
    edit(source, lambda tensors: outlier(tensors[MATRIX]))
    refuse(source, 6, MATRIX, "does not fit float16", flags=["--scale-dtype", "float16"])


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", ["F64", "F16", "BF16"])
def test_float_types(source, dtype):
    kind = {"F64": torch.float64, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    edit(source, lambda tensors: tensors.update({n: t.to(kind) for n, t in tensors.items()}))
    assert quantize(source).code == 0
    wanted = load_file(source / "model.safetensors")
    found = {n: t for f in (source.parent / "out").glob("*.safetensors") for n, t in load_file(f).items()}
    assert found[KEPT].dtype == kind
    assert torch.equal(found[KEPT], wanted[KEPT])


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_short_weights_without_a_scale(source, kind):
    edit(source, lambda tensors: tensors.update({MATRIX: tensors[MATRIX].to(kind)}))
    refuse(source, 3, MATRIX, "scale may be missing", "full-precision")


def test_already_quantized(source):
    assert quantize(source).code == 0
    again = cli("quantize", source.parent / "out", "-o", source.parent / "twice", *FLAGS)
    refused(again, 3, "already quantized with loftq;", "full-precision")


# Shapes


def sized(tmp_path, **sizes):
    torch.manual_seed(0)
    config = transformers.BertConfig(**{**BERT, "vocab_size": 16, "max_position_embeddings": 8, **sizes})
    transformers.BertModel(config).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def test_a_rank_that_is_too_large(source):
    line = refuse(source, 2, "rank 40", "40x72", "--rank-policy clamp", flags=["--rank", "40"])
    assert MATRIX in line


def test_a_rank_that_is_clamped(source):
    assert quantize(source, "--rank", "40", "--rank-policy", "clamp").code == 0
    out = source.parent / "out"
    config = json.loads((out / "loftq_init" / "adapter_config.json").read_text())
    assert config["r"] == 40
    assert set(config["rank_pattern"].values()) == {39}
    factors = reader.tensors(out / "loftq_init")
    for module, rank in config["rank_pattern"].items():
        assert factors[f"base_model.model.{module}.lora_A.weight"].shape[0] == rank
    assert cli("verify", out).code == 0


def test_matrices_smaller_than_a_block(tmp_path):
    source = sized(tmp_path, hidden_size=8, intermediate_size=6)
    assert quantize(source).code == 0
    manifest = json.loads((tmp_path / "out" / "loftq_manifest.json").read_text())
    assert len(manifest["matrices"]) == 12
    check_errors(source, tmp_path / "out")


@pytest.mark.sampled(2)
@pytest.mark.parametrize("width", [0, 1])
def test_matrices_without_width(tmp_path, width):
    """0×N, N×0, 1×N and N×1 are kept, with a reason, and the rest is quantized."""
    source = sized(tmp_path, intermediate_size=1)
    if width == 0:
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**config, "intermediate_size": 0}))

        def empty(tensors):
            for n, t in tensors.items():
                if 1 in t.shape and "embed" not in n:
                    tensors[n] = t[:0] if t.shape[0] == 1 else t[:, :0].contiguous()

        edit(source, empty)
    plan = json.loads(cli("plan", source, "--rank", "4", "--json").out)
    kept = {row["name"]: row for row in plan["tensors"] if row["action"] == "keep"}
    for name in (MATRIX, "encoder.layer.1.output.dense.weight"):
        assert kept[name]["shape"].count(width) == 1
        assert kept[name]["reason"] in ("empty", "one row or column: nothing to factorize")
    assert quantize(source).code == 0
    assert cli("verify", tmp_path / "out").code == 0


def check_errors(source, out):
    """The reported errors are those that the second reader finds in the files."""
    weights = {n: t.double().numpy() for n, t in load_file(source / "model.safetensors").items()}
    manifest = json.loads((out / "loftq_manifest.json").read_text())
    written = reader.matrices(out)
    assert len(written) == len(manifest["matrices"])
    for row in manifest["matrices"]:
        w = weights[row["name"]]
        backbone, product = written[row["name"].removesuffix(".weight")]
        error = ((w - backbone - product) ** 2).sum() ** 0.5 / (w**2).sum() ** 0.5
        assert row["errors"][row["kept"]] == pytest.approx(error, rel=1e-5)
        assert row["errors"][row["kept"]] == min(row["errors"][1:] or row["errors"])


# The same checkpoint as a pickle


def as_pickle(source, twin, tensors=None):
    shutil.copytree(source, twin)
    torch.save(tensors or load_file(twin / "model.safetensors"), twin / "pytorch_model.bin")
    (twin / "model.safetensors").unlink()
    return twin


def test_a_bin_gives_the_same_bytes(source, tmp_path):
    twin = as_pickle(source, tmp_path / "twin")
    run(source, tmp_path / "place" / "out")
    first = tree(tmp_path / "place" / "out")
    shutil.rmtree(tmp_path / "place" / "out")
    ended = cli("quantize", twin, "-o", tmp_path / "place" / "out", *FLAGS)
    assert ended.code == 0
    assert "safetensors is safer" in ended.err
    second = tree(tmp_path / "place" / "out")
    assert {n for n in first if first[n] != second[n]} == {"loftq_manifest.json"}


class Run:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("form", ["zip", "raw"])
def test_a_bin_that_would_run_code(source, tmp_path, form):
    canary = tmp_path / "canary"
    tensors = {**load_file(source / "model.safetensors"), "extra": Run(f"touch {canary}")}
    twin = as_pickle(source, tmp_path / "twin", tensors)
    if form == "raw":
        (twin / "pytorch_model.bin").write_bytes(pickle.dumps({"extra": Run(f"touch {canary}")}))
    refuse(twin, 3, "pytorch_model.bin", "convert it to safetensors")
    assert not canary.exists()


def test_a_changed_bin(source, tmp_path):
    twin = as_pickle(source, tmp_path / "twin")
    raw = bytearray((twin / "pytorch_model.bin").read_bytes())
    del raw[len(raw) // 2 :]
    (twin / "pytorch_model.bin").write_bytes(raw)
    refuse(twin, 3, "pytorch_model.bin")


# Files


@pytest.mark.sampled(3)
@pytest.mark.parametrize("keep", [0, 7, 8, 100, 5000, -1])
def test_a_cut_file(source, keep):
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refuse(source, 3, "model.safetensors")


def test_overlapping_tensors(source):
    file = source / "model.safetensors"
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    same = [n for n, info in header.items() if n != "__metadata__" and info["shape"] == [72, 72]]
    header[same[1]]["data_offsets"] = header[same[0]]["data_offsets"]
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    file.write_bytes(raw[:8] + text + raw[8 + length :])
    refuse(source, 3, "model.safetensors", "overlaps")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/model.safetensors", "a/b.safetensors", "x.bin"])
def test_an_index_that_leads_elsewhere(source, name):
    index = {"weight_map": dict.fromkeys(load_file(source / "model.safetensors"), name)}
    shutil.move(source / "model.safetensors", source.parent / "model.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse(source, 3, "index.json", "file name")


def test_a_missing_shard(source):
    index = {"weight_map": dict.fromkeys(load_file(source / "model.safetensors"), "gone.safetensors")}
    (source / "model.safetensors").unlink()
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse(source, 3, "missing files: gone.safetensors")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_pipe_does_not_hang(source, file):
    (source / file).unlink()
    os.mkfifo(source / file)
    before = set(os.listdir(source.parent))
    refused(quantize(source), 3, file)
    assert set(os.listdir(source.parent)) == before


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (None, ["config.json", "missing"]),
        ("{", ["config.json", "JSON"]),
        ({"model_type": "nonesuch"}, ["model_type", "nonesuch"]),
        ({"hidden_size": "72"}, ["hidden_size", "72"]),
        ({"num_hidden_layers": 10**9}, ["num_hidden_layers", "1000000000"]),
        ({"hidden_size": 2**63}, ["hidden_size"]),
        ({"hidden_size": 144}, ["do not fit config.json", "144"]),
    ],
    ids=["missing", "torn", "unknown type", "text", "many layers", "huge", "another shape"],
)
def test_a_bad_config_is_refused(source, change, words):
    config = source / "config.json"
    if change is None:
        config.unlink()
    elif isinstance(change, str):
        config.write_text(change)
    else:
        config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    refuse(source, 3, *words)


def test_code_that_comes_with_a_model_is_neither_run_nor_copied(source, tmp_path):
    config = json.loads((source / "config.json").read_text())
    evil = f"open({str(tmp_path / 'canary')!r}, 'w')\n"
    (source / "modeling_evil.py").write_text(evil)
    keys = {
        "auto_map": {"AutoModel": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"},
        "_attn_implementation": "evil/kernel",
        "_attn_implementation_internal": "evil/kernel",
        "custom_pipelines": {"x": {"impl": "modeling_evil.Evil"}},
        "trust_remote_code": True,
    }
    (source / "config.json").write_text(json.dumps({**config, **keys}))
    assert quantize(source).code == 0
    out = source.parent / "out"
    assert not (tmp_path / "canary").exists()
    assert not list(out.rglob("*.py"))
    assert not set(keys) & set(json.loads((out / "config.json").read_text()))


@pytest.mark.parametrize("kind", ["nothing", "gguf", "file", "typo", "no such path"])
def test_no_checkpoint_at_all(tmp_path, kind):
    source = tmp_path / "source"
    if kind == "file":
        source.write_text("x")
    elif kind in ("nothing", "gguf"):
        source.mkdir()
    if kind == "gguf":
        (source / "model.gguf").write_text("x")
    if kind in ("typo", "no such path"):
        name = "meta-lama/nonesuch" if kind == "typo" else "./no/such/path"
        ended = cli("quantize", name, "-o", tmp_path / "out", *FLAGS)
        refused(
            ended, 4 if kind == "typo" else 3, name, "check the spelling" if kind == "typo" else "no such directory"
        )
        assert ended.cpu_seconds < 10
    else:
        refused(cli("quantize", source, "-o", tmp_path / "out", *FLAGS), 3, "source")
    assert not (tmp_path / "out").exists()


def test_a_local_directory_never_uses_the_network(source):
    def no_network():
        def refuse_socket(*_, **__):
            raise AssertionError("a socket was opened")

        socket.socket = refuse_socket
        socket.create_connection = refuse_socket
        socket.getaddrinfo = refuse_socket

    ended = cli("quantize", source, "-o", source.parent / "out", *FLAGS, setup=no_network)
    assert ended.code == 0, ended.err


def test_names_with_brackets(source):
    """A tensor that the model does not know is copied; its name is no markup for the terminal."""
    edit(source, lambda tensors: tensors.update({"odd[/red][bold]": torch.ones(3, 3), "[link=x]": torch.ones(2)}))
    ended = cli("plan", source, "--rank", "4")
    assert ended.code == 0, ended.err
    assert "odd[/red][bold]" in ended.out
    assert quantize(source).code == 0


def test_large_small_files_are_left_out_with_a_word(source):
    with open(source / "tokenizer.json", "wb") as file:
        file.truncate(65 << 20)
    ended = quantize(source)
    assert ended.code == 0
    assert "tokenizer.json: larger than 64 MB, not copied" in ended.err
    assert not (source.parent / "out" / "tokenizer.json").exists()


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    ("code", "bits", "scales"),
    [(*width, scales) for width in WIDTHS for scales in SCALES if (width[0], scales) != ("uniform-tensor", "fitted")],
)
def test_errors_are_those_of_the_files(original, tmp_path, bits, code, scales):
    solver = dataclasses.replace(POLICY.solve, scales=scales)
    run(original, tmp_path / "out", policy=dataclasses.replace(POLICY, bits=str(bits), code=code, solve=solver))
    check_errors(original, tmp_path / "out")


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 16.0},
        {"alpha": 1.0, "rslora": True},
        {"scale_dtype": "float16", "block_size": 32},
        {"bits": "layer.0=4,2", "rank": "output.dense=6,3"},
    ],
    ids=["alpha", "rslora", "scales", "patterns"],
)
def test_errors_under_other_options(original, tmp_path, options):
    run(original, tmp_path / "out", policy=dataclasses.replace(POLICY, **options))
    if "rank" not in options:
        check_errors(original, tmp_path / "out")
    else:
        config = json.loads((tmp_path / "out" / "loftq_init" / "adapter_config.json").read_text())
        assert set(config["rank_pattern"].values()) == {6}


def test_a_small_file_that_leads_out_of_the_source(source, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("not yours")
    (source / "merges.txt").unlink(missing_ok=True)
    (source / "merges.txt").symlink_to(secret)
    refuse(source, 3, "merges.txt", "symbolic link out of the checkpoint")
