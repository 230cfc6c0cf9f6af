"""The hot operations, in one contract with several back ends.

A back end is a module with the functions of :mod:`loftq.kernels.reference`. The form of the code and the device of the
tensors choose it: ``cpu`` (compiled with Numba), ``cuda`` (Triton), ``reference`` (plain PyTorch) for every other. The
environment variable ``LOFTQ_KERNELS=reference`` selects the reference for all. A back end that cannot be used is named
once, with the reason, before the reference takes its place.
"""

import functools
import importlib
import logging
import os
from types import ModuleType

import torch

from loftq.errors import UsageError, one_line
from loftq.spec import QuantSpec

MODULES = {"cpu": "loftq.kernels.cpu", "cuda": "loftq.kernels.gpu"}  # of codes in blocks
TRELLIS = {"cpu": "loftq.kernels.trellis_cpu", "cuda": "loftq.kernels.trellis_gpu"}
REFERENCE = "loftq.kernels.reference"
NEEDS = {"cpu": "numba", "cuda": "triton"}
COMPILER = "install what Triton builds its launcher with, a C compiler and Python's headers (gcc, python3-dev)"


class _NotStarted(Exception):
    """Triton is there, and cannot launch anything."""


def backend(device: torch.device, spec: QuantSpec | None = None) -> ModuleType:
    """The back end for tensors on ``device``, of a code in blocks or of ``spec``'s form."""
    modules = TRELLIS if spec is not None and spec.codebook.form == "trellis" else MODULES
    return _load(device.type, modules.get(device.type, REFERENCE), os.environ.get("LOFTQ_KERNELS", "compiled"))


@functools.cache
def _load(device_type: str, module: str, wanted: str) -> ModuleType:
    if wanted not in ("compiled", "reference"):
        raise UsageError(f"LOFTQ_KERNELS is {wanted!r}; wanted compiled or reference")
    if wanted == "compiled":
        try:
            found = importlib.import_module(module)
            if device_type == "cuda":
                _start_triton()
            return found
        except (ImportError, _NotStarted) as e:
            cure = COMPILER if isinstance(e, _NotStarted) else f"pip install {NEEDS[device_type]}"
            logging.getLogger("loftq").warning(
                "the compiled kernels for %s cannot be used (%s); plain PyTorch takes their place, more slowly. "
                "To have them: %s",
                device_type,
                e,
                cure,
            )
    return importlib.import_module(REFERENCE)


def _start_triton() -> None:
    """Let Triton build, or find, the launcher that it makes on its first use. Images without a compiler are common."""
    from triton.runtime import driver  # pyright: ignore[reportMissingImports]

    try:
        driver.active.get_current_target()
    except Exception as e:  # of a compiler that is missing or fails, a library that is not found
        raise _NotStarted(one_line(e)) from e
