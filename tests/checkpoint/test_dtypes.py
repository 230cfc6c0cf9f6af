"""What is not quantized, and the adapter, in 16 bits: smaller files, the same model."""

import dataclasses
import json
import shutil

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import loftq
from harness import POLICY, cli, refused, run
from loftq.checkpoint.verify import verify
from loftq.errors import LoftqError, NumericalError, UsageError
from loftq.formats.layouts import PackedLayout
from loftq.planning import Policy
from models import close, outputs, quantize, tensors, tiny

pytestmark = pytest.mark.usefixtures("quick")

ROUNDED = dataclasses.replace(POLICY, dtype="auto", adapter_dtype="bfloat16")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    place = tmp_path_factory.mktemp("dtypes") / "source"
    tiny("llama").save_pretrained(place)
    return place


def test_two_bits_are_smaller_than_sixteen(tmp_path):
    """All of it: an encoder whose table is most of it, in 32 bits, which the table alone would fill."""
    torch.manual_seed(0)
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(**sizes, vocab_size=20_000)).save_pretrained(tmp_path / "source")
    totals = loftq.quantize(tmp_path / "source", tmp_path / "out", bits=2, rank=4)["totals"]
    assert totals["compression"] > 1
    assert totals["largest"]["what"] == "embedding tables"
    assert totals["largest"]["option"] == "--embeddings"
    exact = quantize(tmp_path / "source", tmp_path / "exact")["totals"]
    assert exact["compression"] < 1
    assert totals["largest"]["bytes"] == exact["largest"]["bytes"] / 2
    ended = cli("inspect", tmp_path / "out")
    assert "embedding tables" in ended.out
    assert "smaller with --embeddings" in ended.out


def test_no_option_is_named_for_what_none_makes_smaller(source, tmp_path):
    """Layers that the configuration leaves out are copied as they are."""
    shorter = shutil.copytree(source, tmp_path / "shorter")
    config = json.loads((shorter / "config.json").read_text())
    (shorter / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    largest = loftq.quantize(shorter, tmp_path / "out", bits=2, rank=2, workers=1)["totals"]["largest"]
    assert (largest["what"], largest["option"]) == ("other tensors that are kept", "")


@pytest.mark.sampled(4)
@pytest.mark.parametrize("layout", ["loftq", "dense"])
@pytest.mark.parametrize(
    ("options", "kept", "factors"),
    [
        ({}, torch.bfloat16, torch.bfloat16),
        ({"dtype": "float16", "adapter_dtype": "float16"}, torch.float16, torch.float16),
        ({"dtype": "source", "adapter_dtype": "float32"}, torch.float32, torch.float32),
    ],
    ids=["default", "float16", "source"],
)
def test_files_and_what_they_load_as(source, tmp_path, options, kept, factors, layout):
    """Each tensor is the source's, rounded once; the model computes in the source's dtype, as its config says."""
    options = {"bits": 4, "rank": 4, "workers": 1, "format": layout, **options}
    manifest = loftq.quantize(source, tmp_path / "out", **options)
    stored, original = tensors(tmp_path / "out"), load_file(source / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        wanted = original[name] if name.endswith("norm.weight") else original[name].to(kept)
        assert stored[name].dtype == wanted.dtype
        assert torch.equal(stored[name], wanted)
    assert {t.dtype for t in tensors(tmp_path / "out" / "loftq_init").values()} == {factors}
    if layout == "dense":
        assert stored["model.layers.0.mlp.up_proj.weight"].dtype == kept
    assert verify(tmp_path / "out") == manifest
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    said = json.loads((tmp_path / "out" / "config.json").read_text())["dtype"]
    assert (said, model.dtype, model.lm_head.weight.dtype) == ("float32", torch.float32, torch.float32)
    assert torch.equal(model.lm_head.weight, stored["lm_head.weight"].float())
    model = PeftModel.from_pretrained(model, tmp_path / "out", subfolder="loftq_init", is_trainable=True)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}, "master weights"
    quantize(source, tmp_path / "exact", **{**options, "dtype": "source", "adapter_dtype": "float32"})
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "exact")
    exact = PeftModel.from_pretrained(exact, tmp_path / "exact", subfolder="loftq_init")
    assert close(outputs(model.eval()), outputs(exact.eval()), 0.02)  # 2^-9 of bfloat16, through two layers


def test_a_config_without_a_dtype_gets_the_source_s(source, tmp_path):
    """transformers would take that of the first tensor, and compute in it."""
    model = tiny("bert")
    model.save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "config.json"
    config = json.loads(file.read_text())
    assert config.pop("dtype") == "float32"
    file.write_text(json.dumps(config))
    run(tmp_path / "source", tmp_path / "out", policy=ROUNDED)
    assert AutoModel.from_pretrained(tmp_path / "out").dtype == torch.float32


