"""How a budget was spent: a table with uniform widths and the paper's rule, and a plot of error against bytes."""

from pathlib import Path
from typing import Any

from loftq.report.figures import pyplot, save
from loftq.report.tables import console, plain_table
from loftq.spelled import spell_error, spell_size

OURS, UNIFORM, PAPER = "#2b6cb0", "#1a202c", "#c05621"


def beside(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """What a budget chose, and the nearest of what else there is that takes no more bytes: name and point.

    Args:
        report: of :func:`loftq.checkpoint.budget.within_budget`.
    """
    chosen = report["chosen"]
    rows = [(f"budget {report['budget']}", chosen)]
    for kind, name in (
        ("uniform", "uniform, {bits} bits"),
        ("first_layers", "paper: first {layers} layers 4 bits, rest 2"),
    ):
        fitting = [point for point in report[kind] if point["bytes"] <= chosen["bytes"]]
        if fitting:
            best = max(fitting, key=lambda point: point["bytes"])
            rows.append((name.format(**best), best))
    return rows


def print_budget(report: dict[str, Any]) -> None:
    """The table: bytes, bits and expected error."""
    rows = beside(report)
    table = plain_table(
        ("at no more bytes", "left"), ("size", "right"), ("stored bits", "right"), ("expected error", "right")
    )
    for name, point in rows:
        size, error = spell_size(point["bytes"]), spell_error(point["error"])
        table.add_row(name, size, f"{point['bits_per_weight']:.3f}", error)
    out = console()
    out.print()
    out.print(table)
    out.print(
        "Size: all tensors, with the adapter and dense weights. Stored bits: per quantized weight. Expected error: "
        "relative to each matrix, root mean square over the matrices, after one step."
    )


def plot(report: dict[str, Any], file: Path) -> None:
    """Expected error against bytes: the greedy frontier, the choice, uniform widths and the paper's rule."""
    figure, axis = pyplot().subplots(figsize=(7, 4.5), layout="constrained")
    axis.step(*_across(report["frontier"]), where="post", color=OURS, linewidth=1.3, label="budgets, greedy")
    if report["first_layers"]:
        paper = [(point["bytes"], point["error"]) for point in report["first_layers"]]
        axis.plot(
            *_across(paper), "o-", color=PAPER, markersize=3, linewidth=0.8, label="first k layers 4 bits (paper)"
        )
    for i, point in enumerate(report["uniform"]):
        place = (point["bytes"] / 1e6, point["error"])
        axis.plot(*place, "s", color=UNIFORM, markersize=5, label=None if i else "uniform")
        axis.annotate(f"{point['bits']} bits", place, xytext=(5, 4), textcoords="offset points", fontsize=8)
    chosen = report["chosen"]
    axis.plot(
        chosen["bytes"] / 1e6, chosen["error"], "*", color=OURS, markersize=14, label=f"budget {report['budget']}"
    )
    axis.set(
        xlabel="MB of all tensors, backbone and adapter",
        ylabel="expected relative error (lower is better)",
        title="Error against bytes",
        yscale="log",
    )
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8)
    save(figure, file)


def _across(points: list) -> tuple[tuple[float, ...], ...]:
    """MB and errors, for the two axes."""
    return tuple(zip(*((size / 1e6, error) for size, error in points), strict=True))
