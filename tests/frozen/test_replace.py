"""``loftq.replace_lora_weights``: adapters over any base, filled from the original on disk."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from bases import BASES, PROJECTIONS, Opaque, bitsandbytes, make_llama, opaque
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, replace_lora_weights_loftq
from peft.tuners.lora.gptq import GPTQLoraLinear
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import loftq
import models
from loftq.errors import InputError, UsageError
from loftq.formats.source import Checkpoint
from loftq.formats.statistics import Group, Statistics
from loftq.frozen.layers import dequantized
from loftq.numerics import Metric, Moments

RANK = 4
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(model, rank=RANK, **options):
    config = LoraConfig(**{"r": rank, "target_modules": LAYERS, **options})
    config._register_custom_module({Opaque: GPTQLoraLinear})  # PEFT's own for GPTQ's layers, without GPTQ's package
    return get_peft_model(model, config)


def replaced(model, weights, **options):
    return loftq.replace_lora_weights(model, weights, progress=False, **options)


def measured(model, source, adapter="default") -> float:
    """The error of all LoRA layers together, from the modules and the file alone."""
    originals, left, norm = load_file(source / "model.safetensors"), 0.0, 0.0
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "lora_A") and adapter in layer.scaling:
            weight = originals[f"{name}.weight"].double()
            base = dequantized(layer.get_base_layer()).double()
            if adapter in layer.lora_embedding_A:
                term = (layer.lora_embedding_B[adapter] @ layer.lora_embedding_A[adapter]).T
            else:
                term = layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight
            if type(layer.get_base_layer()).__name__ == "Conv1D":
                weight = weight.T
            left += (weight - base - layer.scaling[adapter] * term.double()).norm().item() ** 2
            norm += weight.norm().item() ** 2
    return (left / norm) ** 0.5


@pytest.mark.parametrize("base", BASES)
def test_bitsandbytes(source, base):
    model = adapted(bitsandbytes(source, **BASES[base]), lora_alpha=8)
    before = measured(model, source)
    report = replaced(model, source)
    assert len(report["layers"]) == PROJECTIONS
    assert not report["skipped"]
    assert report["error_before"] == pytest.approx(before, rel=1e-5)
    assert report["error"] == pytest.approx(measured(model, source), rel=1e-5)
    assert report["error"] < 0.95 * before
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}


def test_the_outputs_come_closer(source):
    model = adapted(bitsandbytes(source, **BASES["nested"]), rank=16, lora_alpha=32)
    dense, frozen = models.outputs(make_llama()), models.outputs(model.train())
    replaced(model, source)
    assert (models.outputs(model) - dense).norm() < 0.95 * (frozen - dense).norm()


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "options",
    [
        {"lora_alpha": 4},
        {"lora_alpha": 64},
        {"lora_alpha": 16, "use_rslora": True},
        {"lora_alpha": 16, "alpha_pattern": {"up_proj": 1}},
    ],
)
def test_the_error_does_not_depend_on_the_scaling(source, options):
    model = opaque(AutoModelForCausalLM.from_pretrained(source))
    reference = replaced(adapted(model), source)
    scaled = adapted(opaque(AutoModelForCausalLM.from_pretrained(source)), **options)
    report = replaced(scaled, source)
    assert report["error"] == pytest.approx(reference["error"], rel=1e-5)
    assert report["error"] == pytest.approx(measured(scaled, source), rel=1e-5)
    layer = scaled.get_base_model().model.layers[0].self_attn.q_proj
    ratio = layer.lora_B["default"].weight.norm() / layer.lora_A["default"].weight.norm()
    assert 0.3 < ratio < 3, "divided out of both factors evenly"


def test_rank_patterns(source):
    model = adapted(bitsandbytes(source, **BASES["nf4"]), rank_pattern={"up_proj": 16}, lora_alpha=12)
    report = replaced(model, source)
    ranks = {r["name"].rpartition(".")[2]: (r["rank"], r["scaling"]) for r in report["layers"]}
    assert ranks["up_proj"] == (16, 0.75)
    assert ranks["q_proj"] == (RANK, 3.0)
    assert report["error"] == pytest.approx(measured(model, source), rel=1e-5)


@pytest.fixture
def cuda_is_cpu(monkeypatch):
    """PEFT's own function computes on "cuda" whatever there is."""
    move = torch.Tensor.to

    def to(self, *args, **kwargs):
        return move(self, *args, **{k: "cpu" if v == "cuda" else v for k, v in kwargs.items()})

    monkeypatch.setattr(torch.Tensor, "to", to)


