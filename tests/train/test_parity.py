"""``full`` and ``lora`` are what plain transformers and PEFT do: same seed, same losses, same weights, exactly."""

import peft
import pytest
import tiny
import torch
import transformers
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

import models
from loftq.finetune import train as workflow
from loftq.finetune.train import finetune

pytestmark = pytest.mark.slow


def losses(history):
    return [entry["loss"] for entry in history if "loss" in entry]


def by_hand(place, config=None):
    """The run of ``tiny.recipe`` as one would write it with the libraries alone."""
    transformers.set_seed(0)
    auto = transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(place / "model", num_labels=2, dtype=torch.float32)
    if config is not None:
        model = peft.get_peft_model(model, config)
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "model")
    rows = [
        {**tokenizer(row["sentence"], truncation=True, max_length=16), "labels": row["label"]}
        for row in tiny.rows(64, 0)
    ]
    arguments = transformers.TrainingArguments(
        output_dir=str(place / "by-hand"),
        learning_rate=1e-3,
        max_steps=6,
        per_device_train_batch_size=8,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
        dataloader_pin_memory=False,
    )
    trainer = transformers.Trainer(
        model, arguments, train_dataset=rows, data_collator=transformers.DataCollatorWithPadding(tokenizer)
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return model, losses(trainer.state.log_history)


def test_full_fine_tuning_is_that_of_a_plain_loop(place):
    model, wanted = by_hand(place)
    result = finetune(tiny.recipe(place, "full"))
    assert losses(result.history) == wanted
    assert models.same(load_file(place / "full" / "model" / "model.safetensors"), model.state_dict())


def test_lora_is_that_of_a_plain_loop(place):
    config = LoraConfig(
        r=4,
        lora_alpha=4,
        target_modules=r".*\.encoder\.layer\..*(query|key|value|dense)",  # not the pooler, as "all-linear" would
        task_type="SEQ_CLS",
        modules_to_save=["classifier"],
    )
    model, wanted = by_hand(place, config)
    result = finetune(tiny.recipe(place, "lora"))
    assert losses(result.history) == wanted
    state = peft.get_peft_model_state_dict(model)
    assert models.same(load_file(place / "lora" / "adapter" / "adapter_model.safetensors"), state)


@pytest.fixture
def trained(place, monkeypatch):
    """``trained(method, **changes)``: the trainer of a run after it."""

    def run(method, **changes):
        trainers = []

        class Kept(workflow.LoftQTrainer):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                trainers.append(self)

        monkeypatch.setattr(workflow, "LoftQTrainer", Kept)
        finetune(tiny.recipe(place, method, **changes))
        return trainers[0]

    return run


def test_every_method_adapts_the_same_modules(trained):
    found = {}
    for method in ("lora", "qlora", "loftq"):
        model = trained(method, **{"training.max_steps": 1, "quantization.embeddings": True}).model
        assert isinstance(model, PeftModel)
        found[method] = {n for n, p in model.named_parameters() if p.requires_grad}
    assert found["lora"] == found["qlora"] == found["loftq"]
    assert any("word_embeddings" in name for name in found["lora"])


def test_only_adapters_and_the_head_are_optimized_and_the_backbone_stays(place, trained):
    trainer = trained("loftq", **{"training.weight_decay": 0.5})
    model = trainer.model
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    names = {n for n, p in model.named_parameters() if id(p) in optimized}
    assert names
    assert len(names) == len(optimized)
    assert all(".lora_" in n or ".modules_to_save." in n for n in names)
    kept = {
        n.removeprefix("base_model.model.bert.").replace(".base_layer", ""): t for n, t in model.state_dict().items()
    }
    for name, tensor in models.tensors(place / "loftq" / "backbone").items():
        if not name.startswith("pooler."):
            assert torch.equal(kept[name], tensor), name
    fresh = place / "fresh"
    models.quantize(place / "model", fresh, steps=5)
    assert models.same(models.tensors(fresh), models.tensors(place / "loftq" / "backbone"))


def test_methods_start_from_the_same_head_and_see_the_same_rows(trained):
    heads, orders = [], []
    for method in ("full", "lora", "qlora", "loftq"):
        trainer = trained(method, **{"training.learning_rate": 1e-30, "training.max_steps": 1})
        trained_parts = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
        heads.append(next(p for n, p in trained_parts.items() if "classifier" in n and n.endswith("weight")))
        orders.append([batch["input_ids"] for batch in trainer.get_train_dataloader()])
    for head, order in zip(heads, orders, strict=True):
        assert torch.equal(head, heads[0])
        assert all(map(torch.equal, order, orders[0]))
