"""``loftq start``: an adapter directory for any base that from_pretrained loads."""

import json
import os

import pytest
import torch
from bases import BASES, PROJECTIONS, make_llama
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import models
from harness import cli, refused, start_cli, tree
from loftq.errors import StorageError
from loftq.formats import fsio

RANK = ("--rank", "4")
FILES = ["adapter_config.json", "adapter_model.safetensors", "loftq_start.json"]


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory):
    """A base of 2 bits without a start."""
    directory = tmp_path_factory.mktemp("base") / "packed"
    models.quantize(source, directory, steps=0)
    return directory


def start(base, source, output, *more, **options):
    return cli("start", base, "--weights", source, "-o", output, *RANK, *more, **options)


def made(base, output):
    """The base with the adapter, loaded as a user would."""
    model = AutoModelForCausalLM.from_pretrained(base)
    frozen = models.outputs(model)
    return frozen, models.outputs(PeftModel.from_pretrained(model, output))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("base", BASES)
def test_bitsandbytes_directories(source, tmp_path, base):
    """Quantized in one process, saved, and started in another."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes quantizes the bases of these tests")
    options = BitsAndBytesConfig(**BASES[base])
    AutoModelForCausalLM.from_pretrained(source, quantization_config=options).save_pretrained(tmp_path / "base")
    ended = start(tmp_path / "base", source, tmp_path / "out", "--alpha", "12")
    assert ended.code == 0, ended.err
    assert sorted(os.listdir(tmp_path / "out")) == FILES
    report = json.loads((tmp_path / "out" / "loftq_start.json").read_text())
    assert len(report["layers"]) == PROJECTIONS
    assert report["error"] < 0.95 * report["error_before"]
    assert f"{report['error']:.4f}" in ended.out
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "out")
    layers = {n: m for n, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert set(layers) == {r["name"] for r in report["layers"]}
    assert all(layer.lora_B["default"].weight.any() for layer in layers.values())
    assert {layer.scaling["default"] for layer in layers.values()} == {3.0}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("format", ["loftq", "dense", "bnb"])
def test_directories_of_loftq(source, tmp_path, format):
    """From a QLoRA base of ours, the start of one LoftQ step, whatever the scaling."""
    if format == "bnb":
        pytest.importorskip("bitsandbytes", reason="the base is loaded by bitsandbytes")
    shared = {"format": format, "bits": 4, "scale_dtype": "float32", "block_size": 32}
    one = models.quantize(source, tmp_path / "one", steps=1, **shared)
    models.quantize(source, tmp_path / "zero", steps=0, **shared)
    ended = start(tmp_path / "zero", source, tmp_path / "out", "--alpha", "64", "--rslora")
    assert ended.code == 0, ended.err
    report = json.loads((tmp_path / "out" / "loftq_start.json").read_text())
    assert report["error"] == pytest.approx(one["totals"]["error"], rel=1e-3)
    frozen, started = made(tmp_path / "zero", tmp_path / "out")
    dense = models.outputs(make_llama())
    assert (started - dense).norm() < (frozen - dense).norm()


def test_the_outputs_are_those_of_base_and_term(packed, source, tmp_path):
    assert start(packed, source, tmp_path / "out", "--alpha", "20").code == 0
    factors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    q = {module: q for module, (q, _) in models.written(packed).items()}
    stem = "base_model.model.{}.lora_{}.weight"
    whole = {m: q[m] + 5 * factors[stem.format(m, "B")] @ factors[stem.format(m, "A")] for m in q}
    _, started = made(packed, tmp_path / "out")
    assert models.close(started, models.outputs(models.substituted(make_llama(), whole)), 1e-4)


def test_conv1d_bases_are_initialized_dense_and_packed(tmp_path):
    """As a dense directory (Conv1D) and packed, the adapter fits both ways around."""
    dense = models.tiny("gpt2")
    dense.save_pretrained(tmp_path / "source")
    wanted = models.outputs(dense)
    for format in ("dense", "loftq"):
        models.quantize(tmp_path / "source", tmp_path / format, steps=0, format=format)
        ended = cli("start", tmp_path / format, "--weights", tmp_path / "source", "-o", tmp_path / f"{format}-out",
                    "--rank", "30")  # fmt: skip
        assert ended.code == 0, ended.err
        frozen, started = made(tmp_path / format, tmp_path / f"{format}-out")
        assert (started - wanted).norm() < 0.8 * (frozen - wanted).norm()


def test_equal_commands_write_equal_bytes(packed, source, tmp_path):
    for name in ("one", "two"):
        assert start(packed, source, tmp_path / name).code == 0
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_progress_and_nothing_else_on_stderr(packed, source, tmp_path):
    ended = start(packed, source, tmp_path / "out")
    lines = [line for line in ended.err.replace("\r", "\n").split("\n") if line]
    assert all(line.startswith("LoftQ:") for line in lines), ended.err
    assert f"{PROJECTIONS}/{PROJECTIONS}" in lines[-1]


# Refusals, and what they leave behind: nothing


def test_another_models_weights(packed, source, tmp_path):
    make_llama(seed=5).save_pretrained(tmp_path / "other")
    refused(start(packed, tmp_path / "other", tmp_path / "out"), 3, "layers.0", "another model's?")
    models.tiny("llama").save_pretrained(tmp_path / "size")
    refused(start(packed, tmp_path / "size", tmp_path / "out"), 3, "another model's?")
    models.tiny("bert").save_pretrained(tmp_path / "bert")
    refused(start(packed, tmp_path / "bert", tmp_path / "out"), 3, "no such module")
    refused(start(packed, packed, tmp_path / "out"), 3, "already quantized", "full-precision")
    assert sorted(os.listdir(tmp_path)) == ["bert", "other", "size"]


def test_bases_that_do_not_load(packed, source, tmp_path):
    refused(start(tmp_path / "nowhere", source, tmp_path / "out"), 3, "nowhere")
    (tmp_path / "empty").mkdir()
    refused(start(tmp_path / "empty", source, tmp_path / "out"), 3, "config.json: missing")
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "empty" / "config.json").write_text(json.dumps(config))
    refused(start(tmp_path / "empty", source, tmp_path / "out"), 3, "cannot load this model")
    config["model_type"] = "of-my-own"
    (tmp_path / "empty" / "config.json").write_text(json.dumps(config))
    refused(start(tmp_path / "empty", source, tmp_path / "out"), 3, "does not run code")
    assert os.listdir(tmp_path) == ["empty"]


def test_a_base_with_a_part_missing(source, tmp_path):
    dense = make_llama()
    state = {n: t for n, t in dense.state_dict().items() if "layers.1.mlp.up_proj" not in n}
    dense.save_pretrained(tmp_path / "base", state_dict=state)
    refused(start(tmp_path / "base", source, tmp_path / "out"), 3, "no weights for", "layers.1.mlp.up_proj")


def test_bad_options_are_refused(packed, source, tmp_path):
    refused(start(packed, source, tmp_path / "out", "--rank", "64"), 2, "rank")
    refused(start(packed, source, tmp_path / "out", "--svd", "quick"), 2, "svd")
    refused(start(packed, source, tmp_path / "out", "--task-type", "POETRY"), 2, "--task-type")
    refused(start(packed, source, packed / "out"), 2, "choose another --output")
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists(packed, source, tmp_path):
    (tmp_path / "out").mkdir()
    assert start(packed, source, tmp_path / "out").code == 0, "an empty directory is free"
    before = tree(tmp_path / "out")
    again = start(packed, source, tmp_path / "out")
    assert again.code == 0, "the same command has nothing to do"
    assert "LoftQ:" not in again.err
    refused(start(packed, source, tmp_path / "out", "--alpha", "3"), 5, "made by another command", "options.alpha")
    assert tree(tmp_path / "out") == before
    (tmp_path / "out" / FILES[1]).write_bytes(b"")
    refused(start(packed, source, tmp_path / "out"), 5, "damaged")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine").touch()
    refused(start(packed, source, tmp_path / "other"), 5, "exists and is a directory that loftq did not make")


def test_a_workspace_of_another_command_is_not_touched(packed, source, tmp_path):
    work = tmp_path / "out.loftq-partial"
    work.mkdir()
    (work / "identity.json").write_text('{"another": "command"}')
    refused(start(packed, source, tmp_path / "out"), 5, "unfinished work of another command")
    assert (work / "identity.json").exists()


def test_a_failure_while_writing_loses_nothing(packed, source, tmp_path):
    def fail():
        write = fsio.write_atomic

        def full(path, chunks):
            if path.name == "loftq_start.json":
                raise StorageError(f"{path}: no space left")
            return write(path, chunks)

        fsio.write_atomic = full

    refused(start(packed, source, tmp_path / "out", setup=fail), 4, "no space left")
    assert os.listdir(tmp_path) == ["out.loftq-partial"]
    ended = start(packed, source, tmp_path / "out")
    assert ended.code == 0, ended.err
    assert f"{PROJECTIONS}/{PROJECTIONS}" in ended.err
    assert os.listdir(tmp_path) == ["out"]


def test_a_killed_run_is_made_again(packed, source, tmp_path):
    def die():
        fsio.step = lambda op, path: os._exit(137) if path.name == "loftq_start.json" else None

    child = start_cli("start", packed, "--weights", source, "-o", tmp_path / "out", *RANK, setup=die)
    assert child.ended().code == 137
    assert os.listdir(tmp_path) == ["out.loftq-partial"]
    assert start(packed, source, tmp_path / "out").code == 0
    assert os.listdir(tmp_path) == ["out"]
    assert sorted(os.listdir(tmp_path / "out")) == FILES
    assert torch.isfinite(next(iter(load_file(tmp_path / "out" / FILES[1]).values()))).all()
