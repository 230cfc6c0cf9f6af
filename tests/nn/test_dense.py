"""What needs a dense weight gets one: modules that are trained whole, trained tokens, tables that are resized."""

import pytest
import torch
from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

import loftq
from loftq.errors import UsageError
from loftq.nn.layers import LoftQEmbedding, LoftQLinear
from models import close, inputs, outputs, packed

TABLE = "model.embed_tokens"


@pytest.fixture
def checkpoint(made):
    return made("llama", bits=4, embeddings=True)


def config(**options):
    return LoraConfig(r=3, target_modules=["q_proj"], **options)


def trained(model):
    """One step on everything that can be trained."""
    outputs(model).square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.sub_(parameter.grad, alpha=1.0)
    return model.eval()


@torch.no_grad()
def result(model):
    return outputs(model)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head", "down_proj"], ["mlp"]])
def test_modules_to_save_train_a_dense_copy(checkpoint, modules, tmp_path):
    model = get_peft_model(checkpoint.load(), config(modules_to_save=modules))
    assert close(result(model), result(checkpoint.load()))  # B is zero
    copies = [m for n, m in model.named_modules() if n.endswith("modules_to_save.default")]
    assert len(copies) == {"embed_tokens": 1, "lm_head": 3, "mlp": 2}[modules[0]]
    assert not any(packed(copy) for copy in copies)
    before = result(model)
    trained(model)
    assert not close(result(model), before, 1e-3)
    with model.disable_adapter():
        assert torch.equal(result(model), result(checkpoint.load()))
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(checkpoint.load(), tmp_path / "adapter")
    assert torch.equal(result(again), result(model))
    merged = again.merge_and_unload()
    assert close(result(merged), result(model))
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(result(loaded), result(merged))
    assert packed(loaded).keys() == packed(merged).keys()


def test_a_start_with_a_module_to_save(checkpoint):
    model = loftq.load_start(checkpoint.load(), checkpoint.output, modules_to_save=["lm_head"])
    assert close(result(model), result(checkpoint.started()))
    trained(model)


@pytest.mark.parametrize("whole", [False, True])
def test_trained_tokens(checkpoint, whole, tmp_path):
    """``trainable_token_indices`` of LoRA, and the tuner of that name."""
    options = TrainableTokensConfig(token_indices=[5, 9]) if whole else config(trainable_token_indices=[5, 9])
    model = get_peft_model(checkpoint.load(), options)
    assert torch.equal(result(model), result(checkpoint.load()))
    before = checkpoint.load().get_submodule(TABLE).dequantize()
    trained(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(checkpoint.load(), tmp_path)
    assert torch.equal(result(again), result(model))
    merged = again.merge_and_unload()
    assert close(result(merged), result(model))
    after = merged.get_submodule(TABLE).weight
    assert type(merged.get_submodule(TABLE)) is nn.Embedding
    changed = (after != before).any(dim=1).nonzero().flatten().tolist()
    assert set(changed) == {5, 9} & set(inputs(merged)["input_ids"].flatten().tolist())
    assert TABLE not in packed(merged)
    assert TABLE not in str(merged.config.quantization_config.to_dict())


def test_a_table_with_lora_trains_no_tokens(checkpoint):
    """PEFT's own refusal, as over a dense table."""
    with pytest.raises(TypeError, match="trainable_token_indices cannot be applied to modules of type"):
        get_peft_model(checkpoint.load(), LoraConfig(target_modules=["embed_tokens"], trainable_token_indices=[5]))


def test_a_packed_table_is_resized(checkpoint, tmp_path):
    model = checkpoint.load()
    before, old = result(model), model.get_submodule(TABLE).dequantize()
    assert isinstance(model.resize_token_embeddings(), LoftQEmbedding)  # asked for, not resized
    model.resize_token_embeddings(150)
    assert close(result(model)[..., : before.shape[-1]], before)
    assert torch.equal(model.get_submodule(TABLE).weight[: len(old)], old)
    assert model.config.vocab_size == result(model).shape[-1] == 150
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(result(again), result(model))
    assert TABLE not in packed(again)
    assert packed(again).keys() == packed(model).keys()
    start = loftq.load_start(again, checkpoint.output)
    with torch.no_grad():
        assert close(result(start)[..., : before.shape[-1]], result(checkpoint.started()))


def test_a_table_under_an_adapter_is_not_resized(checkpoint):
    with pytest.raises(UsageError, match="a packed table has an adapter; resize first, then add the adapter"):
        checkpoint.start().resize_token_embeddings(150)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("bits", [2, 8])
def test_a_packed_configuration_makes_packed_layers(made, bits, tmp_path):
    checkpoint = made("llama", bits=bits, embeddings=True)
    for auto, prefix in ((AutoModelForCausalLM, "model."), (AutoModel, "")):
        model = auto.from_config(AutoConfig.from_pretrained(checkpoint.output)).eval()
        wanted = {prefix + name.removeprefix("model.") for name in packed(checkpoint.load())}
        assert packed(model).keys() == wanted
        assert outputs(model).isfinite().all()
        assert outputs(model).std() > 0.01
        model.save_pretrained(tmp_path / (prefix or "base"))
        assert torch.equal(outputs(type(model).from_pretrained(tmp_path / (prefix or "base"))), outputs(model))
    classifier = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(checkpoint.output))
    assert packed(classifier).keys() == packed(checkpoint.load()).keys()  # its base is made from the same configuration
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint.output)).eval()
    model.load_state_dict(checkpoint.load().state_dict())
    assert torch.equal(result(model), result(checkpoint.load()))


def test_on_the_meta_device_nothing_is_solved(checkpoint):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint.output))
    assert all(p.device.type == "meta" for p in model.parameters())
    assert isinstance(model.model.layers[0].mlp.up_proj, LoftQLinear)


def test_a_configuration_of_a_dense_model_makes_dense_layers(checkpoint):
    assert not packed(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint.source)))


def test_a_table_under_a_head_that_is_tied_to_it(made, tmp_path):
    """The encoder alone was quantized, its table too; a class with a head needs the table for a product."""
    checkpoint = made("bert", embeddings=True)
    packed = checkpoint.load().get_input_embeddings()
    model = AutoModelForMaskedLM.from_pretrained(checkpoint.output).eval()
    table = model.get_input_embeddings()
    assert model.get_output_embeddings().weight is table.weight
    assert torch.equal(table.weight, packed.dequantize(table.weight.dtype))
    ids = torch.tensor([[1, 5, 9]])
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(AutoModelForMaskedLM.from_pretrained(tmp_path).eval()(ids).logits, model(ids).logits)
        loftq.load_start(model, checkpoint.output)(ids)


def test_a_head_that_is_tied_later(checkpoint):
    results = []
    for model in (checkpoint.load(), checkpoint.load().dequantize()):
        model.config.tie_word_embeddings = True
        model.tie_weights()
        assert type(model.get_submodule(TABLE)) is nn.Embedding
        assert model.lm_head.weight is model.get_submodule(TABLE).weight
        results.append(result(model))
    assert close(*results)