@pytest.mark.parametrize("ratio", [1, 2])
def test_peft_replaces_them_right_only_without_a_scaling(source, ratio, cuda_is_cpu):
    def start():
        return adapted(bitsandbytes(source, **BASES["nf4"]), lora_alpha=ratio * RANK)

    ours, theirs = start(), start()
    error, before = replaced(ours, source)["error"], measured(theirs, source)
    replace_lora_weights_loftq(theirs, str(source / "model.safetensors"))
    if ratio == 1:
        assert error <= measured(theirs, source) * (1 + 1e-6)
    else:
        assert error < 0.95 * before
        assert error < 0.95 * measured(theirs, source)


def test_a_layer_that_has_only_a_forward(source):
    model = adapted(opaque(AutoModelForCausalLM.from_pretrained(source)), target_modules=["q_proj", "down_proj"])
    report = replaced(model, source)
    assert len(report["layers"]) == 4
    assert report["error"] == pytest.approx(measured(model, source), rel=1e-5)
    assert report["error"] < report["error_before"]


def test_ours_from_a_zero_start(source, tmp_path):
    """QLoRA's packed base, given the term afterwards, is LoftQ's of one step."""
    manifest = models.quantize(source, tmp_path / "one", steps=1, rank=RANK)
    models.quantize(source, tmp_path / "zero", steps=0, rank=RANK, embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "zero")
    report = replaced(adapted(model), source)
    assert report["error"] == pytest.approx(manifest["totals"]["error"], rel=1e-3)
    table = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "zero"), target_modules=["embed_tokens"])
    report = replaced(table, source)
    assert report["layers"][0]["shape"] == [models.VOCAB, 64]
    assert report["error"] < report["error_before"]
    assert report["error"] == pytest.approx(measured(table, source), rel=1e-5)


