"""What blocks handed on, in a file: from it, collecting goes on after the block where it was stopped."""

import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from loftq.calibration.blocks import Output
from loftq.errors import InputError
from loftq.formats import fsio, strict_json
from loftq.formats.regular import shown
from loftq.formats.tensorfile import Entry, dtype_name, encode_header, read_header, read_tensor, tensor_bytes

States = list[dict[str, dict[int, Output]]]  # of every batch, as Records keep them


def write_states(path: Path, states: States) -> fsio.FileDigest | None:
    """Put states at ``path``; None, and nothing there, where a block hands on more than tensors and plain values."""
    tensors: list[Tensor] = []
    try:
        form = json.dumps(_form(states, tensors), allow_nan=False)
        entries = [Entry(str(i), dtype_name(t.dtype), tuple(t.shape)) for i, t in enumerate(tensors)]
    except (TypeError, ValueError, InputError):
        return None
    return fsio.write_atomic(path, [encode_header(entries, {"form": form}), *map(tensor_bytes, tensors)])


def read_states(path: Path, device: str) -> States:
    """What :func:`write_states` put there, on a device. InputError for a file that is damaged."""
    file = read_header(path)
    form = strict_json.loads(file.metadata.get("form", "").encode(), shown(path))
    return _value(form, [read_tensor(t, file.stamp).to(device) for t in file.tensors.values()])


def _form(value: Any, tensors: list[Tensor]) -> Any:
    """A value as JSON, its tensors put into a list."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if type(value) in (tuple, list):
        return {type(value).__name__: [_form(item, tensors) for item in value]}
    if type(value) is dict:
        return {"dict": [[_form(key, tensors), _form(item, tensors)] for key, item in value.items()]}
    if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
        return {"plain": value}
    raise TypeError(f"{type(value).__name__} is no plain value")


def _value(form: dict[str, Any], tensors: list[Tensor]) -> Any:
    """What :func:`_form` was given."""
    ((kind, held),) = form.items()
    if kind == "tensor":
        return tensors[held]
    if kind == "dict":
        return {_value(key, tensors): _value(item, tensors) for key, item in held}
    return held if kind == "plain" else {"tuple": tuple, "list": list}[kind](_value(item, tensors) for item in held)
