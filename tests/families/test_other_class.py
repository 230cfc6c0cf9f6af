"""A checkpoint loaded with another class than the one it was made from: with a head, without one, with another one."""

import json
import shutil

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

import loftq
from loftq.errors import InputError, UsageError
from models import close, inputs, packed, same, tensors

ROWS = [
    # checkpoint, class it is loaded with, prefixes of the backbone there and in the dense model
    ("bert", "AutoModelForSequenceClassification", "bert", ""),
    ("bert-mlm", "AutoModel", "", "bert"),
    ("bert-mlm", "AutoModelForSequenceClassification", "bert", "bert"),
    ("deberta-v3", "AutoModelForSequenceClassification", "deberta", ""),
    ("deberta-v3", "AutoModelForQuestionAnswering", "deberta", ""),
    ("llama", "AutoModel", "", "model"),
    ("llama", "AutoModelForSequenceClassification", "model", "model"),
    ("bart", "AutoModel", "", "model"),
    ("bart", "AutoModelForSequenceClassification", "model", "model"),
    ("t5", "T5EncoderModel", "encoder", "encoder"),
    ("gpt2", "AutoModel", "", "transformer"),
    ("gpt2", "AutoModelForSequenceClassification", "transformer", "transformer"),
]
HEADS = {  # beside the backbone: trained, and saved with the adapter
    ("bert", "AutoModelForSequenceClassification"): ["classifier"],
    ("bert-mlm", "AutoModelForSequenceClassification"): ["classifier", "bert.pooler.dense"],
    ("bert-mlm", "AutoModel"): ["pooler.dense"],
    ("deberta-v3", "AutoModelForSequenceClassification"): ["pooler", "classifier"],
    ("deberta-v3", "AutoModelForQuestionAnswering"): ["qa_outputs"],
    ("llama", "AutoModelForSequenceClassification"): ["score"],
    ("bart", "AutoModelForSequenceClassification"): ["classification_head"],
    ("gpt2", "AutoModelForSequenceClassification"): ["score"],
}


def hidden(model, prefix):
    """Last hidden state of the backbone at ``prefix``."""
    backbone = model.get_submodule(prefix)
    words = inputs(model)
    if prefix == "encoder":
        words.pop("decoder_input_ids", None)
    return backbone(**words).last_hidden_state


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("name", "auto", "prefix", "dense_prefix"), ROWS)
def test_backbone_and_start_are_found(made, name, auto, prefix, dense_prefix):
    checkpoint = made(name)
    model = checkpoint.load(getattr(transformers, auto))
    with torch.no_grad():
        assert close(hidden(model, prefix), hidden(checkpoint.backbone(), dense_prefix), 1e-6)
    start = loftq.load_start(model, checkpoint.output)
    with torch.no_grad():
        assert close(hidden(start.get_base_model(), prefix), hidden(checkpoint.started(), dense_prefix))
    trained = {n for n, p in start.named_parameters() if p.requires_grad}
    assert len([n for n in trained if "lora_" in n]) == 2 * len(packed(model))
    heads = {n.removeprefix("base_model.model.").partition(".modules_to_save.")[0] for n in trained if "lora_" not in n}
    assert heads == set(HEADS.get((name, auto), ()))


@pytest.mark.parametrize(("name", "auto", "prefix", "dense_prefix"), ROWS[:5])
def test_peft_itself_finds_a_start_that_names_no_task(made, name, auto, prefix, dense_prefix, recwarn):
    checkpoint = made(name)
    start = checkpoint.start(checkpoint.load(getattr(transformers, auto)))
    assert not [w for w in recwarn if "missing adapter keys" in str(w.message)]
    with torch.no_grad():
        assert close(hidden(start.get_base_model(), prefix), hidden(checkpoint.started(), dense_prefix))


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("name", "auto", "prefix", "dense_prefix"), ROWS)
def test_what_was_trained_comes_back(made, name, auto, prefix, dense_prefix, tmp_path):
    checkpoint = made(name)
    start = loftq.load_start(checkpoint.load(getattr(transformers, auto)), checkpoint.output, lora_dropout=0.1).eval()
    with torch.no_grad():
        for parameter in start.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
        start.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(checkpoint.load(getattr(transformers, auto)), tmp_path)
        words = inputs(start)
        if auto == "T5EncoderModel":
            words.pop("decoder_input_ids", None)
        assert torch.equal(again(**words)[0], start(**words)[0])


