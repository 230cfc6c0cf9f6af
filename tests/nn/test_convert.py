"""``loftq.get_peft_model``: the model in memory becomes what the checkpoint on disk would be."""

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

import loftq
from loftq.errors import InputError, NumericalError, UsageError
from loftq.nn.layers import LoftQEmbedding
from models import FAMILIES, inputs, outputs, packed, same, tensors, tiny

# peft 0.18 looks for the configuration of a base model that has no name.
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in  -:UserWarning")

ROWS = [
    ("llama", {"bits": 2, "rank": 4}),
    ("llama-deep", {"bits": "2.5", "rank": "mlp=5,3", "alpha": 7.5}),
    ("gpt2", {"bits": 3, "rank": 4, "rslora": True, "double_quant": True}),
    ("bert", {"bits": 4, "rank": 4, "embeddings": True, "code": "affine"}),
    ("bert-mlm", {"bits": 2, "rank": 4, "svd": "randomized"}),
    ("t5", {"bits": 8, "rank": 4, "steps": 0}),
    ("deberta-v3", {"bits": "layer.0=16,2", "rank": 4}),
]
QUICK = ("llama", "gpt2", "bert")
EACH = pytest.mark.parametrize(
    ("name", "options"),
    [pytest.param(*row, id=row[0], marks=[] if row[0] in QUICK else pytest.mark.slow) for row in ROWS],
)


def converted(model, **options):
    return loftq.get_peft_model(model, progress=False, **{"workers": 1, **options})


