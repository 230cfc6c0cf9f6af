"""Models, data and settings that do not fit together: one line that says so, before there is something to lose."""

import json
import logging
import math

import pytest
import tiny
import torch
import transformers

import models
from loftq.architecture.loading import load_tokenizer
from loftq.errors import ConflictError, InputError, NumericalError, StorageError, UsageError
from loftq.finetune.evaluate import evaluate
from loftq.finetune.inputs import task_of
from loftq.finetune.model import load_model
from loftq.finetune.recipe import read
from loftq.finetune.tasks import get_task
from loftq.finetune.train import finetune

TEXTS = {"kind": "causal-lm", "columns": {"text": "sentence"}, "rows": "lines"}
QUESTIONS = {"kind": "span-qa", "columns": {"context": "c", "question": "q", "answers": "a"}, "doc_stride": 2}
SPAN = {"c": "w1 w2 good w3", "q": "w4", "a": {"text": ["good"], "answer_start": [6]}}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny Llama whose tokenizer has an end but no padding."""
    family, place = models.FAMILIES["llama"], tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    family.model_class(getattr(transformers, family.config)(**family.options)).save_pretrained(place)
    unpadded = tiny.tokenizer()
    unpadded.pad_token, unpadded.eos_token = None, "[SEP]"
    unpadded.save_pretrained(place)
    return place


def rows(directory, **splits):
    directory.mkdir()
    for split, mine in splits.items():
        (directory / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mine))
    return str(directory)


def test_a_decoder_without_a_token_for_padding_classifies(place, llama):
    recipe = tiny.recipe(place, "loftq", model=str(llama), **{"training.max_steps": 1, "lora.rank": 2})
    metrics = finetune(recipe).metrics
    assert evaluate(str(place / "loftq")).metrics == metrics
    tokenizer = load_tokenizer(llama)
    model, _ = load_model(task_of(recipe), llama, torch.float32, tokenizer)
    assert model.config.pad_token_id == tokenizer.eos_token_id  # as batches are padded; 0 in its config.json


def test_a_body_that_is_called_otherwise_is_not_left_random(place, llama):
    """transformers calls the body of Llama for questions ``transformer``, and that of every other Llama ``model``."""
    data = rows(place / "own", train=[SPAN], validation=[SPAN])
    recipe = tiny.recipe(place, "full", model=str(llama), task=QUESTIONS, data=data)
    with pytest.raises(InputError, match="weights that LlamaForQuestionAnswering wants are not there"):
        finetune(recipe)


@pytest.mark.parametrize(
    ("task", "wanted"),
    [
        (TEXTS, "needs a model that reads from left to right, as Llama and GPT-2 do; bert sees the tokens"),
        ("xsum", "needs a model with an encoder and a decoder"),
    ],
)
def test_an_encoder_cannot_write(place, task, wanted):
    for method in ("full", "loftq"):
        with pytest.raises(UsageError, match=wanted):
            finetune(tiny.recipe(place, method, task=task))
    assert not (place / "loftq" / "backbone").exists()


@pytest.mark.parametrize(
    ("kind", "changes", "wanted"),
    [
        ("DistilBertConfig", {}, "needs AutoModelForCausalLM; there is none of distilbert"),
        ("DebertaV2Config", {}, "there is none of deberta-v2"),
        ("RobertaConfig", {}, "reads from left to right"),
        ("RobertaConfig", {"is_decoder": True}, None),
        ("XLMConfig", {}, "reads from left to right"),
        ("XLMConfig", {"causal": True}, None),
        ("BartConfig", {}, None),
        ("Gemma3TextConfig", {}, None),
        ("CodeGenConfig", {}, None),
    ],
)
def test_who_reads_from_left_to_right(kind, changes, wanted):
    task, config = get_task({**TEXTS, "max_length": 16}), getattr(transformers, kind)(**changes)
    if wanted is None:
        task.check(config)
    else:
        with pytest.raises(UsageError, match=wanted):
            task.check(config)


def test_classes_are_compared_by_their_numbers():
    """Not by the order in which a file has them, which may be that of text."""
    names = [f"c{i}" for i in range(12)]
    columns = {"text": "sentence", "label": "label"}
    task = get_task({"kind": "text-classification", "columns": columns, "labels": names, "max_length": 16})
    labels = {i: names[i] for i in sorted(range(12), key=str)}
    architectures = ["BertForSequenceClassification"]
    task.check(transformers.BertConfig(id2label=labels, architectures=architectures))
    swapped = {**labels, 0: "c1", 1: "c0"}
    with pytest.raises(UsageError, match="in the task's order"):
        task.check(transformers.BertConfig(id2label=swapped, architectures=architectures))
    task.check(transformers.BertConfig(id2label=swapped, architectures=["BertModel"]))


def test_zero3_is_refused_before_anything_is_quantized(place, monkeypatch):
    """As set by accelerate launch or ``training.deepspeed``: what would be saved is empty."""
    monkeypatch.setattr("loftq.finetune.arguments.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(UsageError, match=r"ZeRO-3 of DeepSpeed .*; use training\.fsdp, or"):
        finetune(tiny.recipe(place, "loftq"))
    assert not (place / "loftq" / "backbone").exists()


GEMMA3 = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
CODEGEN = {"n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4}


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [("Gemma3TextConfig", {**GEMMA3, "hidden_size": 32, "intermediate_size": 32}), ("CodeGenConfig", CODEGEN)],
)
def test_configurations_without_a_word_on_padding(place, kind, sizes):
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**{"vocab_size": 80, **sizes})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(place / "other")
    tiny.tokenizer().save_pretrained(place / "other")
    file = place / "other" / "config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in settings.items() if name != "pad_token_id"}))
    task = {**TEXTS, "max_length": 16}
    recipe = tiny.recipe(place, "full", model=str(file.parent), task=task, **{"training.max_steps": 1})
    assert math.isfinite(finetune(recipe).metrics["perplexity"])


def test_a_class_that_there_is_none_of(place):
    config = transformers.ViTConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    transformers.ViTModel(config).save_pretrained(place / "pictures")
    tiny.tokenizer().save_pretrained(place / "pictures")
    with pytest.raises(UsageError, match="needs AutoModelForSequenceClassification; there is none of vit"):
        finetune(tiny.recipe(place, "full", model=str(place / "pictures")))


def test_a_head_with_its_classes_in_another_order(place):
    finetune(tiny.recipe(place, "full"))
    columns = {"text": "sentence", "label": "label"}
    names = ["positive", "negative"]
    task = {"kind": "text-classification", "columns": columns, "labels": names, "max_length": 16}
    model, data = str(place / "full" / "model"), str(place / "data")
    wanted = "has the classes positive, negative, the model's head has them as negative, positive"
    with pytest.raises(UsageError, match=wanted):
        evaluate(model, task=task, data=data)
    with pytest.raises(UsageError, match=wanted):
        finetune(tiny.recipe(place, "loftq", model=model, task=task))
    assert not (place / "loftq" / "backbone").exists()
    assert evaluate(model, task={**task, "labels": names[::-1]}, data=data).metrics["n"] == 30


def test_a_start_that_was_made_with_another_rank(place):
    models.quantize(place / "model", place / "packed")  # rank 4
    packed = {"model": str(place / "packed"), "quantization": None, "training.max_steps": 1}
    for changes, wanted in (
        ({"lora.rank": 8}, "lora.rank: 8, but the initialization in .* was made with 4; leave it out"),
        ({"lora.alpha": 64.0}, "lora.alpha: 64.0, but"),
        ({"lora.rslora": True}, "lora.rslora: True, but"),
    ):
        with pytest.raises(UsageError, match=wanted):
            finetune(tiny.recipe(place, "loftq", **packed, **changes))
    finetune(tiny.recipe(place, "loftq", **packed, lora={}))


def test_a_split_that_is_not_used_may_be_as_it_likes(place):
    """As on the hub, where GLUE's test rows have -1 for a label."""
    given = {split: [{"sentence": "good", "label": 1}] * 8 for split in ("train", "validation")}
    data = rows(place / "own", **given, test=[{"sentence": "good", "label": -1}])
    finetune(tiny.recipe(place, "lora", data=data, **{"training.max_steps": 1}))
    assert evaluate(str(place / "lora")).metrics["n"] == 8
    with pytest.raises(InputError, match="-1 is not one of negative, positive"):
        evaluate(str(place / "lora"), splits=["test"])


