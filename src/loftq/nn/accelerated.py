"""Loading by accelerate: a packed model that was built empty has, loaded, the dtypes that it was built in."""

import inspect
from typing import Any

from torch import nn

from loftq.errors import UsageError, quoted
from loftq.nn.layers import Packed
from loftq.patching import patches


def keep_dtypes(accelerate: Any) -> None:
    """Let ``load_checkpoint_in_model`` offload in the model's dtypes, and never round what packed layers store.

    accelerate offloads in the dtype of the file. Ours hold dense weights in 16 bits for a model in 32, so that a layer
    of one dtype would get inputs of another. Its ``dtype`` would round scales.

    Args:
        accelerate: ``accelerate.utils.modeling``, which defines the function, or ``accelerate.big_modeling``, which
            may have imported it before.
    """

    @patches(accelerate, "load_checkpoint_in_model")
    def load(theirs: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        packed = [module for module in model.modules() if isinstance(module, Packed)]
        if not packed:
            return theirs(model, *args, **kwargs)
        _refuse_empty_buffers(model)
        given = inspect.signature(theirs).bind(model, *args, **kwargs)
        dtype = given.arguments.pop("dtype", None)
        if dtype is not None:
            stored = {id(tensor) for module in packed for tensor in module.stored}
            for parameter in model.parameters():
                if parameter.is_floating_point() and id(parameter) not in stored:
                    parameter.data = parameter.data.to(dtype)
            for module in packed:
                module.compute_dtype = dtype
        wanted = {name: parameter.dtype for name, parameter in model.named_parameters()}
        theirs(*given.args, **given.kwargs)
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(wanted[name])


def _refuse_empty_buffers(model: nn.Module) -> None:
    """UsageError for a buffer on the meta device that no checkpoint holds, such as the frequencies of positions."""
    held = model.state_dict()
    empty = next((name for name, buffer in model.named_buffers() if buffer.is_meta and name not in held), None)
    if empty:
        raise UsageError(
            f"{quoted(empty)} is on the meta device, and no checkpoint holds it; build the model in "
            "init_empty_weights() without include_buffers=True, or load it with from_pretrained(DIR, device_map=...)"
        )
