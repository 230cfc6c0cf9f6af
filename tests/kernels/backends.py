"""Every back end as a value that a test can call: module and device. The CUDA one also without a CUDA device."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from loftq.kernels import MODULES, REFERENCE
from loftq.numerics import encode, quantize
from loftq.spec import QuantSpec

TRITON = "3.7"  # older interpreters fail with NumPy 2.4
NAMES = (
    "reference",
    "cpu",
    "interpreted",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
)


class Backend(NamedTuple):
    module: Any
    device: torch.device

    def __call__(self, function: str, *args: Any) -> Tensor:
        """Call with CPU tensors, and have the result as one."""
        moved = [_moved(a, self.device) for a in args]
        return getattr(self.module, function)(*moved).cpu()


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {k: v.to(device) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(v, device) for v in value)
    return value.to(device) if isinstance(value, Tensor) else value


def backend(name: str, modules: dict[str, str] = MODULES) -> Backend:
    if name in ("interpreted", "compiled"):
        return Backend(_copy(modules["cuda"], name, "1" if name == "interpreted" else "0"), torch.device("cpu"))
    module = modules.get(name, REFERENCE)
    return Backend(importlib.import_module(module), torch.device("cuda" if name == "cuda" else "cpu"))


def stored(spec: QuantSpec, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A quantized random matrix, with one row of zeros and one of wide range, as the file format has it."""
    weight = torch.randn(rows, columns) * 0.05
    if rows > 2:
        weight[1], weight[2] = 0, weight[2] * torch.randn(columns).exp()
    return encode(quantize(weight.to(dtype), spec), spec)


def interpreted() -> ModuleType:
    """The CUDA back end, once more, with kernels that run in Triton's interpreter on CPU tensors."""
    return backend("interpreted").module


def compiled() -> ModuleType:
    """The CUDA back end, once more, with kernels that are compiled, whatever the environment says."""
    return backend("compiled").module


def _copy(module: str, name: str, interpret: str) -> ModuleType:
    """A copy of the module, for the choice is made when a kernel is defined, and one process needs both."""
    pytest.importorskip("triton", minversion=TRITON)
    name = f"{module}_{name}"
    if name not in sys.modules:
        spec = importlib.util.find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        located = importlib.util.spec_from_file_location(name, spec.origin)
        assert located is not None
        assert located.loader is not None
        copy = importlib.util.module_from_spec(located)
        before = os.environ.get("TRITON_INTERPRET")
        os.environ["TRITON_INTERPRET"] = interpret
        try:
            located.loader.exec_module(copy)
        finally:
            del os.environ["TRITON_INTERPRET"]
            if before is not None:
                os.environ["TRITON_INTERPRET"] = before
        if interpret == "1":
            _repair_bfloat16()
        sys.modules[name] = copy
    return sys.modules[name]


def _repair_bfloat16() -> None:
    """Triton's interpreter cuts float32 to bfloat16, which a GPU rounds, and multiplies bfloat16 as integers.

    Products are PyTorch's, in float32: tensor cores sum so, and NumPy's loop would be less accurate than either.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast = builder.cast_impl

    def rounding_cast(self: Any, source: Any, wanted: Any) -> Any:
        if (source.dtype.scalar, wanted.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, wanted)
        data = torch.from_numpy(np.ascontiguousarray(source.data))
        return handle(data.bfloat16().view(torch.uint16).numpy(), tl.bfloat16)

    def float_dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        factors = (torch.from_numpy(np.ascontiguousarray(f.data)) for f in (a, b))
        left, right = (f.view(torch.bfloat16).float() if f.dtype == torch.uint16 else f.float() for f in factors)
        return handle((left @ right).numpy() + d.data, d.dtype.scalar)

    builder.cast_impl = rounding_cast  # pyright: ignore[reportAttributeAccessIssue]
    builder.create_dot = float_dot  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def guarded_memory(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail where an interpreted kernel reads or writes a place outside the tensors that it was given."""
    from triton.runtime import interpreter

    real, convert = interpreter._interpreter, interpreter._implicit_cvt
    ranges: list[tuple[int, int]] = []

    def noted(arg: Any) -> Any:
        if hasattr(arg, "data_ptr"):
            ranges.append((arg.data_ptr(), arg.data_ptr() + arg.numel() * arg.element_size()))
        return convert(arg)

    def check(pointers: np.ndarray, mask: np.ndarray, size: int) -> None:
        at = np.broadcast_to(pointers, mask.shape)[mask].astype(np.int64)
        inside = np.zeros(at.shape, bool)
        for start, stop in ranges:
            inside |= (at >= start) & (at + size <= stop)
        assert inside.all(), f"{(~inside).sum()} of {at.size} places are outside"

    class Guard:
        def load(self, pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
            check(pointers, mask, dtype.itemsize)
            return real.load(pointers, mask, other, dtype)

        def store(self, pointers: Any, values: Any, mask: Any) -> Any:
            check(pointers, mask, values.dtype.itemsize)
            return real.store(pointers, values, mask)

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    with patch.context() as scope:
        scope.setattr(interpreter, "_interpreter", Guard())
        scope.setattr(interpreter, "_implicit_cvt", noted)
        yield


@contextmanager
def compiled_only(patch: pytest.MonkeyPatch, architecture: int) -> Iterator[list[Any]]:
    """Calls of the :func:`compiled` back end compile for ``architecture`` as they would, and launch nothing.

    The results of such calls are meaningless. Yields the list of the compiled kernels.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Driver:
        """As much of a driver as compiling asks for. Kernels are kept per device: a device for each architecture."""

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", architecture, 32)

        def get_current_device(self) -> int:
            return architecture

        def get_current_stream(self, device: int) -> int:
            return 0

    run, kernels, product = JITFunction.run, [], compiled()._product

    def warm_up(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernels.append(run(self, *args, **{**kwargs, "warmup": True}))
        return kernels[-1]

    with patch.context() as scope:
        scope.setattr(JITFunction, "run", warm_up)
        scope.setattr(product, "configs", product.configs[-1:])  # one configuration: nothing to time
        scope.setattr(driver, "_active", Driver())
        yield kernels
