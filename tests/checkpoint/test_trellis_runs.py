"""A trellis checkpoint through every verb: what is stored is what was asked for, read by others, trained and merged."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import loftq
import reader
from harness import POLICY, cli, hooked, refused, run, tiny_source, tree
from loftq.checkpoint import verify
from loftq.errors import InputError, UsageError
from loftq.formats.config import read_groups
from models import close, outputs, packed, same, tensors, written
from models import made as made

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def llama(made):
    """1.5 bits, but the down projection at 2.1875; k_proj and v_proj have too few rows for a trellis."""
    return made("llama", bits="down_proj=2.1875,1.5", window=8, steps=2)


def config_of(directory):
    return json.loads((directory / "config.json").read_text())["quantization_config"]


def test_what_is_written(llama):
    config = config_of(llama.output)
    assert config["format_version"] == 2
    assert list(config["levels"]) == ["trellis-8"]
    widths = {module: (group["bits"], group["code"]) for group in config["groups"] for module in group["modules"]}
    assert widths["model.layers.0.mlp.down_proj"] == (2.1875, "trellis")
    assert widths["model.layers.0.mlp.up_proj"] == (1.5, "trellis")
    assert {*config["groups"][0]} == {"bits", "code", "scale_dtype", "window", "column_rates", "modules"}
    verify.verify(llama.output)
    for matrix in llama.manifest["matrices"]:
        assert matrix["errors"] == sorted(matrix["errors"], reverse=True)


def test_codes_in_blocks_are_written_as_before(made):
    config = config_of(made("llama").output)
    assert {*config} == {"quant_method", "format_version", "bits", "groups"}
    assert config["format_version"] == 1
    for group in config["groups"]:
        assert {*group} == {"bits", "code", "block_size", "scale_dtype", "double_quant", "modules"}


def test_an_independent_reader_finds_the_reported_errors(llama):
    weights = {n: t.double().numpy() for n, t in load_file(llama.source / "model.safetensors").items()}
    found = reader.matrices(llama.output)
    assert len(found) == len(llama.manifest["matrices"])
    for row in llama.manifest["matrices"]:
        w, (q, product) = weights[row["name"]], found[row["name"].removesuffix(".weight")]
        error = ((w - q - product) ** 2).sum() ** 0.5 / (w**2).sum() ** 0.5
        assert row["errors"][row["kept"]] == pytest.approx(error, rel=1e-5)


def test_loading_computing_and_saving(llama, tmp_path):
    model = llama.load()
    assert close(outputs(model), outputs(llama.backbone()))
    assert close(outputs(llama.start()), outputs(llama.started()))
    model.save_pretrained(tmp_path / "saved")
    assert config_of(tmp_path / "saved") == config_of(llama.output)
    again = type(model).from_pretrained(tmp_path / "saved")
    assert same(again.state_dict(), model.state_dict())


def test_gradients_and_a_step_of_training(llama):
    model, dense = llama.start(), llama.started()
    layer = next(m for m in packed(model).values() if m.spec.code == "trellis")
    before = {name: tensor.clone() for name, tensor in layer.named_parameters()}
    outputs(model).square().mean().backward()
    outputs(dense).square().mean().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    torch.optim.SGD(trained, 0.1).step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.named_parameters())
    x = torch.randn(3, layer.in_features, requires_grad=True)
    layer(x).square().sum().backward()
    weight = layer.dequantize()
    assert close(x.grad, 2 * (x @ weight.T) @ weight)


def test_in_memory_as_in_files(llama):
    model = llama.dense.__class__.from_pretrained(llama.source)
    wrapped = loftq.get_peft_model(model, bits="down_proj=2.1875,1.5", window=8, steps=2, rank=4)
    assert close(outputs(wrapped), outputs(llama.start()))


def test_dense_and_bitsandbytes(llama, tmp_path):
    dense = tmp_path / "dense"
    loftq.quantize(
        llama.source, dense, bits="down_proj=2.1875,1.5", window=8, steps=2, rank=4, format="dense", dtype="source"
    )
    assert close(
        tensors(dense)["model.layers.0.mlp.up_proj.weight"], written(llama.output)["model.layers.0.mlp.up_proj"][0]
    )
    for bits in (1.5, "down_proj=2.5,4"):
        with pytest.raises(UsageError, match=r"format='bnb' has no (1|2)\.5 bits, only 2 or 4; use bits=4"):
            loftq.quantize(llama.source, tmp_path / "bnb", bits=bits, rank=4, format="bnb")


def test_merging(llama, tmp_path):
    loftq.merge(llama.output, tmp_path / "merged")
    merged = tensors(tmp_path / "merged")
    for module, (q, product) in written(llama.output).items():
        assert close(merged[f"{module}.weight"].float(), q + product, 0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format_version=1), r"unknown field.*levels"),
        (lambda c: (c.update(format_version=1), c.pop("levels")), "format_version 1 has no trellis"),
        (lambda c: c.pop("levels"), "levels: trellis-8: not the table of this loftq"),
        (lambda c: c["levels"].update({"trellis-8": "AAAA"}), "levels: trellis-8: not the table"),
        (lambda c: c["levels"].update({"trellis-9": "AAAA"}), "levels: trellis-9: not the table"),
        (lambda c: c.update(levels=3), "levels: trellis-8: not the table"),
        (lambda c: c["groups"][0].update(window=9), "window must be one of 8, 10, 12"),
        (lambda c: c["groups"][0].update(bits=1.51), "multiples of 1/16 up to 4, got 1.51"),
    ],
)
def test_a_config_that_is_not_ours(llama, change, message):
    config = config_of(llama.output)
    read_groups(config)
    change(config)
    with pytest.raises(InputError, match=message):
        read_groups(config)


def test_a_trellis_where_none_can_be(llama, tmp_path):
    """A config that packs a table so: refused by a line, not by a crash in the middle of a product."""
    shutil.copytree(llama.output, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["groups"][0]["modules"].append("model.embed_tokens")
    path.write_text(json.dumps(config))
    with pytest.raises(UsageError, match="the rows of an embedding are read alone"):
        type(llama.dense).from_pretrained(tmp_path / "out")


def test_the_command_line(tmp_path):
    source = tiny_source(tmp_path / "source")
    flags = ("--bits", "1.5", "--window", "8", "--rank", "4", "--steps", "1", "--embeddings", "--min-coverage", "0")
    plan = cli("plan", source, *flags[:6], "--embeddings", "--json")
    rows = {row["name"]: row for row in json.loads(plan.out)["tensors"] if row["action"] == "quantize"}
    assert rows["encoder.layer.0.output.dense.weight"]["window"] == 8
    table = rows["embeddings.word_embeddings.weight"]
    assert (table["bits"], table["code"]) == (2, "lloyd")
    assert table["instead"] == (
        "no trellis of 1.5 bits: the rows of an embedding are read alone, those of a trellis together"
    )
    assert "1.5-bit trellis, window 8" in cli("plan", source, *flags[:6]).out
    assert cli("quantize", source, "-o", tmp_path / "out", *flags).code == 0
    assert cli("verify", tmp_path / "out").code == 0
    assert "read alone" in cli("inspect", tmp_path / "out").err + cli("inspect", tmp_path / "out").out
    assert "1.5" in (tmp_path / "out" / "README.md").read_text()
    refused(cli("quantize", source, "-o", tmp_path / "no", "--bits", "1.3"), 2, "an average must lie between")


def test_workers_shards_and_a_run_that_was_stopped(tmp_path):
    source = tiny_source(tmp_path / "source")
    policy = dataclasses.replace(POLICY, bits="1.5", window=8)
    run(source, tmp_path / "a", policy=policy, workers=1)
    run(source, tmp_path / "b", policy=policy, workers=2)
    made = []

    def stop(op, path):
        made.append(op == "rename" and path.parent.name == "units" and path.suffix == ".json")
        if sum(made) > 2:
            raise KeyboardInterrupt

    with hooked(stop), pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "c", policy=policy, workers=1)
    run(source, tmp_path / "c", policy=policy, workers=2)
    assert tree(tmp_path / "a") == tree(tmp_path / "b") == tree(tmp_path / "c")


def test_a_budget_chooses_sixteenths_of_a_bit(tmp_path):
    """Sixteenths of a bit to choose from, no blocks; a matrix that no trellis holds has the scalar widths."""
    source = tiny_source(tmp_path / "source")
    plan = loftq.plan(source, budget=2.2, code="trellis", window=8, rank=4, preset="qlora", workers=1, block_size=32)
    found = {m.quant.bits for m in plan.matrices}
    assert all(1 <= bits <= 4 and (16 * bits).is_integer() for bits in map(float, found))
    assert len(found) > 1
    assert 8 * sum(m.bytes for m in plan.matrices) / sum(m.numel for m in plan.matrices) <= 2.2
