"""The pictures of a comparison: training losses, and the metric against the bytes."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loftq.finetune.comparison import NOT_CONVERGED, ArmResult, Row, arms
from loftq.report.figures import pyplot, save
from loftq.spelled import spell_size

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
    _finish(figure, axis, file, named=bool(found))


def plot_bytes(rows: Sequence[Row], file: Path) -> None:
    """The main metric of every arm by what is on disk; bars from smallest to largest.

    Arms of one width and size stand side by side in a column, and columns stand in the order of their sizes: to scale,
    those of 2 to 4 bits would lie on top of each other. Arms that did not converge are crosses at the foot.
    """
    metric = rows[0]["metric"]
    found = [arm for arm in arms(rows) if arm.bytes]
    columns: dict[tuple[str, str], list[ArmResult]] = {}
    for arm in sorted(found, key=_size):
        columns.setdefault((spell_size(_size(arm)), str(arm.settings["bits"])), []).append(arm)
    figure, axis = pyplot().subplots(figsize=(max(7, 1.5 + 1.2 * len(columns)), 4.5), layout="constrained")
    named = set()
    for at, column in enumerate(columns.values()):
        for place, arm in zip(_side_by_side(at, len(column)), column, strict=True):
            style = {"color": _colour(arm, found), "label": None if arm.method in named else arm.method}
            named.add(arm.method)
            values = [value for value in arm.values(metric) if math.isfinite(value)]
            if math.isfinite(middle := statistics.median(arm.values(metric))):
                axis.errorbar(place, middle, [[middle - values[0]], [values[-1] - middle]], fmt="o", capsize=3, **style)
            else:
                across = axis.get_xaxis_transform()  # y as a share of the axis
                axis.plot(place, 0.02, "x", transform=across, **style)
                axis.annotate(NOT_CONVERGED, (place, 0.05), xycoords=across, ha="center", fontsize=8)
    axis.set_xticks(range(len(columns)), [f"{bits}\n{size}" for size, bits in columns], fontsize=8)
    for between in range(1, len(columns)):
        axis.axvline(between - 0.5, color="#e2e8f0", linewidth=0.8, zorder=0)
    better = "higher" if rows[0]["greater_is_better"] else "lower"
    axis.set(
        xlabel="bits of the code; size on disk, backbone and adapter (not to scale)",
        ylabel=f"{metric} ({better} is better)",
        title=rows[0]["task"],
    )
    axis.margins(y=0.12)
    axis.set_xlim(-0.5, max(len(columns), 1) - 0.5)
    _finish(figure, axis, file, named=bool(found))


def _finish(figure: Any, axis: Any, file: Path, named: bool) -> None:
    """Put the figure into a file, with a legend beside it where its parts are ``named``."""
    axis.spines[["top", "right"]].set_visible(False)
    if named:
        figure.legend(fontsize=8, loc="outside right upper")
    save(figure, file)


def _size(arm: ArmResult) -> int:
    """Bytes on disk."""
    return sum(arm.bytes.values())


def _side_by_side(at: int, count: int) -> list[float]:
    """Places of the arms of a column, within 0.35 of its middle."""
    step = min(0.2, 0.7 / max(count - 1, 1))
    return [at + step * (i - (count - 1) / 2) for i in range(count)]


def _line(arm: ArmResult, found: Sequence[ArmResult]) -> dict[str, Any]:
    """Colour by method and start, dashes by how many of these came before."""
    same = [other for other in found if other.method == arm.method]
    return {"color": _colour(arm, found), "linestyle": DASHES[same.index(arm) % len(DASHES)]}


def _colour(arm: ArmResult, found: Sequence[ArmResult]) -> str:
    """One for each method, and one for each start of LoftQ other than the paper's."""
    starts = list(dict.fromkeys(other.method for other in found if other.settings.get("preset", "loftq") != "loftq"))
    if arm.method in starts:
        return STARTS[starts.index(arm.method) % len(STARTS)]
    return COLOURS[arm.settings["method"]]
