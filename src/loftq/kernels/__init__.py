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

from loftq.errors import UsageError
from loftq.spec import QuantSpec

MODULES = {"cpu": "loftq.kernels.cpu", "cuda": "loftq.kernels.gpu"}  # of codes in blocks
TRELLIS = {"cpu": "loftq.kernels.trellis_cpu", "cuda": "loftq.kernels.trellis_gpu"}
REFERENCE = "loftq.kernels.reference"
NEEDS = {"cpu": "numba", "cuda": "triton"}


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
            return importlib.import_module(module)
        except ImportError as e:
            logging.getLogger("loftq").warning(
                "the compiled kernels for %s cannot be used (%s); plain PyTorch takes their place, more slowly. "
                "To have them: pip install %s",
                device_type,
                e,
                NEEDS[device_type],
            )
    return importlib.import_module(REFERENCE)