def test_errors_are_those_of_the_tensors_as_written(source, tmp_path):
    """Rounded factors leave a little more than the solver's."""
    exact = run(source, tmp_path / "exact")["matrices"]
    rounded = run(source, tmp_path / "rounded", policy=ROUNDED)["matrices"]
    for a, b in zip(exact, rounded, strict=True):
        assert a["errors"][a["kept"]] != b["errors"][b["kept"]]
        assert a["errors"][a["kept"]] == pytest.approx(b["errors"][b["kept"]], rel=1e-3)


def test_a_budget_counts_the_bytes_that_are_written(source, tmp_path):
    policy = dataclasses.replace(ROUNDED, bits="4", budget="100KB")
    manifest = run(source, tmp_path / "out", policy=policy)
    found = [*tensors(tmp_path / "out").values(), *tensors(tmp_path / "out" / "loftq_init").values()]
    assert manifest["budget"]["chosen"]["bytes"] == sum(t.numel() * t.itemsize for t in found) <= 100_000


def test_values_beyond_float16(source, tmp_path):
    """bfloat16 has the range of float32; float16 is refused, with what to do."""
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"][3, 5] = 1e5
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(weights, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    narrow = dataclasses.replace(ROUNDED, dtype="float16")
    with pytest.raises(
        NumericalError, match=r"lm_head.weight: 1 of \d+ values lie beyond float16; use dtype=.bfloat16."
    ):
        run(tmp_path / "source", tmp_path / "out", policy=narrow)
    run(tmp_path / "source", tmp_path / "out", policy=ROUNDED)  # no work is left that the first would have to finish
    assert tensors(tmp_path / "out")["lm_head.weight"][3, 5] == torch.tensor(1e5).bfloat16()


def test_refused(source, tmp_path):
    refused(cli("quantize", source, "-o", tmp_path / "out", "--dtype", "float8"), 2, "--dtype", "auto, source")
    with pytest.raises(UsageError, match="a model in memory keeps"):
        loftq.get_peft_model(tiny("llama"), bits=2, rank=4, dtype="bfloat16")
    assert Policy().dtype == "auto"


def test_factors_whose_rounding_is_all_that_is_left(tmp_path, monkeypatch):
    """Where W - Q has no more than the rank, the error is what 16 bits lose; a larger one is not written."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=4, intermediate_size=4, num_attention_heads=1, num_hidden_layers=4, vocab_size=8
    )
    model = transformers.BertModel(config)
    with torch.no_grad():
        for layer in (m for m in model.modules() if isinstance(m, torch.nn.Linear)):
            layer.weight[:, 3:] = 0
    model.save_pretrained(tmp_path / "source")
    options = {"bits": 4, "rank": 3, "steps": 1, "workers": 1, "adapter_dtype": "bfloat16"}
    matrices = loftq.quantize(tmp_path / "source", tmp_path / "out", **options)["matrices"]
    rounding = [2 * 2**-8 * 3**0.5 * m["adapter_norm_ratio"] for m in matrices]  # of B and A, which sqrt(rank) spreads
    assert all(
        1e-3 * m["errors"][0] + 1e-6 < m["errors"][m["kept"]] < r for m, r in zip(matrices, rounding, strict=True)
    )
    encode = PackedLayout.encode

    def off(self, matrix, codes):
        return encode(self, matrix, dataclasses.replace(codes, scales={k: v * 1.1 for k, v in codes.scales.items()}))

    monkeypatch.setattr(PackedLayout, "encode", off)
    with pytest.raises(LoftqError, match="the written tensors have errors"):
        loftq.quantize(tmp_path / "source", tmp_path / "wrong", **options)


def test_infinity_in_a_buffer_is_a_limit_and_nan_is_none(source, tmp_path):
    """Of a tensor that is no parameter; a parameter with infinity is refused as before."""
    weights = load_file(source / "model.safetensors")
    limits = torch.tensor([float("inf"), -float("inf"), 1.0])
    for name, values, fits in [
        ("model.limits", limits, True),
        ("model.limits", limits * 0, False),
        ("model.norm.weight", weights["model.norm.weight"].index_fill(0, torch.tensor([3]), float("inf")), False),
    ]:
        place = tmp_path / f"{fits}{name}{values[1]}"
        shutil.copytree(source, place)
        save_file({**weights, name: values}, place / "model.safetensors", {"format": "pt"})
        output = place.with_name(f"{place.name}-out")
        if fits:
            quantize(place, output)
            verify(output)
            assert torch.equal(tensors(output)[name], values)
        else:
            with pytest.raises(NumericalError, match=f"{name}: .* NaN or infinite"):
                quantize(place, output)
