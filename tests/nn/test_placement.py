"""A start sits on every module that it was made for, or loading it is an error."""

import json
import shutil

import pytest
import torch
import transformers
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import loftq
from loftq.adapters.peft import LoftQLoraLinear
from loftq.errors import InputError, UsageError
from models import close, outputs, packed, quantize, substituted, written

TEXT = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROUTED = {**EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
ATTENTION = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
SHARED = {"num_experts": 4, "shared_expert_intermediate_size": 32, "head_dim": 16}
MIXTURES = {  # with shared experts, or with layers that are dense
    "DeepseekV3": {**TEXT, **ROUTED, **ATTENTION, "n_group": 1, "topk_group": 1},
    "Dots1": {**TEXT, **ROUTED, "head_dim": 16, "n_group": 1, "topk_group": 1},
    "Qwen3Next": {**TEXT, **EXPERTS, **SHARED, **LINEAR},
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", MIXTURES)
def test_shared_experts_and_dense_layers_get_theirs(name, tmp_path):
    """PEFT would take ``mlp.up_proj`` for the experts', which are stacked, and dense here."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**MIXTURES[name])
    dense = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    dense.save_pretrained(tmp_path / "dense")
    output = tmp_path / "quantized"
    quantize(tmp_path / "dense", output, bits="experts=16,4", min_coverage=0.0)
    load = type(dense).from_pretrained
    starts = [
        PeftModel.from_pretrained(load(output), output, subfolder="loftq_init", is_trainable=True),
        loftq.load_start(load(output), output),
        loftq.get_peft_model(load(tmp_path / "dense"), bits="experts=16,4", rank=4, progress=False, min_coverage=0.0),
    ]
    wanted = substituted(dense, {module: q + ba for module, (q, ba) in written(output).items()})
    shared = next(module for module in written(output) if "shared_expert" in module and "down_proj" in module)
    for start in starts:
        wrapped = {n for n, m in start.get_base_model().named_modules() if isinstance(m, LoftQLoraLinear)}
        trained = {n.split(".lora_")[0] for n, p in start.get_base_model().named_parameters() if p.requires_grad}
        assert trained == wrapped == packed(start).keys() == written(output).keys()
        with torch.no_grad():
            torch.testing.assert_close(outputs(start), outputs(wanted), rtol=1e-4, atol=1e-5)
    starts[0].add_adapter("second", LoraConfig(r=2, target_modules=[".".join(shared.split(".")[-2:])]))
    assert any(f"{shared}.lora_A.second" in name for name, _ in starts[0].named_parameters())


def test_names_of_today_are_not_taken_for_those_of_old(tmp_path):
    """Laguna's pattern for ``shared_expert.`` fits ``shared_experts`` too, as a dot is any letter."""
    options = {**TEXT, **EXPERTS, **SHARED, "gating": False, "mlp_layer_types": ["dense", "sparse"]}
    dense = transformers.LagunaForCausalLM(transformers.LagunaConfig(**options))
    dense.save_pretrained(tmp_path / "dense")
    manifest = quantize(tmp_path / "dense", tmp_path / "quantized", bits="experts=16,4", min_coverage=0.0)
    start = PeftModel.from_pretrained(
        type(dense).from_pretrained(tmp_path / "quantized"), tmp_path / "quantized", subfolder="loftq_init"
    )
    layers = {n: m for n, m in start.get_base_model().named_modules() if isinstance(m, LoftQLoraLinear)}
    assert layers.keys() == {m["module"] for m in manifest["plan"]["matrices"]}
    assert all(m.lora_B["default"].weight.abs().max() for n, m in layers.items() if "shared_experts" in n)


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")  # PEFT's own targets
def test_targets_that_name_experts_are_left_to_peft():
    config = transformers.MixtralConfig(**{**TEXT, "num_local_experts": 4, "num_experts_per_tok": 2})
    model = get_peft_model(transformers.MixtralForCausalLM(config), LoraConfig(r=2, target_modules=["w1", "w2", "w3"]))
    assert {n for n, _ in model.named_parameters() if "experts.lora_A" in n}


def changed(made, tmp_path, change):
    """A copy of a start whose tensors went through ``change``, and its checkpoint."""
    checkpoint = made("llama")
    shutil.copytree(checkpoint.output / "loftq_init", tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file(change(tensors), tmp_path / "adapter_model.safetensors")
    return checkpoint


def test_a_start_without_some_of_its_weights_is_refused(made, tmp_path):
    def without(tensors):
        return {n: t for n, t in tensors.items() if "layers.1.mlp.up_proj" not in n}

    checkpoint = changed(made, tmp_path, without)
    with pytest.raises(InputError, match=r"no weights for the adapter on model\.layers\.1\.mlp\.up_proj; is it of"):
        PeftModel.from_pretrained(checkpoint.load(), tmp_path)
    model = checkpoint.start()
    with pytest.raises(InputError, match=r"no weights for the adapter on model\.layers\.1\.mlp\.up_proj"):
        model.load_adapter(tmp_path, "second")


def test_weights_that_find_no_adapter_are_refused(made, tmp_path):
    checkpoint = changed(made, tmp_path, dict)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["target_modules"] = [t for t in config["target_modules"] if "down_proj" not in t]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    for load in (PeftModel.from_pretrained, lambda *args: loftq.load_start(*args, subfolder=".")):
        with pytest.raises(InputError, match=r"no adapter on model\.layers\.0\.mlp\.down_proj, .*for its weights"):
            load(checkpoint.load(), tmp_path)


def test_what_a_user_trained_on_fewer_modules_loads(made, tmp_path):
    checkpoint = made("llama")
    model = get_peft_model(checkpoint.load(), LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(checkpoint.load(), tmp_path)
    assert torch.equal(outputs(again), outputs(model.eval()))
    again.load_adapter(checkpoint.output, "start", subfolder="loftq_init")
    again.set_adapter("start")
    assert torch.equal(outputs(again), outputs(checkpoint.start().eval()))


def empty(directory, dtype, include_buffers=False):
    with init_empty_weights(include_buffers=include_buffers):
        config = transformers.AutoConfig.from_pretrained(directory)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    return model


def test_accelerate_fills_what_was_built_empty(made, tmp_path):
    """In the dtypes of from_pretrained, although the files hold dense weights in 16 bits, and scales in 32."""
    output = tmp_path / "quantized"
    quantize(made("llama").source, output, bits=4, double_quant=True, embeddings=True, dtype="auto")
    stored = {tensor.dtype for tensor in load_file(output / "model.safetensors").values()}
    assert {torch.float32, torch.bfloat16} <= stored
    single, half = torch.float32, torch.bfloat16
    spread = dict.fromkeys(("model.embed_tokens", "model.layers.0", "lm_head"), "disk")
    spread |= dict.fromkeys(("model.layers.1", "model.norm", "model.rotary_emb"), "cpu")
    for built, given, places in (
        (single, None, {"": "cpu"}),
        (single, None, spread),
        (half, None, spread),
        (single, half, {"": "cpu"}),
        (single, half, spread),
    ):
        found = load_checkpoint_and_dispatch(
            empty(output, built), str(output), device_map=places, offload_folder=tmp_path / "offload", dtype=given
        )
        wanted = transformers.AutoModelForCausalLM.from_pretrained(output, dtype=given or built)
        assert packed(found)
        assert {n: p.dtype for n, p in found.named_parameters()} == {n: p.dtype for n, p in wanted.named_parameters()}
        assert torch.equal(outputs(found), outputs(wanted))
        shutil.rmtree(tmp_path / "offload", ignore_errors=True)


def test_accelerate_cannot_fill_buffers_that_no_file_holds(made):
    """As of a dense model, whose error does not say why; one without such buffers is filled."""
    directory = made("llama").output
    with pytest.raises(UsageError, match=r"model\.rotary_emb\.inv_freq is on the meta device, .* include_buffers=True"):
        load_checkpoint_and_dispatch(empty(directory, torch.float32, True), str(directory), device_map={"": "cpu"})
    without = made("gpt2")
    filled = load_checkpoint_and_dispatch(
        empty(without.output, torch.float32, True), str(without.output), device_map={"": "cpu"}
    )
    assert torch.equal(outputs(filled), outputs(without.load()))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")  # PEFT's, of a second adapter
@pytest.mark.parametrize("name", ["b", "model", "0"])
def test_an_adapters_name_may_be_a_part_of_others(made, name):
    """PEFT takes the keys of all adapters for those of one whose name is in them."""
    checkpoint = made("llama")
    start = checkpoint.start().eval()
    start.load_adapter(checkpoint.output, name, subfolder="loftq_init")
    start.set_adapter(name)
    assert torch.equal(outputs(start), outputs(checkpoint.start().eval()))
    model = checkpoint.load()
    for adapter in ("first", name):
        model.load_adapter(str(checkpoint.output / "loftq_init"), adapter_name=adapter)
    model.set_adapter(name)
    assert close(outputs(model), outputs(start))


def test_a_mixed_model_loads_the_start(made):
    checkpoint = made("llama")
    mixed = PeftMixedModel.from_pretrained(checkpoint.load(), checkpoint.output, subfolder="loftq_init").eval()
    with torch.no_grad():
        assert torch.equal(outputs(mixed), outputs(checkpoint.start().eval()))
