"""Every tuner of PEFT over packed layers: right and trained, or refused in one sentence before anything changes."""

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from loftq.errors import UsageError
from models import close, inputs, outputs, packed, quantize

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's own: no CUDA extension, layers without bias

TARGETS = ["q_proj", "o_proj"]
OPTIONS = {
    "ADALORA": {"init_r": 6, "target_r": 4, "total_step": 20},
    "BOFT": {"boft_block_size": 8},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 20},
    "MISS": {"r": 8},
    "ROAD": {"group_size": 8},
    "WAVEFT": {"n_frequency": 20},
    "IA3": {"feedforward_modules": []},
    "OFT": {"oft_block_size": 8, "r": 0},
    "RANDLORA": {"r": 4},
    "SHIRA": {"r": 2},
    "VBLORA": {"r": 2, "num_vectors": 8, "vector_length": 8},
}
# No targets in the base model's layers, or, as Poly, a forward of their own.
OTHERS = {"ADAPTION_PROMPT", "CARTRIDGE", "CPT", "LN_TUNING", "MULTITASK_PROMPT_TUNING", "POLY", "PREFIX_TUNING"}
OTHERS |= {"PROMPT_TUNING", "P_TUNING", "SHADOW", "TRAINABLE_TOKENS", "XLORA", "FROD"}
TUNERS = sorted(kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING if kind.value not in OTHERS)


def config_of(kind):
    return PEFT_TYPE_TO_CONFIG_MAPPING[kind](target_modules=TARGETS, **OPTIONS.get(kind, {}))


def tuned(model, config):
    """The model under the tuner, its parameters off their start; outputs and gradients."""
    torch.manual_seed(1)
    model = get_peft_model(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    result = outputs(model)
    result.square().mean().backward()
    return model, result.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Widths that all tuners can divide."""
    import transformers

    directory = tmp_path_factory.mktemp("even")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=101, num_hidden_layers=1, pad_token_id=0, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(directory / "dense")
    for bits in (2, 8):
        quantize(directory / "dense", directory / str(bits), bits=bits, embeddings=True)
    return lambda bits: transformers.LlamaForCausalLM.from_pretrained(directory / str(bits))


@pytest.mark.sampled(5)
@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("kind", TUNERS)
def test_it_works_as_over_dense_layers_or_is_refused(checkpoint, kind, bits):
    base = checkpoint(bits)
    before = {name: type(module) for name, module in base.named_modules()}
    refused = ""
    try:
        model, result, gradients = tuned(base, config_of(kind))
    except UsageError as e:
        refused = str(e)
    if refused:
        assert "\n" not in refused
        assert f"is packed at {bits} bits; use plain LoRA, or call dequantize()" in refused
        assert {name: type(module) for name, module in base.named_modules()} == before
        assert kind not in ("LORA", "ADALORA", "IA3", "OFT", "VERA", "FOURIERFT")
        return
    _, wanted, wanted_gradients = tuned(checkpoint(bits).dequantize(), config_of(kind))
    assert kind not in ("OSF", "SHIRA", "LOHA", "LOKR", "HRA", "UNILORA")  # they read the weight
    assert close(result, wanted)
    assert gradients.keys() == wanted_gradients.keys() != set()
    for name, gradient in wanted_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-6)
    model.eval()
    if kind == "LORA":
        before = outputs(model).detach()
        assert close(outputs(model.merge_and_unload()).detach(), before)
    else:
        with pytest.raises(UsageError, match=r"Model cannot be merged into packed layers; only LoRA can\. Call deq"):
            model.merge_and_unload()


def test_adalora_is_merged_once_the_layers_are_dense(checkpoint):
    model, *_ = tuned(checkpoint(4 // 2), config_of("ADALORA"))
    before = outputs(model.eval()).detach()
    model.get_base_model().dequantize()
    assert close(outputs(model.merge_and_unload()).detach(), before)


def test_what_wraps_whole_blocks_is_refused(checkpoint):
    shadow = getattr(peft, "ShadowConfig", None)
    if shadow is None:
        pytest.skip("this PEFT has no ShadowPEFT")
    with pytest.raises(UsageError, match=r"would wrap model\.layers\.0, a LlamaDecoderLayer of packed layers"):
        get_peft_model(checkpoint(2), shadow(task_type="CAUSAL_LM"))


def test_a_second_adapter_is_tried_too(checkpoint):
    model = get_peft_model(checkpoint(8), LoraConfig(r=2, target_modules=TARGETS))
    before = model.state_dict().keys()
    with pytest.raises(UsageError, match="DoRA needs the norms of a dense weight"):
        model.add_adapter("second", LoraConfig(r=2, target_modules=TARGETS, use_dora=True))
    assert model.state_dict().keys() == before
    model.add_adapter("second", LoraConfig(r=2, target_modules=TARGETS, use_rslora=True))


def test_what_fails_over_dense_layers_too_is_left_to_peft(checkpoint):
    config = PEFT_TYPE_TO_CONFIG_MAPPING["C3A"](target_modules=TARGETS, block_size=7)
    with pytest.raises(ValueError, match="The block size should be a factor") as refused:
        get_peft_model(checkpoint(2), config)
    assert not isinstance(refused.value, UsageError)


def test_a_trial_leaves_the_layers_as_they_are(made):
    model = made("bert", bits=8).load()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    get_peft_model(model, LoraConfig(r=2, target_modules=["query"], bias="all"))
    unwrapped = {name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items()}
    assert all(torch.equal(unwrapped[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING"])
def test_prompts_are_trained_beside_packed_layers(checkpoint, kind):
    config = PEFT_TYPE_TO_CONFIG_MAPPING[kind](num_virtual_tokens=3, task_type="CAUSAL_LM")
    results = []
    for model in (checkpoint(2), checkpoint(2).dequantize()):
        torch.manual_seed(1)
        model = get_peft_model(model, config)
        results.append(model(**inputs(model)).logits)
        results[-1].sum().backward()
        assert all(p.grad is not None for p in model.prompt_encoder.parameters() if p.requires_grad)
    assert close(results[0].detach(), results[1].detach())


def test_norms_are_trained_and_merged(checkpoint):
    config = PEFT_TYPE_TO_CONFIG_MAPPING["LN_TUNING"](target_modules=["input_layernorm"])
    model, result, gradients = tuned(checkpoint(2), config)
    assert len(gradients) == 1
    merged = model.merge_and_unload()
    assert torch.equal(outputs(merged), result)
    assert packed(merged)


def test_eva_takes_its_start_from_activations(checkpoint):
    config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0))
    model = get_peft_model(checkpoint(2), config)
    batch = inputs(model, batch=4)
    peft.initialize_lora_eva_weights(model, [batch], show_progress_bar=False)
    factors = [
        m.lora_A["default"].weight for m in model.modules() if isinstance(getattr(m, "lora_A", None), nn.ModuleDict)
    ]
    for a in factors:
        torch.testing.assert_close(a @ a.T, torch.eye(len(a)), rtol=1e-4, atol=1e-4)


def test_an_adapter_without_storage_is_tried_with_values(checkpoint):
    model = get_peft_model(checkpoint(2), LoraConfig(r=2, target_modules=TARGETS), low_cpu_mem_usage=True)
    assert {p.device.type for n, p in model.named_parameters() if "lora_" in n} == {"meta"}
