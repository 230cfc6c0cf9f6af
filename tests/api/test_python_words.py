"""Wrong calls from Python: one line, an error of loftq, in Python's words and with no advice of the command line."""

import subprocess
import sys

import numpy as np
import peft
import pytest
import torch
from torch import nn

import loftq
import models
from loftq.errors import InputError, LoftqError, NumericalError, UsageError
from loftq.finetune import recipe

WEIGHT = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))


def refused(call, error=UsageError) -> str:
    with pytest.raises(LoftqError) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is error, message
    assert "\n" not in message
    assert "--" not in message
    return message


WEIGHTS = {
    "vector": (WEIGHT[0], r"got shape (40,)"),
    "three sides": (WEIGHT.view(2, 12, 40), "weight.flatten(1)"),
    "kernel": (WEIGHT.view(2, 12, 8, 5), "weight.flatten(1)"),
    "no rows": (WEIGHT[:0], "got shape (0, 40)"),
    "integers": (WEIGHT.to(torch.int8), "got int8"),
    "truths": (WEIGHT > 0, "got bool"),
    "complex": (WEIGHT.to(torch.complex64), "got complex64"),
    "float8": (WEIGHT.to(torch.float8_e4m3fn), "got float8_e4m3fn"),
    "sparse": (WEIGHT.to_sparse(), "got a sparse_coo tensor"),
    "meta": (WEIGHT.to("meta"), "meta device"),
    "list": (WEIGHT.tolist(), "got list"),
    "layer": (nn.Linear(4, 4), "got Linear"),
    "nothing": (None, "got NoneType"),
    "array of integers": (np.arange(12).reshape(3, 4), "got int64"),
    "array of objects": (np.array([[None, None]]), "numpy array of object"),
    "array in three": (np.zeros((2, 3, 4)), "got shape (2, 3, 4)"),
}


@pytest.mark.parametrize("what", WEIGHTS)
def test_a_weight_that_is_none(what):
    weight, word = WEIGHTS[what]
    assert word in refused(lambda: loftq.quantize_weight(weight, rank=2))


def test_a_weight_that_is_not_finite():
    assert "NaN or infinite" in refused(lambda: loftq.quantize_weight(WEIGHT / 0), NumericalError)


@pytest.mark.parametrize(
    "array",
    [WEIGHT.numpy(), WEIGHT.double().numpy(), WEIGHT.numpy().copy("F"), WEIGHT.numpy().astype(">f4")],
    ids=["float32", "float64", "by columns", "other byte order"],
)
def test_a_numpy_array_is_as_good_as_a_tensor(array):
    ours, plain = (loftq.quantize_weight(w, rank=2) for w in (array, WEIGHT.clone().requires_grad_()))
    assert torch.equal(ours.quantized.codes, plain.quantized.codes)
    assert torch.equal(ours.b, plain.b)
    backwards = loftq.quantize_weight(array[::-1], rank=2)
    assert torch.equal(backwards.quantized.codes, plain.quantized.codes.flip(0))


def test_values_of_numpy_and_torch_are_as_good_as_pythons():
    integer, real = np.int64(4), np.float32(2.5)
    plain = loftq.quantize_weight(WEIGHT, bits=4, rank=4, block_size=16, scale_dtype="float32", seed=1)
    options = {"block_size": np.uint8(16), "scale_dtype": torch.float32, "seed": np.int32(1)}
    ours = loftq.quantize_weight(WEIGHT, bits=integer, rank=integer, double_quant=np.False_, **options)
    assert repr(ours) == repr(plain)
    assert torch.equal(ours.b, plain.b)
    policy = loftq.Policy(bits=real, rank=integer, alpha=real, dtype=torch.bfloat16, budget_ranks=np.array([]))
    assert policy == loftq.Policy(bits=2.5, rank=4, alpha=2.5, dtype="bfloat16")
    values = {"model": "m", "task": "sst2", "method": "loftq", "training": {"max_steps": integer}}
    lora = {"rank": np.arange(3)[2], "alpha": np.float64(8)}
    read = recipe.parse({**values, "lora": lora}, changes={"seed": integer, "quantization": {"bits": real}})
    same = {**values, "training": {"max_steps": 4}, "lora": {"rank": 2, "alpha": 8.0}, "seed": 4}
    assert repr(read) == repr(recipe.parse({**same, "quantization": {"bits": 2.5}}))


