"""The model card of what ``loftq train`` trained: an adapter, or a whole model."""

from collections.abc import Mapping
from typing import Any

from loftq.errors import quoted

METHODS = {
    "full": "fine-tuned in full",
    "lora": "with a LoRA adapter over the dense model",
    "qlora": "with a LoRA adapter over a quantized backbone, trained from zero (QLoRA)",
    "loftq": "with a LoRA adapter over a quantized backbone, trained from its LoftQ initialization",
}


def trained_card(
    result: Any,
    *,
    auto_class: str,
    base: str | None,
    hub_id: str | None,
    adapter: Mapping[str, Any] | None,
    labels: int | None,
    training: Mapping[str, Any],
) -> str:
    """README.md of a run's ``adapter`` or ``model``: what it is, how it was trained, how well it does, how to load it.

    Args:
        result: of the run, as ``metrics.json`` has it.
        auto_class: of transformers, that loads the model.
        base: what the adapter says of its base; None for a whole model.
        hub_id: of the model that was trained, if it is on the hub.
        adapter: ``rank`` and ``alpha``; None for a whole model.
        labels: classes of a classifier, unless there are two.
        training: what the recipe asked of the trainer.
    """
    front = [f"base_model: {hub_id}", f"base_model_relation: {'adapter' if adapter else 'finetune'}"] if hub_id else []
    package, loader = ("peft", auto_class.replace("Auto", "AutoPeft", 1)) if adapter else ("transformers", auto_class)
    packed = result.method in ("qlora", "loftq")
    options = f", num_labels={labels}" if labels else ""
    name = hub_id or (base if base and base.startswith("../") else None)
    rows: dict[str, Any] = {"task": result.task}
    if adapter:
        rows |= {"base": name or "a model of the machine that trained it; see adapter_config.json", **adapter}
    rows |= {
        "steps": f"{result.steps} ({result.epochs:g} epochs)",
        "learning rate": f"{result.learning_rate:g}",
        **{key: value for key, value in training.items() if key not in ("learning_rate", "max_steps")},
        "seed": result.seed,
        **{key: f"{value:.4f}".rstrip("0").rstrip(".") for key, value in result.metrics.items()},
        "versions": ", ".join(f"{name} {version}" for name, version in result.versions.items()),
    }
    return "\n".join(
        [
            "---",
            f"library_name: {package}",
            *front,
            f"tags: [loftq{', lora' if adapter else ''}]",
            "---",
            f"# {result.task.partition('@')[0]}, {METHODS[result.method]}",
            "",
            f"Trained by `loftq train`; metrics are of {' and '.join(result.splits)}, shares in percent.",
            "",
            "```python",
            *(["import loftq  # registers the packed layers"] if packed else []),
            f"from {package} import {loader}",
            "",
            'directory = "."  # this one, from inside it; elsewhere its path, or its id on the hub',
            f"model = {loader}.from_pretrained(directory{options})",
            "```",
            "",
            "| | |",
            "|---|---|",
            *(f"| {quoted(key)} | {quoted(value)} |" for key, value in rows.items()),
            "",
        ]
    )