def norms(model, before):
    """``||W - Q - s * B @ A||`` of every packed layer, from the model alone; ``||W - Q||`` without its adapter."""
    errors, plain = {}, {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            plain_name = name.removeprefix("base_model.model.")
            weight, q = before[f"{plain_name}.weight"], module.base_layer.dequantize()
            errors[plain_name] = (weight - q - module.get_delta_weight("default")).norm().item()
            plain[plain_name] = (weight - q).norm().item()
    return errors, plain


@EACH
def test_codes_factors_and_configuration_are_those_on_disk(made, name, options, tmp_path):
    checkpoint = made(name, **options)
    model = converted(copy.deepcopy(checkpoint.dense), **options)
    assert same(model.get_base_model().state_dict(), checkpoint.start().get_base_model().state_dict())
    model.save_pretrained(tmp_path)  # PEFT names the class of a model without a task only now
    places = (tmp_path, checkpoint.output / "loftq_init")
    ours, theirs = (LoraConfig.from_pretrained(place).to_dict() for place in places)
    assert ours | {"base_model_name_or_path": None} == theirs | {"base_model_name_or_path": None}
    config = model.config.quantization_config.to_dict()
    assert config == checkpoint.load().config.quantization_config.to_dict()
    with torch.no_grad():
        assert torch.equal(outputs(model), outputs(checkpoint.start()))


@EACH
def test_saved_it_loads(made, name, options, tmp_path):
    checkpoint = made(name, **options)
    model = converted(copy.deepcopy(checkpoint.dense), **options)
    with torch.no_grad():
        wanted = outputs(model)
    model.save_pretrained(tmp_path / "loftq_init")
    model.unload().save_pretrained(tmp_path)
    assert same(tensors(tmp_path), tensors(checkpoint.output))
    again = checkpoint.family.auto_class.from_pretrained(tmp_path)
    assert again.dtype == torch.float32
    start = PeftModel.from_pretrained(again, tmp_path, subfolder="loftq_init")
    with torch.no_grad():
        assert torch.equal(outputs(start), wanted)


def test_the_adapter_does_not_name_the_dense_checkpoint(made, tmp_path):
    checkpoint = made("llama")
    dense = checkpoint.family.auto_class.from_pretrained(checkpoint.source)
    converted(dense, bits=2, rank=4).save_pretrained(tmp_path)
    assert str(checkpoint.source) not in (tmp_path / "adapter_config.json").read_text()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("rslora", [False, True])
def test_the_error_does_not_depend_on_the_scaling(rslora):
    before = {n: t.clone() for n, t in tiny("llama").state_dict().items()}
    found = []
    for ratio in (0.25, 0.5, 1, 2):
        model = converted(tiny("llama"), bits=2, rank="mlp=8,4", alpha=4 * ratio, rslora=rslora)
        errors, plain = norms(model, before)
        assert len(errors) == 14
        assert all(error < 0.9 * plain[n] for n, error in errors.items())
        found.append(errors)
    for errors in found[1:]:
        assert errors == pytest.approx(found[0], rel=1e-4)


def test_a_pattern_of_ranks_reaches_the_adapter():
    model = converted(tiny("llama"), bits=2, rank="layers.1.mlp=7,self_attn.[kv]_proj=3,5")
    ranks = {
        n.split("model.layers.")[1]: m.r["default"] for n, m in model.named_modules() if hasattr(m, "get_delta_weight")
    }
    assert {r for n, r in ranks.items() if n.startswith("1.mlp")} == {7}
    assert {r for n, r in ranks.items() if n.endswith(("k_proj", "v_proj"))} == {3}
    assert {r for n, r in ranks.items() if n.startswith("0.mlp")} == {5}


def test_the_loss_falls_and_only_adapters_train():
    model = converted(tiny("gpt2"), bits=2, rank=4)
    words = inputs(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(4):
        loss = model(**words, labels=words["input_ids"]).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses == sorted(losses, reverse=True)
    assert len({n for n, p in model.named_parameters() if p.requires_grad}) == 2 * FAMILIES["gpt2"].matrices


def test_the_head_of_a_classifier_is_trained_too(tmp_path):
    model = converted(tiny("roberta"), bits=2, rank=4)
    model(**inputs(model), labels=torch.tensor([0, 2])).loss.backward()
    trained = {n.split(".")[2] for n, p in model.named_parameters() if p.grad is not None}
    assert trained == {"roberta", "classifier"}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_in_other_precisions(dtype, workers):
    model = converted(tiny("llama").to(dtype), bits=4, rank=4, embeddings=True, workers=workers)
    assert isinstance(model.get_base_model().get_input_embeddings().base_layer, LoftQEmbedding)
    assert model.get_base_model().dtype == dtype
    assert {m.compute_dtype for m in packed(model).values()} == {dtype}
    with torch.no_grad():
        assert outputs(model).dtype == dtype


def test_dense_weights_are_freed_and_biases_kept():
    dense = tiny("bert")
    bias = dense.encoder.layer[0].output.dense.bias
    model = converted(dense, bits=2, rank=4)
    layer = model.get_base_model().encoder.layer[0].output.dense.base_layer
    assert layer.bias is bias
    assert sum(p.numel() * p.itemsize for p in layer.parameters()) < 72 * 40 * 4 / 8


def test_progress_and_mode():
    model = tiny("gpt2").train()
    wrapped = loftq.get_peft_model(model, bits=2, rank=4, workers=1)
    assert all(module.training for module in wrapped.modules())


def test_a_refusal_leaves_the_model_alone():
    for spoil, error in (
        (lambda m: m.model.layers[1].mlp.down_proj.weight.data[3].fill_(float("nan")), NumericalError),
        (lambda m: None, UsageError),
    ):
        model = tiny("llama")
        spoil(model)
        before = {n: t.clone() for n, t in model.state_dict().items()}
        rank = 4 if error is NumericalError else 36
        with pytest.raises(error, match=r"model\.layers\.[01]\.\S+\.weight"):
            converted(model, bits=2, rank=rank)
        assert not packed(model)
        assert all(torch.equal(t.nan_to_num(), before[n].nan_to_num()) for n, t in model.state_dict().items())


def test_what_is_no_dense_transformers_model_is_refused(made):
    checkpoint = made("llama")
    with pytest.raises(UsageError, match="wanted a model of transformers, got Linear"):
        converted(torch.nn.Linear(8, 8), bits=2, rank=2)
    with pytest.raises(
        UsageError, match="has an adapter already; merge or unload it first, and give the model under it"
    ):
        converted(checkpoint.start(), bits=2, rank=2)
    with pytest.raises(UsageError, match="quantized already"):
        converted(checkpoint.load(), bits=2, rank=2)
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(checkpoint.dense.config)
    with pytest.raises(UsageError, match="meta device or on disk"):
        converted(empty, bits=2, rank=2)
    wrapped = tiny("llama")
    get_peft_model(wrapped, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UsageError, match="has an adapter already; merge or unload it first"):
        converted(wrapped, bits=2, rank=2)


def test_hooks_stay_with_their_layers():
    """Also that of gradient checkpointing, without which no adapter gets a gradient."""
    model, seen = tiny("llama"), []
    model.enable_input_require_grads()
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    handle = layer.register_forward_hook(lambda *args: seen.append(type(args[0]).__name__))
    wrapped = converted(model, rank=4, steps=0, embeddings=True)
    with torch.no_grad():
        wrapped(**inputs(model))
    assert model.get_input_embeddings()(torch.tensor([1])).requires_grad
    handle.remove()
    wrapped.get_base_model().dequantize()(**inputs(model))
    assert seen == ["LoftQLinear"]


def test_experts_may_stay_dense():
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.experts\.\w+_proj \(left dense by"):
        converted(tiny("mixtral"), bits="experts=16,2", rank=4)
    model = converted(tiny("mixtral"), bits="experts=16,2", rank=4, min_coverage=0)
    assert len(packed(model)) == 8
    with torch.no_grad():
        assert outputs(model).isfinite().all()


def test_unknown_options_are_named():
    with pytest.raises(UsageError, match="no option 'bit'; did you mean 'bits'"):
        converted(tiny("llama"), bit=2)


def test_the_state_of_the_adapter_is_only_factors():
    state = get_peft_model_state_dict(converted(tiny("llama"), bits=2, rank=4))
    assert len(state) == 28
    assert all(t.dtype == torch.float32 and t.abs().max() > 0 for t in state.values())