OPTIONS = [
    ({"bit": 2}, "did you mean 'bits'?"),
    ({"step": 2}, "did you mean 'steps'?"),
    ({"something": 2}, "it has weight, bits"),
    ({"bits": "4"}, "bits must be one of 2, 3, 4, 8, or a multiple of 1/16 up to 4 for code trellis, got '4'"),
    ({"bits": 4.0}, "got 4.0"),
    ({"bits": True}, "got True"),
    ({"rank": 25}, "give rank=24 or less"),
    ({"rank": "4"}, "rank must be a whole number of at least 1, got '4'"),
    ({"rank": 4.0}, "got 4.0"),
    ({"steps": 2.5}, "steps must be"),
    ({"block_size": "64"}, "block_size must be"),
    ({"double_quant": 1}, "double_quant must be true or false"),
    ({"preset": "clog"}, "preset must be one of"),
    ({"svd": np.int64(1)}, "svd must be one of auto, exact, randomized, got 1"),
    ({"preset": "cloq"}, "preset cloq needs statistics of the matrices' inputs; give moments=loftq.calibrate("),
    ({"preset": "qlora", "steps": 3}, "use preset='fitted'"),
    ({"preset": "descent", "order": "svd-first"}, "choose preset='fitted'"),
    ({"moments": {}}, "got dict"),
]


@pytest.mark.parametrize(("options", "word"), OPTIONS, ids=str)
def test_an_option_that_cannot_be_meant(options, word):
    assert word in refused(lambda: loftq.quantize_weight(WEIGHT, **options))


MODEL = [
    ({"bit": 2}, "get_peft_model has no option 'bit'; did you mean 'bits'?"),
    ({"lora_alpha": 8}, "did you mean 'alpha'?"),
    ({"bits": 5}, "bits: 5 is not a width"),
    ({"bits": None, "rank": [4]}, "rank: wanted a number or text, got [4]"),
    ({"rank": 500}, "give a smaller rank, or rank_policy='clamp'"),
    ({"rank": 4.5}, "rank: 4.5 is not a whole number"),
    ({"alpha": "16"}, "alpha: '16' is not a number"),
    ({"rslora": "no"}, "rslora must be true or false"),
    ({"preset": "cloq"}, "give calibration=loftq.calibrate(model, texts, tokenizer)"),
    ({"calibration": 3}, "calibration: wanted a path, got int"),
    ({"workers": "2"}, "workers must be"),
    ({"min_coverage": 2}, "min_coverage must lie between 0 and 1"),
    ({"budget": 2.5}, "use loftq.quantize"),
]


@pytest.fixture(scope="module")
def model():
    return models.tiny("llama")


@pytest.mark.parametrize(("options", "word"), MODEL, ids=str)
def test_an_option_of_get_peft_model(model, options, word):
    assert word in refused(lambda: loftq.get_peft_model(model, progress=False, **options))
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear


def test_what_get_peft_model_cannot_take(model):
    for other in (nn.Linear(8, 8), "org/model", None):
        assert "wanted a model of transformers" in refused(lambda other=other: loftq.get_peft_model(other))
    adapted = peft.get_peft_model(models.tiny("llama"), peft.LoraConfig(target_modules="all-linear"))
    for wrapped in (adapted, adapted.get_base_model()):
        assert "has an adapter already" in refused(lambda wrapped=wrapped: loftq.get_peft_model(wrapped))
    packed = loftq.get_peft_model(models.tiny("llama"), rank=4, steps=0, preset="loftq", progress=False)
    assert "quantized already (loftq)" in refused(lambda: loftq.get_peft_model(packed.unload()))
    assert "loftq.quantize(MODEL, output=DIR)" in refused(lambda: loftq.get_peft_model(model.to("meta")))


