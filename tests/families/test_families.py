"""Every family: from a dense checkpoint on disk to a packed model that computes, trains, saves and loads again."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from loftq.architecture import skeleton
from loftq.nn.layers import LoftQEmbedding, LoftQLinear
from models import DENSE, FAMILIES, close, outputs, packed, same, tensors, tiny, written

QUICK = ("bert", "deberta-v3", "t5", "gpt2", "llama", "phi3")  # of every way to attend, to name and to fuse one
EACH = pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in DENSE]
)
TABLES = [name for name in DENSE if FAMILIES[name].table]


@EACH
def test_exactly_the_layers_are_packed(made, name):
    checkpoint = made(name)
    model = checkpoint.load()
    planned = {m["module"] for m in checkpoint.manifest["plan"]["matrices"]}
    layers = packed(model)
    assert set(layers) == planned
    assert len(planned) == checkpoint.family.matrices
    assert type(model) is checkpoint.family.model_class
    assert model.hf_quantizer.new_modules == ()
    dense, got = checkpoint.dense.state_dict(), model.state_dict()
    for parameter in dense:
        module = parameter.rpartition(".")[0]
        if module in layers and parameter.endswith(".weight"):
            assert got[parameter].dtype == torch.int8
            assert got[parameter].numel() <= dense[parameter].numel() // 4 + got[parameter].shape[0]
        else:  # norms, biases, embeddings, heads and poolers are the source's
            assert torch.equal(got[parameter], dense[parameter]), parameter
    scales = {f"{module}.weight_scale" for module in layers}
    assert set(got) == set(dense) | scales


@EACH
def test_every_linear_of_the_layers_is_packed(made, name):
    left = {
        module
        for module, m in made(name).load().named_modules()
        if isinstance(m, (nn.Linear, Conv1D)) and not isinstance(m, LoftQLinear)
    }
    heads = {"lm_head", "pooler.dense", "classifier.dense", "classifier.out_proj", "cls.predictions.decoder"}
    assert left <= {*heads, "cls.predictions.transform.dense"}


@EACH
def test_packed_forward_is_that_of_the_dequantized_model(made, name):
    checkpoint = made(name)
    with torch.no_grad():
        assert close(outputs(checkpoint.load()), outputs(checkpoint.backbone()), 1e-6)


@EACH
def test_start_is_near_the_dense_weights_and_computes_them(made, name):
    checkpoint = made(name)
    for module, (q, product) in written(checkpoint.output).items():
        target = checkpoint.dense.get_submodule(module)
        weight = target.weight.T if isinstance(target, Conv1D) else target.weight
        assert (weight - q - product).norm() < 0.9 * (weight - q).norm(), module
    with torch.no_grad():
        assert close(outputs(checkpoint.start()), outputs(checkpoint.started()))


@EACH
def test_gradients_reach_every_factor_and_nothing_else(made, name):
    model = made(name).start()
    outputs(model).square().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name:
            assert parameter.requires_grad
            assert parameter.grad.isfinite().all(), parameter_name
            assert parameter.grad.abs().max() > 0, parameter_name
        else:
            assert not parameter.requires_grad, parameter_name
            assert parameter.grad is None, parameter_name


@EACH
def test_saved_again_the_files_are_the_same(made, name, tmp_path):
    checkpoint = made(name)
    model = checkpoint.load()
    model.save_pretrained(tmp_path)
    assert same(tensors(tmp_path), tensors(checkpoint.output))
    again = type(model).from_pretrained(tmp_path)
    assert packed(again).keys() == packed(model).keys()
    assert again.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(outputs(again), outputs(model))


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", ["bert", "deberta-v3", "bart", "t5", "gpt2", "llama", "gemma"])
@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
def test_loading_in_bfloat16_leaves_codes_and_scales_alone(made, name, scale_dtype):
    checkpoint = made(name, scale_dtype=scale_dtype)
    model = checkpoint.load(dtype=torch.bfloat16)
    stored = tensors(checkpoint.output)
    for module, layer in packed(model).items():
        for suffix, dtype in (("weight", torch.int8), ("weight_scale", getattr(torch, scale_dtype))):
            tensor = layer.get_parameter(suffix)
            assert tensor.dtype == dtype
            assert torch.equal(tensor, stored[f"{module}.{suffix}"])
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        result = outputs(checkpoint.start(model))
        assert result.dtype == torch.bfloat16
        assert close(result.float(), outputs(checkpoint.started()), 0.15)


@pytest.mark.parametrize("name", ["t5", "flan-t5"])
def test_scales_of_layers_that_transformers_keeps_in_float32_stay_as_they_are(made, name):
    model = made(name).load(dtype=torch.float16)  # T5's `wo`
    assert {layer.weight_scale.dtype for layer in packed(model).values()} == {torch.bfloat16}
    with torch.no_grad():
        assert outputs(model).dtype == torch.float16


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", [n for n in DENSE if FAMILIES[n].tied])
def test_tied_tables_stay_tied_and_dense(made, name):
    model = made(name, embeddings=True).load()
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(table, nn.Embedding)
    assert not isinstance(table, LoftQEmbedding)
    assert table.weight is head.weight


def test_a_table_that_scales_what_it_looks_up_stays_dense(made):
    checkpoint = made("gemma-untied", embeddings=True)
    model = checkpoint.load()
    assert type(model.get_input_embeddings()).__name__ == "GemmaTextScaledWordEmbedding"
    kept = {k["name"]: k["reason"] for k in checkpoint.manifest["plan"]["kept"]}
    assert kept["model.embed_tokens.weight"] == "GemmaTextScaledWordEmbedding computes more than a lookup"
    with torch.no_grad():
        assert close(outputs(checkpoint.start(model)), outputs(checkpoint.started()))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", TABLES)
def test_untied_tables_are_packed_if_asked(made, name, tmp_path):
    checkpoint = made(name, embeddings=True)
    model = checkpoint.load()
    assert isinstance(model.get_submodule(checkpoint.family.table), LoftQEmbedding)
    assert model.dtype == torch.float32  # not that of the scales, which are the first floats now
    with torch.no_grad():
        before = outputs(model)
        assert close(before, outputs(checkpoint.backbone()), 1e-6)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(outputs(again), before)
    start = checkpoint.start(model)
    result = outputs(start)
    assert close(result.detach(), outputs(checkpoint.started()).detach())
    result.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in start.parameters() if p.requires_grad)
    factors = {n for n, p in start.named_parameters() if "lora_embedding" in n and p.grad.abs().max() > 0}
    assert any("lora_embedding_A" in n for n in factors)
    assert any("lora_embedding_B" in n for n in factors)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("name", "bits", "widths"),
    [
        ("llama-deep", "2.5", {0: 4, 1: 2, 2: 2, 3: 2}),
        ("llama-deep", "3.0", {0: 4, 1: 4, 2: 2, 3: 2}),
        ("llama", "layers.0=3,8", {0: 3, 1: 8}),
        ("gpt2", "h.1=4,2", {0: 2, 1: 4}),
        ("bert", "layer.0=16,2", {0: None, 1: 2}),
    ],
)
def test_mixed_widths(made, name, bits, widths):
    checkpoint = made(name, bits=bits)
    model = checkpoint.load()
    found = {}
    for module, layer in packed(model).items():
        index = next(int(part) for part in module.split(".") if part.isdecimal())
        found.setdefault(index, set()).add(layer.spec.bits)
    assert found == {index: {width} for index, width in widths.items() if width}
    with torch.no_grad():
        assert close(outputs(checkpoint.start(model)), outputs(checkpoint.started()))


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "options",
    [
        {"bits": 3, "double_quant": True},
        {"bits": 8, "scale_dtype": "float16"},
        {"bits": 4, "code": "affine"},
        {"bits": 4, "code": "uniform"},
        {"bits": 2, "code": "lloyd", "scales": "fitted"},
        {"bits": 3, "code": "affine", "scales": "fitted", "double_quant": True},
        {"bits": 2, "code": "uniform-tensor", "scale_dtype": "float32"},
        {"bits": 2, "block_size": 16, "steps": 0},
        {"bits": 2, "rslora": True, "alpha": 6.5, "rank": "intermediate=3,5"},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_every_way_of_storing_loads(made, name, options):
    if name == "gpt2" and "rank" in options:
        options = {**options, "rank": "c_fc=3,5"}
    checkpoint = made(name, **options)
    with torch.no_grad():
        model = checkpoint.load()
        assert close(outputs(model), outputs(checkpoint.backbone()), 1e-6)
        assert close(outputs(checkpoint.start(model)), outputs(checkpoint.started()))


@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_a_parameter_with_two_names_is_planned_once(name):
    model = tiny(name)
    roles = skeleton.parameter_roles(model)
    assert sum(model.get_parameter(n).numel() for n in roles) == sum(p.numel() for p in model.parameters())
