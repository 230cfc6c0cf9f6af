"""Models that somebody else has quantized: how they load, and the matrices that their layers multiply with."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loftq.architecture.configuration import classes, read_config
from loftq.architecture.kinds import kind_of
from loftq.architecture.loading import load_config, load_weights
from loftq.errors import InputError, UsageError, listed, one_line
from loftq.nn.layers import PackedWeight
from loftq.numerics import oriented

ROWS = 1024  # inputs in one probe of a forward
PROBED = (torch.float32, torch.bfloat16, torch.float16)  # dtypes in which a layer may be asked


def load(directory: Path, device: str = "cpu") -> Any:
    """The model of a directory, quantized or not, in its own class and in memory; no code that comes with it is run.

    Raises: InputError if transformers cannot load it, or finds no weights for a part of it; UsageError if the package
        that quantized it is missing.
    """
    values = read_config(directory, quantized=True)
    model_class, _ = classes(directory / "config.json", values)
    config = load_config(directory)
    model, found = load_weights(model_class, directory, config, device_map=device, output_loading_info=True)
    absent = sorted(found["missing_keys"])
    if absent:
        raise InputError(f"{directory}: no weights for {listed(absent)}; fetch the directory again")
    return model.eval()


def dequantized(module: nn.Module) -> Tensor:
    """The frozen weight ``(out, in)`` in float32, or an embedding's table, to the bit as its training forward uses it.

    Ours, dense layers, bitsandbytes' and HQQ's decode themselves: bitsandbytes' NF4 and FP4 with the scales as nested
    quantization leaves them and in the dtypes of its product, its int8 without the rounding of the inputs, which is no
    matter of the weight. Any other linear layer, GPTQ's and AWQ's for example, is asked for its outputs on the rows of
    the identity, in the dtype of its scales: the weight as rounded to that dtype.

    Raises: UsageError for a layer that is offloaded, not quantized yet, or does not run on its device.
    """
    tensors = _tensors(module)
    if any(t.device.type == "meta" for t in tensors):
        raise UsageError(f"{type(module).__name__} is offloaded; load all of the model into memory")
    with torch.no_grad():
        if isinstance(module, PackedWeight):
            return module.dequantize()
        if _is_from("bitsandbytes.nn", ("Linear4bit",), module):
            return _four_bits(module)
        if _is_from("bitsandbytes.nn", ("Linear8bitLt",), module):
            return _eight_bits(module)
        if _is_from("hqq.core.quantize", ("HQQLinear",), module):
            return module.dequantize().float()  # type: ignore[operator]
        if _is_dense(module):
            return _dense(module)
        return _by_forward(module)


def _is_from(package: str, classes: tuple[str, ...], module: nn.Module) -> bool:
    """Whether ``module`` is of one of the classes; a package that is not imported has made no layer."""
    found = sys.modules.get(package)
    return found is not None and isinstance(module, tuple(getattr(found, name) for name in classes))


def _is_dense(module: Any) -> bool:
    """Whether the layer is PyTorch's or transformers' own product or lookup, over ordinary floats."""
    from transformers.pytorch_utils import Conv1D

    plain = isinstance(module, nn.Embedding) or type(module).forward in (nn.Linear.forward, Conv1D.forward)
    return plain and type(module.weight) in (nn.Parameter, Tensor) and module.weight.dtype in PROBED


def _dense(module: Any) -> Tensor:
    return oriented(kind_of(module), module.weight.detach().float())


def _four_bits(module: Any) -> Tensor:
    """Decoded to the dtype of the original weight and cast to that of the product: both round."""
    from bitsandbytes.functional import dequantize_4bit

    state = module.weight.quant_state
    if state is None:
        raise UsageError("Linear4bit is not quantized yet; move the model to its device first")
    if getattr(state, "packing_format_for_cpu", False):  # repacked by an earlier evaluation, with other scales
        return _by_forward(module)
    weight = dequantize_4bit(module.weight.data, state)
    return weight.to(module.compute_dtype or weight.dtype).float()


def _eight_bits(module: Any) -> Tensor:
    from bitsandbytes.functional import int8_vectorwise_dequant

    scales = module.weight.SCB if module.state.SCB is None else module.state.SCB  # they move at the first forward
    if module.weight.dtype != torch.int8 or scales is None:
        raise UsageError("Linear8bitLt is not quantized yet; move the model to its device first")
    return int8_vectorwise_dequant(module.weight.data, scales.to(module.weight.device)).float()


def _by_forward(module: Any) -> Tensor:
    """The weight of an affine layer, from its outputs on the rows of the identity and on zero."""
    columns = getattr(module, "in_features", None) or getattr(module, "infeatures", None)
    if not columns:
        raise UsageError(f"{type(module).__name__} says no in_features: not a linear layer that can be read")
    tensors = _tensors(module)
    bias = getattr(module, "bias", None)
    dtypes = (t.dtype for t in tensors if t is not bias and t.dtype in PROBED)
    dtype = getattr(module, "compute_dtype", None) or next(dtypes, torch.float32)
    device = tensors[0].device if tensors else torch.device("cpu")
    probes = torch.eye(columns, dtype=dtype, device=device)
    try:
        with _without_bias(module):
            offset = module(torch.zeros_like(probes[:1])).float()
            parts = [module(rows).float() - offset for rows in probes.split(ROWS)]
    except Exception as e:  # whatever a kernel raises that has no code for this device or dtype
        raise UsageError(
            f"{type(module).__name__} does not run on {device} in {dtype}: {one_line(e)}; try another device"
        ) from e
    return torch.cat(parts).T.contiguous()


@contextlib.contextmanager
def _without_bias(module: Any) -> Iterator[None]:
    """The bias set to zero meanwhile: added to the weight in 16 bits and taken off again, it would round it."""
    bias = getattr(module, "bias", None)
    if not isinstance(bias, Tensor):
        yield
        return
    held = bias.detach().clone()
    bias.zero_()
    try:
        yield
    finally:
        bias.copy_(held)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
