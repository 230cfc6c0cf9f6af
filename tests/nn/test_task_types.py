"""PEFT's task types: only where a class takes what PEFT's model of the task passes."""

import json

import pytest
import speaking
import torch
import transformers
from peft import PeftModel

import loftq
from loftq.architecture.adapter import chosen_task, task_type, text_tasks
from loftq.errors import UsageError
from models import close, quantize, tiny


def skeleton(architecture, config, **options):
    with torch.device("meta"):
        return getattr(transformers, architecture)(config(**options))


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("llama", "CAUSAL_LM"),
        ("gpt2", "CAUSAL_LM"),
        ("t5", "SEQ_2_SEQ_LM"),
        ("bart", "SEQ_2_SEQ_LM"),
        ("bert", None),
        ("bert-mlm", None),
        ("roberta", None),
    ],
)
def test_models_of_text(name, task):
    assert task_type(tiny(name)) == task


def test_a_decoder_of_audio_from_text_has_none():
    """Its first input is text, and it takes no ``decoder_input_ids``."""
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "speech_decoder_prenet_units": 8}
    model = skeleton("SpeechT5ForTextToSpeech", transformers.SpeechT5Config, hidden_size=16, **layers, **heads)
    assert model.main_input_name == "input_ids"
    assert task_type(model) is None
    with pytest.raises(UsageError, match=r"task_type='SEQ_2_SEQ_LM': .*; SpeechT5 does not take all; leave it out"):
        chosen_task("SEQ_2_SEQ_LM", None, text_tasks(model), "SpeechT5")


def test_a_task_that_is_asked_for_has_to_fit():
    vision = transformers.ViTConfig
    model = skeleton("ViTForImageClassification", vision, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    assert text_tasks(model) == set()
    assert chosen_task("FEATURE_EXTRACTION", None, set(), "ViT") == "FEATURE_EXTRACTION"
    assert text_tasks(tiny("bert")) == {"CAUSAL_LM", "SEQ_2_SEQ_LM"}  # another class may be loaded
    assert text_tasks(tiny("llama")) == {"CAUSAL_LM"}
    assert chosen_task(None, "CAUSAL_LM", {"CAUSAL_LM"}, "Llama") == "CAUSAL_LM"


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("name", "task"),
    [("whisper", None), ("moonshine", None), ("llava", "CAUSAL_LM"), ("blip2", None), ("trocr", None)],
)
def test_speech_and_pictures_run_train_and_merge(name, task, tmp_path):
    torch.manual_seed(0)
    model, given = getattr(speaking, name)()
    model.eval().save_pretrained(tmp_path / "dense")
    options = {"bits": 4, "min_coverage": 0.0}
    quantize(tmp_path / "dense", tmp_path / "quantized", **options)
    config = json.loads((tmp_path / "quantized" / "loftq_init" / "adapter_config.json").read_text())
    assert config["task_type"] == task
    packed = type(model).from_pretrained(tmp_path / "quantized")
    plain = PeftModel.from_pretrained(packed, tmp_path / "quantized", subfolder="loftq_init", is_trainable=True)
    started = loftq.load_start(type(model).from_pretrained(tmp_path / "quantized"), tmp_path / "quantized")
    memory = loftq.get_peft_model(model, bits=4, rank=4, progress=False, min_coverage=0.0, preset="fitted")
    losses = [m.eval()(**given).loss for m in (plain, started, memory)]
    assert torch.equal(losses[0], losses[1])
    assert close(losses[2], losses[0])
    assert started.peft_config["default"].task_type == memory.peft_config["default"].task_type == task
    losses[0].backward()
    trained = [p for n, p in plain.named_parameters() if "lora_B" in n and p.grad is not None and p.grad.any()]
    assert len(trained) > 6
    with torch.no_grad():
        assert close(plain.merge_and_unload()(**given).loss, losses[0].detach())
