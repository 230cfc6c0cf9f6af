"""The pictures of a comparison: training losses, and the metric against the bytes."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loftq.report.comparison import NOT_CONVERGED, Arm, Row, arms
from loftq.report.figures import pyplot, save

COLOURS = {"full": "#1a202c", "lora": "#718096", "qlora": "#c05621", "loftq": "#2b6cb0"}
STARTS = ("#2f855a", "#6b46c1", "#b83280", "#00838f", "#975a16")  # LoftQ's other than the paper's, as they come
DASHES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 3)))
SMOOTH = 0.05  # share of a curve that its running mean is taken over


def plot_losses(rows: Sequence[Row], file: Path) -> None:
    """Training loss of every arm by step, its first seed, as a running mean."""
    found = [arm for arm in arms(rows) if arm.rows[0]["losses"]]
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(9.5, 4.5), layout="constrained")
    for arm in found:
        steps, losses = zip(*arm.rows[0]["losses"], strict=True)
        window = max(1, round(SMOOTH * len(losses)))
        means = [sum(losses[max(0, i + 1 - window) : i + 1]) / min(window, i + 1) for i in range(len(losses))]
        axis.plot(steps, means, label=arm.name, linewidth=1.3, **_line(arm, found))
    axis.set(xlabel="step", ylabel="training loss", title=f"{rows[0]['task']}, seed {rows[0]['seed']}")
    axis.spines[["top", "right"]].set_visible(False)
    if found:
        figure.legend(fontsize=8, loc="outside right upper")
    save(figure, file)


def plot_bytes(rows: Sequence[Row], file: Path) -> None:
    """The main metric of every arm against the bytes of its backbone and adapter; bars from smallest to largest.

    Arms that did not converge are crosses at the foot.
    """
    metric = rows[0]["metric"]
    found = [arm for arm in arms(rows) if arm.bytes]
    figure, axis = pyplot().subplots(figsize=(7, 4.5), layout="constrained")
    for i, arm in enumerate(found):
        at = sum(arm.bytes.values()) / 1e6
        first = all(other.method != arm.method for other in found[:i])
        style = {"color": _colour(arm, found), "label": arm.method if first else None}
        values = [value for value in arm.values(metric) if math.isfinite(value)]
        across = axis.get_xaxis_transform()  # x in MB, y as a share of the axis
        text, place, coordinates = arm.settings["bits"], (at, 0.02), across
        if math.isfinite(middle := statistics.median(arm.values(metric))):
            axis.errorbar(at, middle, [[middle - values[0]], [values[-1] - middle]], fmt="o", capsize=3, **style)
            place, coordinates = (at, middle), "data"
        else:
            axis.plot(at, 0.02, "x", transform=across, **style)
            text += f" {NOT_CONVERGED}"
        axis.annotate(text, place, xycoords=coordinates, xytext=(5, 4), textcoords="offset points", fontsize=8)
    axis.set(xlabel="MB on disk, backbone and adapter (numbers: bits)", ylabel=metric, title=rows[0]["task"])
    axis.margins(0.12)
    axis.spines[["top", "right"]].set_visible(False)
    if found:
        axis.legend(fontsize=8)
    save(figure, file)


def _line(arm: Arm, found: Sequence[Arm]) -> dict[str, Any]:
    """Colour by method and start, dashes by how many of these came before."""
    same = [other for other in found if other.method == arm.method]
    return {"color": _colour(arm, found), "linestyle": DASHES[same.index(arm) % len(DASHES)]}


def _colour(arm: Arm, found: Sequence[Arm]) -> str:
    """One for each method, and one for each start of LoftQ other than the paper's."""
    starts = list(dict.fromkeys(other.method for other in found if other.settings.get("preset", "loftq") != "loftq"))
    if arm.method in starts:
        return STARTS[starts.index(arm.method) % len(STARTS)]
    return COLOURS[arm.settings["method"]]