def test_classifier_is_trained_beside_the_start(made):
    checkpoint = made("deberta-v3")
    model = loftq.load_start(checkpoint.load(transformers.AutoModelForSequenceClassification), checkpoint.output)
    model(**inputs(model), labels=torch.tensor([0, 1])).loss.backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert {n.split(".")[2] for n in trained} == {"deberta", "pooler", "classifier"}
    assert len([n for n in trained if "lora_" in n]) == 2 * checkpoint.family.matrices


def test_a_start_of_another_model_or_none_is_refused(made, tmp_path):
    checkpoint, other = made("bert"), made("llama", rank=3)
    with pytest.raises(UsageError, match=r"LlamaForCausalLM has no packed layers; load the directory"):
        loftq.load_start(other.family.auto_class.from_pretrained(other.source), other.output)
    shutil.copytree(checkpoint.output / "loftq_init", tmp_path / "loftq_init")
    factors = load_file(tmp_path / "loftq_init" / "adapter_model.safetensors")
    lost = "base_model.model.encoder.layer.1.output.dense.lora_B.weight"
    del factors[lost]
    save_file(factors, tmp_path / "loftq_init" / "adapter_model.safetensors")
    with pytest.raises(InputError, match=f"no LoftQ initialization for {lost}"):
        loftq.load_start(checkpoint.load(), tmp_path)


def test_scales_stay_as_they_are_in_another_class_and_precision(made):
    checkpoint = made("bert", scale_dtype="float32")
    model = checkpoint.load(transformers.AutoModelForSequenceClassification, dtype=torch.bfloat16)
    assert {layer.weight_scale.dtype for layer in packed(model).values()} == {torch.float32}
    assert model.dtype == torch.bfloat16


def test_saved_from_another_class_it_loads_in_both(made, tmp_path):
    checkpoint = made("bert")
    model = checkpoint.load(transformers.AutoModelForSequenceClassification)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert same(again.state_dict(), model.state_dict())
    bare = transformers.AutoModel.from_pretrained(tmp_path)
    assert packed(bare).keys() == packed(checkpoint.load()).keys()
    with torch.no_grad():
        assert torch.equal(hidden(bare, ""), hidden(model, "bert"))
    assert tensors(tmp_path).keys() >= {"bert.encoder.layer.0.output.dense.weight_scale"}


def test_transformers_own_loading_of_adapters_finds_the_start(made):
    checkpoint = made("bert")
    model = checkpoint.load(transformers.AutoModelForSequenceClassification)
    model.load_adapter(str(checkpoint.output / "loftq_init"))
    with torch.no_grad():
        assert close(hidden(model, "bert"), hidden(checkpoint.started(), ""))


