"""Time and memory of one matrix, by measured laws: docs/methods.md, "What they cost".

benchmarks/constants.py measures their constants, and writes them to constants.json.
"""

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from loftq.numerics.machine import default_workers
from loftq.spec import QuantSpec, SolveSpec


@functools.cache
def constants() -> dict[str, Any]:
    """The measured constants.

    Of one CPU, for a step: ``seconds_per_weight``; ``seconds_per_square``: and per ``out · in²``, where a whole H
    goes over the codes; ``seconds_per_trellis_weight``: more, by the window. Of memory: ``bytes_of_process``;
    ``bytes_per_weight``: of a worker; ``bytes_per_square``: and per ``in²``, for five float64 matrices. Of a
    training step: ``floats_per_feature``: kept of a token for each input and output of a layer; ``bytes_per_logit``:
    of a token and a word of the vocabulary.
    """
    return json.loads((Path(__file__).parent / "constants.json").read_text("utf-8"))


def squares(spec: SolveSpec, calibrated: bool, quant: QuantSpec | None = None) -> bool:
    """Whether a matrix ``(out, in)`` is worked on with matrices ``(in, in)``, and its time grows as ``out · in²``.

    Without a calibration only where descent goes over a trellis, whose columns are not independent.
    """
    trellis = quant is not None and quant.codebook.form == "trellis"
    return spec.rounding != "nearest" and (calibrated or (trellis and spec.rounding == "descent"))


def memory(rows: int, columns: int, spec: SolveSpec, quant: QuantSpec, calibrated: bool) -> int:
    """Bytes that a worker needs for a matrix ``(rows, columns)``."""
    whole = (calibrated and spec.metric == "full") or squares(spec, calibrated, quant)
    found = constants()
    return round(found["bytes_per_weight"] * rows * columns) + (found["bytes_per_square"] * columns**2 if whole else 0)


def seconds(
    rows: int, columns: int, spec: SolveSpec, quant: QuantSpec | None = None, calibrated: bool = False
) -> float:
    """CPU seconds for a matrix ``(rows, columns)``, about: measured on one CPU, within a factor of two on others."""
    found = constants()
    whole = squares(spec, calibrated, quant)
    each = found["seconds_per_weight"] + (found["seconds_per_square"] * columns if whole else 0)
    if quant is not None and quant.codebook.form == "trellis":
        each += found["seconds_per_trellis_weight"][str(quant.window)]
    return max(spec.steps, 1) * rows * columns * each


def workers_for(
    matrices: Iterable[tuple[tuple[int, int], QuantSpec]], spec: SolveSpec, device: str, calibrated: bool
) -> int:
    """The default number of matrices, of these shapes and codes, to solve at a time."""
    largest = max((memory(*shape, spec, quant, calibrated) for shape, quant in matrices), default=0)
    return default_workers(device, largest)
