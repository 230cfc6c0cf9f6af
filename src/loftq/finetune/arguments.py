"""Hugging Face's training arguments from a recipe."""

from pathlib import Path

import torch
from transformers import Seq2SeqTrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from loftq.errors import UsageError, one_line
from loftq.finetune.recipe import Recipe
from loftq.finetune.tasks import Task

# Ours where they are not those of transformers: a curve one can see, and disks that do not fill up.
DEFAULTS = {"logging_steps": 10, "save_total_limit": 2, "report_to": "none"}


def training_arguments(recipe: Recipe, task: Task, checkpoints: Path) -> Seq2SeqTrainingArguments:
    """The recipe's ``training`` section, with values from the rest of the recipe and from the task.

    Raises: UsageError for values that transformers refuses, alone or together, and for ZeRO-3.
    """
    found = torch.accelerator.is_available()
    given = {**DEFAULTS, "use_cpu": not found, "dataloader_pin_memory": found, **recipe.training}
    if given.get("load_best_model_at_end") and given.get("eval_strategy", "no") == "no":
        raise UsageError("training.load_best_model_at_end: needs training.eval_strategy, steps or epoch")
    if given.get("load_best_model_at_end") and "metric_for_best_model" not in given:
        given["metric_for_best_model"] = task.best_metric
        given["greater_is_better"] = task.best_is_greater
    generating = task.kind == "summarization"
    options = task.generation_options(recipe.generation.choice) if generating else {}
    try:
        arguments = Seq2SeqTrainingArguments(
            output_dir=str(checkpoints),
            seed=recipe.seed,
            label_names=list(task.label_names),
            prediction_loss_only=given.pop("prediction_loss_only", False) or task.kind in ("causal-lm", "instruction"),
            predict_with_generate=generating,
            generation_num_beams=options.get("num_beams"),
            generation_max_length=task.limits.max_target_length if generating else None,
            disable_tqdm=True,  # our own bar, below
            logging_nan_inf_filter=False,
            **given,
        )
        for callback in get_reporting_integration_callbacks(arguments.report_to):
            callback()  # refuses what is not installed
    except Exception as e:  # whatever transformers raises for values that it cannot take
        raise UsageError(f"training: {one_line(e)}") from e
    if is_deepspeed_zero3_enabled():
        raise UsageError(
            "training: ZeRO-3 of DeepSpeed leaves no process a whole tensor to save; use training.fsdp, or ZeRO-3 in a "
            "script with transformers' Trainer, whose save_model puts tensors together"
        )
    return arguments
