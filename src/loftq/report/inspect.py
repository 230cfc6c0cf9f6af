"""What is in a LoftQ checkpoint: the data of ``loftq inspect``, its table and its plot."""

from pathlib import Path
from typing import Any

from loftq.errors import UsageError
from loftq.report.figures import pyplot, save
from loftq.spelled import spell_error

HELPS_BELOW = 0.99  # a low-rank part that removes less than 1 % of the error is reported


def inspection(manifest: dict[str, Any]) -> dict[str, Any]:
    """``matrices`` (each with the keys below), ``totals`` and ``warnings``."""
    keys = (
        "name",
        "shape",
        "bits",
        "rank",
        "alpha",
        "bytes",
        "errors",
        "output_errors",
        "kept",
        "qlora_error",
        "instead",
    )
    matrices = [{k: m[k] for k in keys if k in m} for m in manifest["matrices"]]
    return {"matrices": matrices, "totals": manifest["totals"], "warnings": warnings(matrices)}


def judged(matrix: dict[str, Any]) -> tuple[float, float, float]:
    """The error that decided, of what is written and of quantization alone, and the norm that it is relative to.

    That of the outputs where they were measured, else the weights'. The norm is NaN if the report has none.
    """
    kind, norm = ("output_errors", "output_norm") if "output_errors" in matrix else ("errors", "norm")
    return matrix[kind][matrix["kept"]], matrix[kind][0], matrix.get(norm, float("nan"))


def warnings(matrices: list[dict[str, Any]]) -> list[str]:
    """One line per matrix that has another code than was asked for, or whose low-rank part does not help."""
    lines = []
    for m in matrices:
        if "instead" in m:
            lines.append(f"{m['name']}: stored in {m['bits']} bits of a scalar code ({m['instead']})")
        error, alone, _ = judged(m)
        if m["kept"] and alone and error > HELPS_BELOW * alone:
            found = f"error {spell_error(error)}, quantized alone {spell_error(alone)}"
            lines.append(f"{m['name']}: the low-rank part hardly helps ({found}); a larger --rank may")
    return lines


def plot(inspected: dict[str, Any], file: Path) -> None:
    """Error of every matrix, with the initialization over quantization alone, and the error per step, as a picture."""
    plt = pyplot()
    matrices = inspected["matrices"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), width_ratios=(3, 2), layout="constrained")
    at = range(len(matrices))
    left.bar(at, [judged(m)[1] for m in matrices], color="#c9c9c9", label="quantized alone")
    left.bar(at, [judged(m)[0] for m in matrices], color="#2b6cb0", width=0.55, label="with the initialization")
    calibrated = all("output_errors" in m for m in matrices)
    left.set(
        xlabel="matrix, in the order of the table",
        ylabel="||(W - Q - s·BA) X|| / ||W X||, tokens held out" if calibrated else "||W - Q - s·BA|| / ||W||",
        title="Error of every matrix",
    )
    figure.legend(loc="outside lower left", ncols=2)
    for m in matrices:
        trace = m.get("output_errors", m["errors"])
        relative = [e / trace[0] if trace[0] else 0.0 for e in trace]
        right.plot(relative, color="#2b6cb0", alpha=0.25, linewidth=1)
        right.plot(m["kept"], relative[m["kept"]], "o", color="#c05621", markersize=3, alpha=0.6)
    right.set(xlabel="step", ylabel="error / error of quantization alone", title="Error per step (dot: the step kept)")
    for axis in (left, right):
        axis.xaxis.get_major_locator().set_params(integer=True)
    try:
        save(figure, file)
    except UsageError as e:
        raise UsageError(f"--plot {e}") from e
