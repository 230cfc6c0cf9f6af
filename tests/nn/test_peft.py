"""PEFT over packed layers: merging and back, unloading, several adapters, and what is refused."""

import pytest
import torch
import transformers
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from peft.utils.warning import PeftWarning
from torch import nn

from loftq.adapters.peft import LoftQLoraEmbedding, LoftQLoraLinear
from loftq.errors import UsageError
from loftq.nn.layers import LoftQLinear
from models import close, outputs, packed, same, tensors

ROWS = [("llama", {"bits": 2}), ("bert", {"bits": 8, "embeddings": True}), ("gpt2", {"bits": 3})]
EACH = pytest.mark.parametrize(("name", "options"), ROWS, ids=[name for name, _ in ROWS])
FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")


def fresh(**options):
    return LoraConfig(**{"r": 3, "target_modules": "all-linear", **options})


@torch.no_grad()
def result(model):
    return outputs(model)


@pytest.mark.sampled(3)
@EACH
def test_our_layers_wrap_every_packed_one(made, name, options):
    checkpoint = made(name, **options)
    model = checkpoint.start()
    wrapped = [m for m in model.modules() if isinstance(m, (LoftQLoraLinear, LoftQLoraEmbedding))]
    assert len(wrapped) == len(packed(model)) == len(checkpoint.manifest["plan"]["matrices"])


@EACH
@pytest.mark.parametrize("safe", [False, True])
def test_merged_it_computes_the_same_and_unmerged_it_is_as_before(made, name, options, safe):
    checkpoint = made(name, **options)
    model = checkpoint.start()
    before, state = result(model), {n: t.clone() for n, t in model.state_dict().items()}
    model.merge_adapter(safe_merge=safe)
    assert not packed(model)
    assert close(result(model), result(checkpoint.started()))
    model.unmerge_adapter()
    assert same(model.state_dict(), state)
    assert torch.equal(result(model), before)


@EACH
def test_merged_and_unloaded_it_is_a_plain_dense_model(made, name, options, tmp_path):
    checkpoint = made(name, **options)
    model = checkpoint.start().merge_and_unload()
    wanted = checkpoint.started()
    assert type(model) is type(wanted)
    assert not packed(model)
    assert not hasattr(model.config, "quantization_config")
    assert not model.is_quantized
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    again = checkpoint.family.auto_class.from_pretrained(tmp_path)
    assert torch.equal(result(again), result(model))
    assert close(result(again), result(wanted))
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in wanted.named_modules()}


@EACH
def test_unloaded_it_is_the_packed_model_again(made, name, options, tmp_path):
    checkpoint = made(name, **options)
    model = checkpoint.start().unload()
    assert torch.equal(result(model), result(checkpoint.load()))
    model.save_pretrained(tmp_path)
    assert same(tensors(tmp_path), tensors(checkpoint.output))
    assert torch.equal(result(type(model).from_pretrained(tmp_path)), result(model))


def test_partly_merged_it_lists_what_is_packed_still(made, tmp_path):
    checkpoint = made("llama")
    model = get_peft_model(checkpoint.load(), fresh(target_modules=["q_proj", "down_proj"]))
    model.load_state_dict({n: torch.randn_like(p) for n, p in model.state_dict().items() if "lora_" in n}, strict=False)
    wanted = result(model)
    merged = model.merge_and_unload()
    assert len(packed(merged)) == 10
    assert close(result(merged), wanted)
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path)
    assert packed(again).keys() == packed(merged).keys()
    assert torch.equal(result(again), result(merged))


def test_a_base_is_not_saved_with_the_layers_of_peft_around_its_own(made, tmp_path):
    """Its names would be found by no load."""
    checkpoint = made("bert", bits=8, embeddings=True)
    model = get_peft_model(checkpoint.load(), fresh(target_modules=["word_embeddings", "query"]))
    model.merge_adapter()
    with pytest.raises(UsageError, match=r"word_embeddings.base_layer.weight: PEFT's layers .* merge_and_unload\(\)"):
        model.get_base_model().save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_dequantized_it_is_a_plain_dense_model(made, name, tmp_path):
    checkpoint = made(name)
    for dtype in (torch.float32, torch.bfloat16):
        model = checkpoint.load(dtype=dtype).dequantize()
        assert not packed(model)
        assert {p.dtype for p in model.parameters()} == {dtype}
        if dtype == torch.float32:
            assert torch.equal(result(model), result(checkpoint.backbone()))
            assert same(model.state_dict(), checkpoint.backbone().state_dict())
        model.save_pretrained(tmp_path)
        assert torch.equal(result(type(model).from_pretrained(tmp_path)), result(model))