def test_transformers_own_loading_refuses_a_start_with_holes(made, tmp_path):
    checkpoint = made("bert")
    adapter = shutil.copytree(checkpoint.output / "loftq_init", tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    left = {name: tensor for name, tensor in weights.items() if "layer.1.intermediate" not in name}
    save_file(left, adapter / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(
        InputError, match=r"no weights for the adapter on encoder\.layer\.1\.intermediate\.dense; is it"
    ):
        checkpoint.load().load_adapter(str(adapter))


def test_a_model_without_any_of_the_modules_is_refused(made):
    checkpoint = made("gpt2")
    config = transformers.AutoConfig.from_pretrained(made("bert").source)
    config.quantization_config = transformers.AutoConfig.from_pretrained(checkpoint.output).quantization_config
    with pytest.raises(InputError, match=r"none of the packed modules .* is in BertModel; load .* model class"):
        transformers.BertModel.from_pretrained(checkpoint.output, config=config)


SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
PICTURES = {**SMALL, "image_size": 16, "patch_size": 8}
WORDS = {**SMALL, "vocab_size": 101, "max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("whole", "part"), [("SiglipModel", "SiglipTextModel"), ("CLIPTextModelWithProjection", "CLIPTextModel")]
)
def test_a_part_of_a_model_is_loaded_on_its_own(whole, part, tmp_path):
    """Its configuration is a part of the whole's, its names begin otherwise, and so do those of its adapter."""
    config_class = getattr(transformers, whole).config_class
    two = {"text_config": WORDS, "vision_config": PICTURES} if whole == "SiglipModel" else WORDS
    getattr(transformers, whole)(config_class(**two)).save_pretrained(tmp_path / "dense")
    loftq.quantize(tmp_path / "dense", tmp_path / "out", bits=4, rank=4, workers=1)
    model = getattr(transformers, part).from_pretrained(tmp_path / "out")
    assert len(packed(model)) >= 6
    getattr(transformers, whole).from_pretrained(tmp_path / "out").dequantize().save_pretrained(tmp_path / "back")
    wanted = getattr(transformers, part).from_pretrained(tmp_path / "back")
    start = PeftModel.from_pretrained(model, tmp_path / "out", subfolder="loftq_init")
    state = start.unload().dequantize().state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in wanted.state_dict().items())
    start = loftq.load_start(getattr(transformers, part).from_pretrained(tmp_path / "out"), tmp_path / "out")
    factors = load_file(tmp_path / "out" / "loftq_init" / "adapter_model.safetensors")
    last = "encoder.layers.0.mlp.fc2.lora_B"
    (stored,) = (t for n, t in factors.items() if f"text_model.{last}" in n)
    (placed,) = (p for n, p in start.named_parameters() if last in n)
    assert torch.equal(placed, stored.float())


def values_of(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def test_a_part_whose_configuration_has_no_type_is_loaded_and_saved_on_its_own(tmp_path):
    """As in files of some years ago. The part has a configuration of its own, which says nothing of packed layers."""
    whole = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=WORDS, vision_config=PICTURES, projection_dim=32)
    )
    whole.save_pretrained(tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    del config["text_config"]["model_type"], config["vision_config"]["model_type"]
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
    loftq.quantize(tmp_path / "dense", tmp_path / "out", bits=4, rank=4, workers=1)
    whole = transformers.CLIPModel.from_pretrained(tmp_path / "out")
    part = transformers.CLIPTextModel.from_pretrained(tmp_path / "out")
    assert len(packed(part)) == 6
    assert same(values_of(part), values_of(whole.text_model))
    whole.text_model.save_pretrained(tmp_path / "part")
    part = transformers.CLIPTextModel.from_pretrained(tmp_path / "part")
    assert len(packed(part)) == 6
    assert same(values_of(part), values_of(whole.text_model))
    whole.save_pretrained(tmp_path / "again")
    assert same(values_of(transformers.CLIPModel.from_pretrained(tmp_path / "again")), values_of(whole))


def test_a_model_of_two_packed_ones_is_saved_and_loaded(made, tmp_path):
    output = str(made("bert").output)
    model = transformers.EncoderDecoderModel.from_encoder_decoder_pretrained(output, output)
    model.save_pretrained(tmp_path)
    again = transformers.EncoderDecoderModel.from_pretrained(tmp_path)
    assert len(packed(again)) == len(packed(model)) > 0
    assert same(values_of(again), values_of(model))


def test_a_dense_model_of_a_packed_configuration_is_saved_as_dense(made, tmp_path):
    config = transformers.AutoConfig.from_pretrained(made("llama").output)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert same(values_of(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)), values_of(model))
    assert config.quantization_config["quant_method"] == "loftq"  # the user's own is left alone


def test_a_classifier_of_other_labels_is_trained_whole(tmp_path):
    """Its weights are in the checkpoint, in another shape, so that they begin at random."""
    config = transformers.ViTConfig(**PICTURES, num_labels=3)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "dense")
    loftq.quantize(tmp_path / "dense", tmp_path / "out", bits=4, rank=4, workers=1)
    load = transformers.ViTForImageClassification.from_pretrained
    model = load(tmp_path / "out", num_labels=5, ignore_mismatched_sizes=True)
    assert model.hf_quantizer.new_modules == ("classifier",)
    in_memory = loftq.get_peft_model(load(tmp_path / "dense"), bits=4, rank=4, workers=1, progress=False)
    for tuned in (loftq.load_start(model, tmp_path / "out"), in_memory):
        trained = {name for name, p in tuned.named_parameters() if p.requires_grad and ".lora_" not in name}
        place = "base_model.model.classifier.modules_to_save.default"
        assert trained == {f"{place}.weight", f"{place}.bias"}
