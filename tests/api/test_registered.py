"""A preset and a code from outside the package: registered by one call each, they work wherever the others do."""

import pytest
import torch
import transformers

import loftq
import models
from harness import Child
from loftq import codes, spec
from loftq.cli import app
from loftq.errors import UsageError
from loftq.finetune.recipe import parse

WEIGHT = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))


class Thirds(loftq.Code):
    """Two bits without a zero; the scale is the largest magnitude."""

    name, widths = "thirds", (2,)

    def levels(self, bits):
        return torch.tensor([-1.0, -1 / 3, 1 / 3, 1.0])

    def scale(self, values, bits, stored):
        return values.abs().amax(-1), None


@pytest.fixture
def own():
    loftq.register_code(Thirds)
    loftq.register_preset("two-steps", steps=2, scales="fitted")
    yield {"bits": 2, "rank": 4, "code": "thirds", "preset": "two-steps"}
    del codes._CODES["thirds"], spec.PRESETS["two-steps"]


def test_in_every_call(own, tmp_path):
    solution = loftq.quantize_weight(WEIGHT, **own)
    assert (solution.quant.code, len(solution.errors)) == ("thirds", 3)
    ratios = solution.dequantize() / solution.dequantize().abs().amax(1, keepdim=True)
    assert torch.isclose(ratios.abs()[..., None], torch.tensor([1 / 3, 1.0])).any(-1).all()
    model = models.tiny("llama")
    model.save_pretrained(tmp_path / "source")
    packed = loftq.get_peft_model(model, **own, workers=1, progress=False)
    made = loftq.quantize(tmp_path / "source", tmp_path / "called", **own, workers=1)
    words = [f"--{name}={value}" for name, value in own.items()]
    app(
        ["quantize", f"{tmp_path / 'source'}", "-o", f"{tmp_path / 'typed'}", "--workers=1", *words],
        standalone_mode=False,
    )
    assert loftq.verify(tmp_path / "typed")["files"] == made["files"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "called")
    theirs = packed.get_base_model().model.layers[0].mlp.up_proj.get_base_layer()
    assert torch.equal(loaded.model.layers[0].mlp.up_proj.dequantize(), theirs.dequantize())


def test_recipes_know_codes_and_presets_registered_later():
    """In a process of its own, after recipes were imported and read."""
    base = {"model": "m", "task": "sst2", "method": "loftq"}

    def work():
        parse({**base, "quantization": {"bits": 2}})
        loftq.register_code(Thirds)
        loftq.register_preset("two-steps", steps=2)
        mine = parse({**base, "quantization": {"bits": 2, "code": "thirds", "preset": "two-steps"}}).quantization
        print(mine.code, mine.solver("loftq").steps)

    ended = Child(work).ended()
    assert ended.out.strip() == "thirds 2", ended.err


def test_what_is_refused(own):
    assert loftq.register_preset("two-steps", steps=2, scales="fitted").steps == 2  # as a notebook's cell, run again
    for call, word in (
        (lambda: loftq.register_preset("two-steps", steps=3), "there already"),
        (lambda: loftq.register_preset("loftq", steps=3), "there already"),
        (lambda: loftq.register_preset("Own", steps=3), "small letters"),
        (lambda: loftq.register_preset("own", step=3), "did you mean 'steps'"),
        (lambda: loftq.register_preset("own", metric="all"), "metric must be one of"),
        (lambda: loftq.register_preset("own", seed=3), "svd and seed are options of a run"),
        (lambda: loftq.register_code(Thirds), "there already"),
    ):
        with pytest.raises(UsageError, match=word):
            call()
    assert "own" not in spec.PRESETS
