"""Output formats: what a new one has to say of itself, and that nothing else has to know its name."""

import json

import pytest
import torch
from safetensors.torch import load_file

import loftq
import models
from harness import tiny_source
from loftq.checkpoint.manifest import read_manifest
from loftq.checkpoint.verify import verify
from loftq.errors import InputError, UsageError
from loftq.formats import layouts

OPTIONS = {"rank": 4, "block_size": 8, "workers": 1}


class Halves(loftq.Layout):
    """``Q = high + low``, each in float16: another package would add them up."""

    name = "halves"
    fills = {"code": "uniform"}  # noqa: RUF012
    imports = "import halves  # adds them up\n"
    packages = ("halves",)

    def entries(self, matrix):
        stem = matrix.name.removesuffix("weight")
        return [loftq.Entry(stem + part, "F16", matrix.shape) for part in ("high", "low")]

    def encode(self, matrix, quantized):
        weight = loftq.dequantize(quantized, matrix.quant)
        return [weight.half(), (weight - weight.half().float()).half()]

    def decode(self, matrix, tensors):
        return tensors[0].float() + tensors[1].float()

    def quantization_config(self, modules, bits, kept):
        return {"quant_method": "halves", "modules": [name for name, _ in modules]}


@pytest.fixture
def halves(monkeypatch):
    monkeypatch.setattr(layouts, "_LAYOUTS", dict(layouts._LAYOUTS))
    return loftq.register_format(Halves)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_source(tmp_path_factory.mktemp("layouts") / "source")


def test_a_format_from_outside_makes_a_checkpoint(source, tmp_path, halves):
    manifest = loftq.quantize(source, tmp_path / "out", format="halves", **OPTIONS)
    assert verify(tmp_path / "out") == read_manifest(tmp_path / "out") == manifest
    assert {m["quant"]["code"] for m in manifest["plan"]["matrices"]} == {"uniform"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "```python\nimport halves  # adds them up\nfrom peft import PeftModel\n" in card
    assert "| read with | transformers, peft, halves |" in card
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config == {"quant_method": "halves", "modules": [m["module"] for m in manifest["plan"]["matrices"]]}
    loftq.quantize(source, tmp_path / "packed", code="uniform", **OPTIONS)
    stored, wanted = load_file(tmp_path / "out" / "model.safetensors"), models.written(tmp_path / "packed")
    for matrix in manifest["plan"]["matrices"]:
        stem = matrix["name"].removesuffix("weight")
        found = stored[f"{stem}high"].float() + stored[f"{stem}low"].float()
        torch.testing.assert_close(found, wanted[matrix["module"]][0], rtol=2**-20, atol=2**-24)


def test_its_tensors_are_verified(source, tmp_path, halves, monkeypatch):
    loftq.quantize(source, tmp_path / "out", format="halves", **OPTIONS)
    monkeypatch.setattr(
        Halves, "entries", lambda self, matrix: [loftq.Entry(matrix.name + "_sum", "F16", matrix.shape)]
    )
    with pytest.raises(InputError, match="weight_sum: found nothing, the plan says"):
        verify(tmp_path / "out")
    monkeypatch.setattr(layouts, "_LAYOUTS", {})
    layouts.register_format(layouts.DenseLayout)
    with pytest.raises(InputError, match="format must be one of dense, got 'halves'; import the package"):
        verify(tmp_path / "out")


def test_a_budget_counts_other_bytes(source, tmp_path, halves):
    with pytest.raises(UsageError, match="budget counts bytes of format='loftq', and format='halves' takes others"):
        loftq.quantize(source, tmp_path / "out", format="halves", budget="3.0", **OPTIONS)


def test_a_name_is_given_once(halves):
    with pytest.raises(UsageError, match="a format halves is there already"):
        loftq.register_format(Halves)


def test_what_is_left_open_fits_bitsandbytes_from_python_too(source, tmp_path):
    options = {**OPTIONS, "bits": 2, "format": "bnb"}
    manifest = loftq.quantize(source, tmp_path / "out", **options)
    (quant,) = {(m["quant"]["code"], m["quant"]["scale_dtype"]) for m in manifest["plan"]["matrices"]}
    assert quant == ("nf", "float32")
    verify(tmp_path / "out")
    with pytest.raises(UsageError, match=r"format='bnb' holds NF4 .* use bits=4, code='nf', scale_dtype='float32'"):
        loftq.quantize(source, tmp_path / "other", scale_dtype="float16", **options)