def test_every_call_refuses_bad_input_in_pythons_words(tmp_path):
    model = models.tiny("llama")
    model.save_pretrained(tmp_path / "source")
    quantize = lambda *args, **options: lambda: loftq.quantize(*args, **options)  # noqa: E731
    assert "get_peft_model" in refused(quantize(model, tmp_path / "out"))
    assert "output: wanted a path" in refused(quantize(tmp_path / "source", None))
    assert "did you mean 'max_shard_bytes'?" in refused(quantize("source", "out", max_shard_size=3))
    assert "max_shard_bytes must be" in refused(quantize(tmp_path / "source", "out", max_shard_bytes="1GB"))
    assert "format must be one of" in refused(quantize(tmp_path / "source", "out", format="gguf"))
    assert "choose another output" in refused(quantize(tmp_path / "source", tmp_path / "source"))
    assert "give one: budget=2.5" in refused(quantize(tmp_path / "source", tmp_path / "out", rank=4, curves="c.json"))
    assert "did you mean 'weights'?" in refused(lambda: loftq.replace_lora_weights(model, weight="x"))
    assert "PeftModel" in refused(lambda: loftq.replace_lora_weights(model, tmp_path / "source", progress=False))
    assert "did you mean 'kind'?" in refused(lambda: loftq.calibrate(model, ["a"], kin="full"))
    for call in (loftq.plan, loftq.inspect, loftq.verify, loftq.status, loftq.evaluate):
        assert "wanted a path, got LlamaForCausalLM in memory" in refused(lambda call=call: call(model))
        assert "wanted a path, got an empty text" in refused(lambda call=call: call(" "))
    packed = loftq.get_peft_model(models.tiny("llama"), rank=4, steps=0, preset="loftq", progress=False)
    for odd in (packed, packed.get_base_model()):
        assert "has an adapter already" in refused(lambda odd=odd: loftq.calibrate(odd, ["a"], progress=False))
    for odd, word in (
        (packed.unload(), "quantized already (loftq); load"),
        (models.tiny("llama").to("meta"), "shapes"),
    ):
        assert word in refused(lambda odd=odd: loftq.calibrate(odd, ["a"], progress=False))
    assert "got Linear" in refused(lambda: loftq.calibrate(nn.Linear(2, 2), ["a"], progress=False))
    assert "samples must be" in refused(lambda: loftq.calibrate(model, ["a"], samples="4", progress=False))
    assert "got int" in refused(lambda: loftq.calibrate(model, 3, progress=False))
    assert "got list" in refused(lambda: loftq.calibrate(model, [[1, 2]], progress=False))
    assert "device: wanted text, got 0" in refused(quantize(tmp_path / "source", tmp_path / "out", device=0))
    for option in ({"output": "x"}, {"revision": "main"}, {"device": "cuda"}):
        told = refused(lambda option=option: loftq.calibrate(model, ["a"], progress=False, **option))
        assert f"{next(iter(option))}: only for a checkpoint on disk, and this model is in memory" in told
    assert "give output=DIR" in refused(lambda: loftq.calibrate("org/model", "notes.txt"))
    assert "data: wanted a path, got list" in refused(
        lambda: loftq.calibrate("org/model", ["a"], output=tmp_path / "s")
    )
    assert "need a tokenizer" in refused(lambda: loftq.calibrate(model, ["a"], progress=False))
    assert "no packed layers" in refused(lambda: loftq.load_start(model, tmp_path / "source"))
    assert "'blocksize'; did you mean 'block_size'?" in refused(lambda: loftq.Policy(blocksize=3))
    assert "SolveSpec has no option 'step'" in refused(lambda: loftq.SolveSpec(step=3))
    assert "statistics.json" in refused(lambda: loftq.get_peft_model(model, calibration=tmp_path), InputError)


@pytest.mark.slow
def test_the_public_names_are_listed_and_stay_what_they_are():
    """In a new process: other tests have imported every part."""
    code = (
        "import sys, loftq; assert 'torch' not in sys.modules; assert set(loftq.__all__) <= set(dir(loftq));"
        "first = {n: getattr(loftq, n) for n in loftq.__all__};"
        "import loftq.cli, loftq.checkpoint.quantize;"
        "assert all(getattr(loftq, n) is first[n] and callable(first[n]) for n in first); print(len(first))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stdout.strip() == str(len(loftq.__all__)), ended.stderr
    assert "kernels-community" not in ended.stderr  # what bitsandbytes says on import, where PEFT imports it for us