def rounded(model):
    """A dense base: weights on a coarse grid."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_((parameter * 30).round() / 30)
    return model


def test_conv1d_layers_are_initialized(tmp_path):
    dense = models.tiny("gpt2")
    dense.save_pretrained(tmp_path)
    model = rounded(AutoModelForCausalLM.from_pretrained(tmp_path))
    frozen = models.outputs(model)
    model = adapted(model, rank=36, target_modules=["c_attn", "c_proj", "c_fc", "wte"], fan_in_fan_out=True)
    report = replaced(model, tmp_path)
    assert len(report["layers"]) == 9
    assert report["error"] < 0.7 * report["error_before"]
    wanted = models.outputs(dense)
    assert (models.outputs(model) - wanted).norm() < 0.8 * (frozen - wanted).norm()


def test_a_base_that_is_the_original(source):
    model = adapted(AutoModelForCausalLM.from_pretrained(source))
    report = replaced(model, source)
    assert {r["reason"] for r in report["layers"]} == {"the base is the original"}
    state = get_peft_model_state_dict(model)
    assert not any(t.any() for n, t in state.items() if "lora_B" in n)
    assert all(t.any() for n, t in state.items() if "lora_A" in n)


def test_only_the_named_adapter_and_only_its_factors(source):
    model = adapted(rounded(AutoModelForCausalLM.from_pretrained(source)), modules_to_save=["lm_head"])
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    before = {n: p.clone() for n, p in model.named_parameters()}
    report = replaced(model, source, adapter_name="second")
    assert [r["rank"] for r in report["layers"]] == [2, 2]
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert len(changed) == 4
    assert all("second" in n and "lora_" in n for n in changed)
    assert report["error"] == pytest.approx(measured(model, source, "second"), rel=1e-5)


def test_bfloat16_adapters_are_measured_as_they_are(source):
    model = rounded(AutoModelForCausalLM.from_pretrained(source)).bfloat16()
    model = get_peft_model(model, LoraConfig(r=RANK, target_modules=["q_proj"]), autocast_adapter_dtype=False)
    report = replaced(model, source)
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.bfloat16}
    assert report["error"] == pytest.approx(measured(model, source), rel=1e-5)


def test_a_classifier_over_the_same_base(source):
    """Names with and without the prefix; a head that the original does not have keeps its adapter."""
    model = rounded(AutoModelForSequenceClassification.from_pretrained(source, num_labels=9))
    model = adapted(model, target_modules=["q_proj", "score"])
    report = replaced(model, source)
    assert len(report["layers"]) == 2
    assert list(report["skipped"]) == ["score"]
    model = adapted(rounded(AutoModel.from_pretrained(source)), target_modules=["q_proj"])
    assert replaced(model, source)["error"] == pytest.approx(report["error"])


def test_moments_choose_the_metric(source):
    name, start = "model.layers.0.mlp.up_proj", {}
    known = Metric(columns=torch.logspace(-3, 3, 64))
    for calibration in (None, Statistics.of("diagonal", [Group((name,), Moments(known, known, 1000), 300)], 4)):
        model = adapted(rounded(AutoModelForCausalLM.from_pretrained(source)), target_modules=["up_proj"])
        report = replaced(model, source, calibration=calibration)
        start[calibration is None] = {r["name"]: r for r in report["layers"]}
    other = "model.layers.1.mlp.up_proj"
    assert start[True][other] == start[False][other]
    assert start[False][name]["errors"][1] > start[True][name]["errors"][1]
    assert start[False][name]["output_errors"][1] < start[False][name]["output_errors"][0]


def test_one_matrix_of_the_original_at_a_time(source, monkeypatch):
    """Read once each, in turn, and gone before the next one is read."""
    import weakref

    alive, read = [], []
    whole = Checkpoint.read

    def watched(self, name, *how):
        assert not any(r() is not None for r in alive), f"{read[-1]} is still in memory"
        tensor = whole(self, name, *how)
        alive.append(weakref.ref(tensor.untyped_storage()))
        read.append(name)
        return tensor

    monkeypatch.setattr(Checkpoint, "read", watched)
    replaced(adapted(opaque(AutoModelForCausalLM.from_pretrained(source))), source)
    assert len(read) == len(set(read)) == PROJECTIONS


def test_twice_gives_the_same(source):
    model = adapted(rounded(AutoModelForCausalLM.from_pretrained(source)))
    states = []
    for _ in range(2):
        replaced(model, source)
        states.append({n: t.clone() for n, t in get_peft_model_state_dict(model).items()})
    assert models.same(*states), "what the adapter held before does not matter"


# What cannot be done


@pytest.fixture
def frozen(source):
    return adapted(rounded(AutoModelForCausalLM.from_pretrained(source)))


def refused_unchanged(model, weights, error, match, **options):
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(error, match=match):
        replaced(model, weights, **options)
    assert models.same(before, {n: p.detach() for n, p in model.named_parameters()})


def test_weights_of_another_model(frozen, source, tmp_path):
    make_llama(seed=5).save_pretrained(tmp_path / "seed")
    refused_unchanged(frozen, tmp_path / "seed", InputError, r"layers.0.*another model's\?")
    models.tiny("llama").save_pretrained(tmp_path / "size")
    refused_unchanged(frozen, tmp_path / "size", InputError, r"q_proj.weight is \(72, 72\), the layer \(64, 64\)")
    models.tiny("bert").save_pretrained(tmp_path / "family")
    refused_unchanged(frozen, tmp_path / "family", InputError, r"no weights for it; is it of another model\?")
    models.quantize(source, tmp_path / "quantized")
    refused_unchanged(frozen, tmp_path / "quantized", InputError, "give the full-precision checkpoint")


def test_a_damaged_original(frozen, source, tmp_path):
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    tensors, last = load_file(source / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    save_file({n: t for n, t in tensors.items() if n != last}, copy / "model.safetensors")
    refused_unchanged(frozen, copy, InputError, "layers.1.mlp.up_proj.*no weights for it")
    save_file({**tensors, last: tensors[last].to(torch.float8_e4m3fn)}, copy / "model.safetensors")
    refused_unchanged(frozen, copy, InputError, "up_proj.weight: F8_E4M3; wanted one of")
    (copy / "config.json").unlink()
    refused_unchanged(frozen, copy, InputError, "config.json: missing")


def test_models_and_adapters_that_have_no_such_start(frozen, source):
    with pytest.raises(UsageError, match="wanted a PeftModel, got LlamaForCausalLM"):
        replaced(AutoModelForCausalLM.from_pretrained(source), source)
    with pytest.raises(UsageError, match="no adapter 'other'; the model has default"):
        replaced(frozen, source, adapter_name="other")
    with pytest.raises(UsageError, match="DoraLinear multiplies by more than"):
        replaced(adapted(AutoModelForCausalLM.from_pretrained(source), use_dora=True), source)
    frozen.merge_adapter()
    with pytest.raises(UsageError, match="merged"):
        replaced(frozen, source)


def test_a_rank_that_no_matrix_has(source):
    model = adapted(rounded(AutoModelForCausalLM.from_pretrained(source)), rank_pattern={"v_proj": 100})
    report = replaced(model, source)
    assert len(report["skipped"]) == 2
    assert all("rank 100 does not fit" in reason for reason in report["skipped"].values())


def test_the_report_is_json(frozen, source):
    assert json.loads(json.dumps(replaced(frozen, source)))["error"] > 0