def test_adapters_go_off_and_on(made):
    checkpoint = made("llama")
    model = checkpoint.start()
    start, backbone = result(model), result(checkpoint.load())
    with model.disable_adapter():
        assert torch.equal(result(model), backbone)
    assert torch.equal(result(model), start)
    model.merge_adapter()
    with model.disable_adapter():  # PEFT unmerges first
        assert torch.equal(result(model), backbone)
    assert torch.equal(result(model), start)


def test_several_adapters(made):
    checkpoint = made("bert", embeddings=True)
    model = checkpoint.start()
    start = result(model)
    model.load_adapter(checkpoint.output, "again", subfolder="loftq_init")
    model.add_adapter("new", fresh(target_modules=["query", "value"]))
    model.set_adapter("again")
    assert torch.equal(result(model), start)
    model.set_adapter("new")
    assert torch.equal(result(model), result(checkpoint.load()))  # B is zero
    model.base_model.set_adapter(["default", "new"])
    assert torch.equal(result(model), start)
    model.merge_adapter(adapter_names=["default"])
    assert close(result(model), start)
    with pytest.warns(UserWarning, match="Already following adapters were merged default"):
        model.merge_adapter(adapter_names=["again"])
    twice = result(model)
    assert not close(twice, start, 1e-3)
    model.unmerge_adapter()
    assert torch.equal(result(model), start)
    model.delete_adapter("again")
    model.set_adapter("default")
    assert torch.equal(result(model), start)


def test_a_broken_adapter_is_not_merged(made):
    model = made("llama").start()
    before = packed(model).keys()
    layer = next(m for m in model.modules() if isinstance(m, LoftQLoraLinear))
    good = layer.lora_B["default"].weight.data.clone()
    layer.lora_B["default"].weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)
    layer.lora_B["default"].weight.data = good
    assert packed(model).keys() == before


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_a_new_adapter_over_all_linear_layers(made, bias):
    checkpoint = made("bert")
    model = get_peft_model(checkpoint.load(), fresh(bias=bias, lora_bias=bias == "lora_only"))
    assert len([m for m in model.modules() if isinstance(m, LoftQLoraLinear)]) == checkpoint.family.matrices
    outputs(model).square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if "lora_B" in n and "pooler" not in n}
    assert all(grad is not None and grad.isfinite().all() for grad in grads.values())
    assert all(p.grad is None for n, p in model.named_parameters() if n.endswith(("base_layer.weight", "weight_scale")))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)  # larger ones magnify the rounding of a merged weight
    wanted = result(model)
    model.merge_adapter()
    assert close(result(model), wanted)


def test_fan_in_fan_out_means_nothing_to_a_packed_layer(made):
    checkpoint = made("gpt2")
    model = get_peft_model(checkpoint.load(), fresh(target_modules=["c_fc", "c_proj"], fan_in_fan_out=True))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    wanted = result(model)
    model.merge_adapter()
    assert close(result(model), wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "DoRA needs the norms of a dense weight and does not work on a packed one"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' reads a dense weight, and this one is packed"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' reads a dense weight"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' reads a dense weight"),
        (  # r=3: the start's rank is 4
            {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
            "the LoftQ initialization has other ranks than LoraConfig",
        ),
        ({"init_lora_weights": "mica"}, "init_lora_weights='mica' reads a dense weight"),
        ({"init_lora_weights": "orthogonal"}, "init_lora_weights='orthogonal' reads a dense weight"),
    ],
    ids=lambda value: next(iter(value.values())) if isinstance(value, dict) else None,
)
@pytest.mark.parametrize("second", [False, True])
def test_what_reads_a_dense_weight_is_refused(made, options, message, second):
    checkpoint = made("llama")
    started, config = checkpoint.start() if second else None, fresh(**options)
    with pytest.raises(UsageError, match=message) as refused:
        started.add_adapter("second", config) if second else get_peft_model(checkpoint.load(), config)
    assert "\n" not in str(refused.value)


def test_codes_are_no_target_parameters(made):
    checkpoint = made("llama")
    for options in ({"target_modules": []}, {}, {"target_modules": ["q_proj"]}):
        for name in ("mlp.down_proj.weight", "q_proj.weight_scale"):
            config = fresh(**options, target_parameters=[name])
            message = rf"target_parameters names model\.layers\.0\.\S*{name}, and its layer is packed; use target"
            with pytest.raises(UsageError, match=message):
                get_peft_model(checkpoint.load(), config)
            with pytest.raises(UsageError, match=message):
                checkpoint.start().add_adapter("second", config)