def test_an_adapter_on_another_base_is_refused(place, caplog):
    recipe = tiny.recipe(place, "loftq", **{"training.max_steps": 1})
    finetune(recipe)
    options = {"task": "sst2", "data": str(place / "data"), "max_length": 16, "adapter": place / "loftq" / "adapter"}
    evaluate(str(place / "loftq" / "backbone"), **options)
    assert "an adapter of" not in caplog.text
    with pytest.raises(InputError, match=r"adapter: the adapter belongs to the quantized model .*model is another"):
        evaluate(str(place / "model"), **options)
    (place / "loftq" / "adapter" / "loftq_base.json").unlink()
    (place / "loftq" / "backbone").rename(place / "gone")
    (place / "loftq" / "backbone").symlink_to(place / "model")  # nothing is known but a place that is another one
    evaluate(str(place / "gone"), **options)
    told = f"an adapter of {place / 'loftq' / 'backbone'}, put on {place / 'gone'}"
    assert [record.levelno for record in caplog.records if told in record.getMessage()] == [logging.WARNING]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        (
            {"training.metric_for_best_model": "acc", "training.load_best_model_at_end": True},
            "training.metric_for_best_model: '?'?acc'?'? is none of loss, accuracy",
        ),
        ({"training.report_to": "wandb"}, "training: WandbCallback requires wandb"),
        ({"training.optim": "galore_adamw", "training.optim_target_modules": "all"}, "training: .*galore"),
        ({"training.lr_scheduler_type": "cosine_with_min_lr"}, "training: One of min_lr or min_lr_rate"),
        ({"training.use_liger_kernel": True}, "training: .*liger-kernel"),
        ({"training.accelerator_config": "odd"}, "training: .*odd"),
    ],
)
def test_what_the_trainer_cannot_do(place, changes, wanted):
    watching = {"training.eval_strategy": "steps", "training.eval_steps": 2, "training.save_strategy": "steps"}
    with pytest.raises(UsageError, match=wanted) as caught:
        finetune(tiny.recipe(place, "lora", **watching, **{"training.save_steps": 2}, **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_restart_gets_past_a_quantization_that_was_stopped(place):
    unfinished = place / "loftq" / "backbone.loftq-partial"
    unfinished.mkdir(parents=True)
    (place / "loftq" / "recipe.yaml").write_text((place / "loftq").name)
    (unfinished / "identity.json").write_text('{"options": "another"}')
    recipe = tiny.recipe(place, "loftq", **{"training.max_steps": 1})
    with pytest.raises(ConflictError, match="holds unfinished work of another command"):
        finetune(recipe)
    finetune(recipe, resume=False)
    assert not unfinished.exists()


@pytest.mark.slow
def test_a_lost_run_can_take_the_advice_that_it_is_given(place):
    lost = tiny.recipe(place, "full", **{"training.learning_rate": 1e30, "training.max_grad_norm": 0.0})
    with pytest.raises(NumericalError, match="try a lower"):
        finetune(lost)
    assert finetune(lost.changed(**{"training.learning_rate": 1e-3})).steps == 6


def test_a_recipe_is_read_from_a_path_as_text(place):
    (place / "recipe.yaml").write_text("{model: a, task: sst2, method: lora}")
    assert read(str(place / "recipe.yaml"), ["seed=3"]).seed == 3


def test_too_little_memory_is_told_with_what_to_try(place, monkeypatch):
    def step(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("transformers.Trainer.training_step", step)
    with pytest.raises(StorageError, match=r"a step of training; try a smaller training\.per_device_train_batch_size"):
        finetune(tiny.recipe(place, "lora"))


def test_a_hub_that_is_out_of_reach_is_told(place, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=r"^training\.push_to_hub: .*; leave it out, and upload what was made$"):
        finetune(tiny.recipe(place, "lora", **{"training.push_to_hub": True}))
