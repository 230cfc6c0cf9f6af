"""An adapter knows its base: it travels with the base's hash, and another base is told or refused.

Warnings are errors in the tests, so that a call outside of ``pytest.warns`` is known to tell nothing.
"""

import json
import shutil

import pytest
import transformers
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model

import loftq
from loftq.adapters.origins import BESIDE, identity, recorded
from loftq.errors import InputError
from models import quantize

AUTO = transformers.AutoModelForCausalLM
OTHER = r"the adapter belongs to the quantized model of manifest \w{12}, and .* is another model"


def saved(checkpoint, place):
    model = get_peft_model(checkpoint.load(), LoraConfig(r=4, init_lora_weights="loftq"))
    model.save_pretrained(place)
    return place


@pytest.fixture
def adapter(made, tmp_path):
    return saved(made("llama"), tmp_path / "adapter")


@pytest.fixture
def other(made, tmp_path):
    """The same model, quantized otherwise."""
    quantize(made("llama").source, tmp_path / "other", seed=7)
    return tmp_path / "other"


def test_the_hash_travels_with_it(made, adapter, tmp_path):
    wanted = made("llama").manifest["sha256"]
    assert json.loads((adapter / BESIDE).read_text()) == {"manifest_sha256": wanted}
    assert recorded(made("llama").output / "loftq_init") == wanted
    again = PeftModel.from_pretrained(made("llama").load(), adapter, is_trainable=True)
    again.save_pretrained(tmp_path / "again")
    assert recorded(tmp_path / "again") == wanted
    moved = shutil.copytree(made("llama").output, tmp_path / "moved")
    PeftModel.from_pretrained(AUTO.from_pretrained(moved), adapter)


def test_a_base_that_is_gone_is_said_with_what_to_do(made, tmp_path):
    base = shutil.copytree(made("llama").output, tmp_path / "base")
    model = get_peft_model(AUTO.from_pretrained(base), LoraConfig(r=4, init_lora_weights="loftq"))
    model.save_pretrained(tmp_path / "far" / "adapter")
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(InputError, match=r"adapter: its base .*base is not there any more; write where it is now into"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "far" / "adapter")
    with pytest.raises(InputError, match=r"adapter: its base .*base is not there any more; write where it is now into"):
        loftq.generate(tmp_path / "far" / "adapter", "words")
    PeftModel.from_pretrained(AUTO.from_pretrained(moved), tmp_path / "far" / "adapter")


def test_a_trainers_checkpoint_has_it(made, tmp_path):
    model = loftq.load_start(made("llama").load(), made("llama").output)
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=1, per_device_train_batch_size=1, report_to="none", use_cpu=True, logging_strategy="no"
    )
    rows = [{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}]
    transformers.Trainer(model, arguments, train_dataset=rows).train()
    assert recorded(tmp_path / "checkpoint-1") == made("llama").manifest["sha256"]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("base", ["the original", "another quantization"])
@pytest.mark.parametrize("way", ["peft", "transformers"])
def test_another_base_is_one_warning(made, adapter, other, base, way):
    model = AUTO.from_pretrained(made("llama").source if base == "the original" else other)
    load = {
        "peft": lambda: PeftModel.from_pretrained(model, adapter),
        "transformers": lambda: model.load_adapter(adapter),
    }
    with pytest.warns(UserWarning, match=OTHER) as told:
        load[way]()
    assert len([w for w in told if "belongs to" in str(w.message)]) == 1


def test_the_initialization_of_one_directory_on_another(made, other):
    with pytest.warns(UserWarning, match=OTHER):
        PeftModel.from_pretrained(AUTO.from_pretrained(other), made("llama").output, subfolder="loftq_init")
    with pytest.raises(InputError, match=OTHER):
        loftq.load_start(AUTO.from_pretrained(other), made("llama").output)


def test_our_verbs_refuse_another_base(made, adapter, other, tmp_path):
    with pytest.raises(InputError, match=OTHER):
        loftq.merge(other, tmp_path / "merged", adapter=adapter)


def test_the_quantized_weights_alone_are_the_same_base(made, adapter, tmp_path):
    loftq.merge(made("llama").output, tmp_path / "dense", adapter="none", dtype="float32")
    loftq.merge(made("llama").output, tmp_path / "merged", dtype="float32")
    assert identity(tmp_path / "dense") == made("llama").manifest["sha256"]
    assert identity(tmp_path / "merged") is None
    AutoPeftModelForCausalLM.from_pretrained(adapter)
    PeftModel.from_pretrained(AUTO.from_pretrained(tmp_path / "dense"), adapter)
    with pytest.warns(UserWarning, match=OTHER):
        PeftModel.from_pretrained(AUTO.from_pretrained(tmp_path / "merged"), adapter)


def test_what_is_not_known_is_not_told(made, adapter, tmp_path):
    """A packed model that was saved by hand has no manifest; an adapter of a plain model no base of ours."""
    made("llama").load().save_pretrained(tmp_path / "copy")
    plain = get_peft_model(AUTO.from_pretrained(made("llama").source), LoraConfig(r=4))
    plain.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / BESIDE).exists()
    PeftModel.from_pretrained(AUTO.from_pretrained(tmp_path / "copy"), adapter)
    PeftModel.from_pretrained(AUTO.from_pretrained(made("llama").source), tmp_path / "plain")


def test_saved_over_an_adapter_of_another_base(made, adapter):
    plain = get_peft_model(AUTO.from_pretrained(made("llama").source), LoraConfig(r=4))
    plain.save_pretrained(adapter)
    assert recorded(adapter) is None


def test_damaged_records_are_no_records(made, adapter):
    (adapter / BESIDE).write_text("{")
    assert recorded(adapter) == made("llama").manifest["sha256"]  # by where its base lies