def test_a_bias_of_lora_is_merged_where_there_is_one(made):
    options = {"lora_bias": True, "target_modules": ["q_proj", "query"], "init_lora_weights": False}
    with pytest.warns(PeftWarning, match="has no bias"):
        model = get_peft_model(made("llama").load(), fresh(**options))
    before = result(model.eval())
    with pytest.raises(UsageError, match="lora_bias=True cannot be merged into layers without a bias; keep"):
        model.merge_and_unload()
    assert torch.equal(result(model), before)
    model = get_peft_model(made("bert").load(), fresh(**options)).eval()
    assert close(result(model), result(model.merge_and_unload()))


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_starts_that_read_no_weight_are_taken(made, init):
    model = get_peft_model(made("llama").load(), fresh(r=2, init_lora_weights=init))
    assert result(model).isfinite().all()


def test_a_dense_model_is_left_to_peft(made):
    checkpoint = made("llama")
    model = get_peft_model(checkpoint.family.auto_class.from_pretrained(checkpoint.source), fresh(use_dora=True))
    assert not any(isinstance(m, (LoftQLoraLinear, LoftQLinear)) for m in model.modules())
    assert result(model).isfinite().all()


def test_a_merged_model_can_be_converted_and_unmerged(made):
    checkpoint = made("llama")
    model = checkpoint.start()
    state = {n: t.clone() for n, t in model.state_dict().items() if "lora_" not in n}
    model.merge_adapter()
    model.to(torch.bfloat16).to("cpu")
    model.unmerge_adapter()
    assert all(m.compute_dtype == torch.bfloat16 for m in packed(model).values())
    for name, tensor in model.state_dict().items():
        if name.endswith(("base_layer.weight", "base_layer.weight_scale")):
            assert torch.equal(tensor, state[name])


def test_what_kbit_preparation_does_to_scales_is_not_saved(made, tmp_path):
    checkpoint = made("bert", embeddings=True)
    model = prepare_model_for_kbit_training(checkpoint.load(dtype=torch.bfloat16), use_gradient_checkpointing=False)
    assert not any(p.requires_grad for p in model.parameters())
    assert result(checkpoint.start(model)).isfinite().all()
    model = prepare_model_for_kbit_training(checkpoint.load())
    model.save_pretrained(tmp_path)
    assert same(tensors(tmp_path), tensors(checkpoint.output))


@pytest.mark.parametrize("bits", [2, 8])
def test_other_tuners_train_and_are_not_merged(made, bits):
    base = made("llama", bits=bits).load()
    config = IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    )
    model = get_peft_model(base, config)
    outputs(model).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "ia3_" in n)
    before = result(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(
            UsageError, match=r"IA3Model cannot be merged into packed layers; only LoRA can.*dequantize"
        ):
            merge()
    assert torch.equal(result(model), before)


def test_a_tuner_that_changes_the_output_in_place(made):
    config = AdaLoraConfig(target_modules=["q_proj"], total_step=10, init_r=4, target_r=2, init_lora_weights=False)
    model = get_peft_model(made("llama").load(), config)
    outputs(model).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n and "ranknum" not in n)


def test_tuners_of_dense_layers_are_merged(made):
    config = IA3Config(target_modules=["lm_head"], feedforward_modules=[], init_ia3_weights=False)
    model = get_peft_model(made("llama").load(), config)
    before = result(model)
    model.merge_adapter()
    assert close(result(model), before)


@EACH
def test_a_trained_adapter_saves_and_loads(made, name, options, tmp_path):
    checkpoint = made(name, **options)
    model = checkpoint.start()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(checkpoint.load(), tmp_path)
    assert torch.equal(result(again), result(model))
    assert all("lora_" in tensor for tensor in tensors(tmp_path))


def test_generation_with_a_start(made):
    checkpoint = made("llama")
    words = torch.tensor([[5, 6, 7]])
    ours = checkpoint.start().generate(input_ids=words, max_new_tokens=5, do_sample=False)
    dense = checkpoint.started().generate(input_ids=words, max_new_tokens=5, do_sample=False)
    assert torch.equal(ours, dense)


def test_a_table_that_is_dense_is_resized(made):
    model = made("llama").load()
    model.resize_token_embeddings(150)
    assert result(model).shape[-1] == 150
    assert isinstance(model, transformers.LlamaForCausalLM)
