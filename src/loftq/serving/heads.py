"""The head that was trained with an adapter, and that the base lacks: of which class it makes the model."""

from typing import Any

import torch
import transformers

from loftq.adapters.start import HEADED_TASKS
from loftq.architecture.configuration import classes, read_config
from loftq.errors import InputError, listed, one_line
from loftq.formats.regular import shown
from loftq.serving.adapter import Adapter
from loftq.serving.base import Base


def find(base: Base, adapter: Adapter | None) -> dict[str, Any]:
    """What ``config.json`` has to say of the model with the adapter's head; nothing if there is none.

    Raises: InputError if the head is of no class of the base's family, or not all of it is there.
    """
    if adapter is None or not adapter.new:
        return {}
    where = f"{shown(adapter.directory)}: {listed(adapter.new, 3)}"
    task = adapter.config.get("task_type")
    ending = next((ending for ending, name in HEADED_TASKS.items() if name == task), None)
    if ending is None:
        raise InputError(f"{where}: the base has no such weights, and task_type {task} brings none; of another model?")
    path = base.directory / "config.json"
    values = read_config(base.directory, quantized=True)
    values.pop("quantization_config", None)
    _, config_class = classes(path, values)
    auto: Any = getattr(transformers, f"AutoModel{ending}")
    for labels in sorted({adapter.shapes[held][0] for held in adapter.new.values()}):
        config = config_class.from_dict(values)
        if config.num_labels != labels:
            config.num_labels = labels
        try:
            with torch.device("meta"):
                model = auto.from_config(config)
        except Exception as e:  # whatever transformers raises for a family without such a class
            raise InputError(f"{where}: {one_line(e)}") from e
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        if all(shapes.get(name) == adapter.shapes[held] for name, held in adapter.new.items()):
            _check_whole(where, shapes, base, adapter)
            id2label = {str(i): label for i, label in config.id2label.items()}
            return {"architectures": [type(model).__name__], "id2label": id2label, "label2id": config.label2id}
    raise InputError(f"{where}: no head of AutoModel{ending} has these shapes; is the adapter of another model?")


def _check_whole(where: str, shapes: dict[str, tuple[int, ...]], base: Base, adapter: Adapter) -> None:
    missing = [n for n in shapes if n not in adapter.new and base.parameter(n) is None and not base.tied_to(n)]
    if missing:
        raise InputError(f"{where}: no weights for {listed(missing, 3)}; train them too: modules_to_save")
