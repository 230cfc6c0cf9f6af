"""Tables for the terminal."""

import math
import re
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from loftq.errors import listed, quoted, visible
from loftq.formats.regular import shown
from loftq.report.inspect import judged, warnings
from loftq.solver import seconds, squares
from loftq.spec import PRESETS, QuantSpec, SolveSpec, preset_of
from loftq.spelled import spell_error, spell_size, spell_time

NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")  # of a layer or an expert, as a part of a name
MOST_OF_A_CELL = 2000  # characters; a tensor's name has half of that at most

WIDE = 10_000  # columns of a file or a pipe
NAME = 44  # columns that a matrix's name is given, before it is folded for the sake of others


def console() -> Console:
    """Without markup: paths may have ``[b]`` or ``:b:`` in them. What no terminal shows is as wide as it needs."""
    out = Console(highlight=False, markup=False, emoji=False)
    return out if out.is_terminal else Console(highlight=False, markup=False, emoji=False, width=WIDE)


class _Table(Table):
    """Names in it are shown with what cannot be seen of them escaped."""

    def add_row(self, *cells: Any, **style: Any) -> None:
        super().add_row(*(_cell(cell) for cell in cells), **style)


def _cell(cell: Any) -> Any:
    if isinstance(cell, Text):
        return Text(quoted(cell.plain, MOST_OF_A_CELL), cell.style)
    return quoted(cell, MOST_OF_A_CELL) if isinstance(cell, str) else cell


def plain_table(*columns: tuple[str, str]) -> Table:
    """A table without lines; a column is its heading and its side: texts left, folded if need be, numbers right."""
    named = any(name for name, _ in columns)
    table = _Table(box=None, pad_edge=False, header_style="bold", show_header=named)
    for name, side in columns:
        table.add_column(name, justify=side, no_wrap=side == "right", overflow="fold")  # type: ignore[arg-type]
    return table


def print_plan(rows: list[dict[str, Any]], coverage: float) -> None:
    """What is done with every tensor, and why not; the same tensor of all layers is one line."""
    columns = (("n", "right"), ("shape", "right"), ("stored as", "left"), ("rank", "right"), ("bytes", "right"))
    table = plain_table(("tensor", "left"), *columns)
    for name, alike in _folded([row for row in rows if not _is_vector(row)]).items():
        first, size = alike[0], sum(row["bytes"] for row in alike)
        shape = "x".join(map(str, first["shape"]))
        stored = _stored_as(first) if first["action"] == "quantize" else Text(f"kept: {first['reason']}", "dim")
        table.add_row(name, str(len(alike)), shape, stored, str(first.get("rank", "")), f"{size:,}")
    if vectors := [row["bytes"] for row in rows if _is_vector(row)]:
        kept = Text("kept: norms and biases", "dim")
        table.add_row("vectors", str(len(vectors)), "", kept, "", f"{sum(vectors):,}")
    out = console()
    out.print(table)
    quantized = [r for r in rows if r["action"] == "quantize"]
    weights = sum(math.prod(r["shape"]) for r in quantized)
    packed, total = sum(r["bytes"] for r in quantized), sum(r["bytes"] for r in rows)
    out.print(
        f"\n{len(quantized)} of {len(rows)} tensors are quantized: {weights:,} weights, {coverage:.1%} of those in the "
        f"layers, at {8 * packed / weights:.3f} bits; the backbone takes {spell_size(total)}."
    )


def _is_vector(row: dict[str, Any]) -> bool:
    return row["action"] == "keep" and len(row["shape"]) < 2


def _stored_as(row: dict[str, Any]) -> str:
    detail = f"block {row['block_size']}" if "block_size" in row else f"window {row['window']}"
    return f"{row['bits']}-bit {row['code']}, {detail}" + (f" ({row['instead']})" if "instead" in row else "")


def _folded(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows that differ in the numbers of their names alone, under one name with ranges: ``layers.0-31.mlp.up_proj``.

    Together they have all numbers of the ranges, so that a range never says too much.
    """
    alike: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        parts = tuple(None if NUMBER.fullmatch(part) else part for part in row["name"].split("."))
        told = tuple((key, str(value)) for key, value in row.items() if key not in ("name", "bytes"))
        alike.setdefault((parts, told), []).append(row)
    folded: dict[str, list[dict[str, Any]]] = {}
    for (parts, _), group in alike.items():
        numbers = [[int(part) for part in row["name"].split(".") if NUMBER.fullmatch(part)] for row in group]
        places = [sorted(set(place)) for place in zip(*numbers, strict=True)]
        if math.prod(map(len, places)) == len(group):
            ranges = iter(_ranges(place) for place in places)
            folded[".".join(next(ranges) if part is None else part for part in parts)] = group
        else:
            folded |= {row["name"]: [row] for row in group}
    return folded


def _ranges(numbers: list[int]) -> str:
    """Sorted numbers: ``0-3,7``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def print_cost(matrices: list[tuple[tuple[int, int], QuantSpec]], spec: SolveSpec) -> None:
    """How long the quantizing will take, for presets whose time grows faster than the weights."""
    if not squares(spec, calibrated=True):
        return
    each = [seconds(*shape, spec, quant, calibrated=True) for shape, quant in matrices]
    plain = SolveSpec(**PRESETS["fitted"])
    fitted = spell_time(sum(seconds(*shape, plain, quant) for shape, quant in matrices))
    always = any(squares(spec, False, quant) for _, quant in matrices)
    console().print(
        f"{'' if always else 'With a calibration, '}{preset_of(spec)} takes about {spell_time(sum(each))} of CPU time, "
        f"of that {spell_time(max(each))} for the largest matrix: time grows as out·in². fitted takes about {fitted}."
    )


def print_inspection(inspected: dict[str, Any]) -> None:
    """Every matrix and the totals of a LoftQ checkpoint; in a narrow terminal, without the less important columns."""
    out = console()
    columns = _inspected(inspected["matrices"])
    left_out, named = [], min(NAME, max((len(m["name"]) for m in inspected["matrices"]), default=0))
    for name in ("error per step", "step", "bytes", "shape", "outputs Q", "outputs"):
        width = sum(2 + max(map(len, (heading, *cells))) for heading, cells in columns.items())
        if width + named <= out.width:
            break
        if columns.pop(name, None):
            left_out.append(name)
    table = _Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("matrix", overflow="fold")
    for heading in columns:
        table.add_column(heading, justify="left" if heading == "error per step" else "right", no_wrap=True)
    for matrix, *cells in zip(inspected["matrices"], *columns.values(), strict=True):
        table.add_row(matrix["name"], *cells)
    out.print(table)
    if left_out:
        out.print(Text(f"Left out, because the terminal is narrow: {', '.join(left_out)}; --json has them.", "dim"))
    out.print()
    out.print(_totals(inspected["totals"]))
    for line in inspected["warnings"]:
        out.print(Text("warning:", "yellow"), visible(line))


def _inspected(matrices: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Heading -> a cell for each matrix."""
    columns = {
        "shape": ["x".join(map(str, m["shape"])) for m in matrices],
        "bits": [str(m["bits"]) for m in matrices],
        "rank": [str(m["rank"]) for m in matrices],
        "bytes": [f"{m['bytes']:,}" for m in matrices],
        "error Q": [spell_error(m["qlora_error"]) for m in matrices],
        "Q + BA": [spell_error(m["errors"][m["kept"]]) for m in matrices],
    }
    if any("output_errors" in m for m in matrices):
        pairs = [[spell_error(e) for e in judged(m)[1::-1]] if "output_errors" in m else ["", ""] for m in matrices]
        columns |= {"outputs Q": [pair[0] for pair in pairs], "outputs": [pair[1] for pair in pairs]}
    columns["step"] = [f"{m['kept']}/{len(m['errors']) - 1}" for m in matrices]
    columns["error per step"] = [
        " ".join(spell_error(e) for e in m.get("output_errors", m["errors"])[1:]) for m in matrices
    ]
    return columns


def print_summary(output: Path, manifest: dict[str, Any], made: bool) -> None:
    """What ``loftq quantize`` made, and what to do with it."""
    out, place = console(), shown(output)
    if not made:
        checked = f"The names and sizes of its files are right; `loftq verify {place}` checks their bytes."
        out.print(f"{place}: already done by an earlier run of this command. {checked}")
    out.print(_totals(manifest["totals"]))
    lines = warnings(manifest["matrices"])
    if lines:
        out.print(Text("warning:", "yellow"), f"{len(lines)} matrices gain little; see: loftq inspect {place}")
    if manifest.get("left_out"):
        out.print(f"left out of the source: {listed(manifest['left_out'], 4)}")
    out.print(f"Saved to {place}. Its README.md says how to load it; `loftq inspect {place}` shows every matrix.")


def print_start(output: Path, report: dict[str, Any]) -> None:
    """Every layer of an adapter that ``loftq start`` made, and what to do with it."""
    columns = (("layer", "left"), ("shape", "right"), ("rank", "right"), ("base", "right"), ("initialized", "right"))
    table = plain_table(*columns, ("", "left"))
    for layer in report["layers"]:
        before, after = layer["errors"]
        shape = "x".join(map(str, layer["shape"]))
        reason = Text(f"zero initialization: {layer['reason']}" if layer["reason"] else "", "dim")
        table.add_row(layer["name"], shape, str(layer["rank"]), spell_error(before), spell_error(after), reason)
    out = console()
    out.print(table)
    layers = {"error": f"\nrelative error of {len(report['layers'])} layers"}
    for key, what in {**layers, "output_error": "relative error of their outputs, held-out tokens"}.items():
        if key in report:
            before, after = report[f"{key}_before"], report[key]
            change = _change(1 - after / before if before else 0.0)
            out.print(f"{what}: {spell_error(before)}, with the adapter {spell_error(after)} ({change})")
    out.print(
        f"Saved to {quoted(output)}. Load it on the base: PeftModel.from_pretrained(base, DIR, is_trainable=True)"
    )


def print_metrics(title: str, splits: list[str], metrics: dict[str, float]) -> None:
    """Metrics, one a line; shares and correlations are percentages."""
    table = plain_table(("", "left"), ("", "right"))
    for name, value in metrics.items():
        table.add_row(name, f"{value:,.0f}" if float(value).is_integer() and name.endswith("n") else f"{value:.4g}")
    out = console()
    out.print(f"{title}, {', '.join(splits)}:")
    out.print(table)


def _change(gained: float) -> str:
    return f"{abs(gained):.1%} {'less' if gained >= 0 else 'more'}"


def _totals(t: dict[str, Any]) -> Table:
    table = _Table(box=None, pad_edge=False, show_header=False)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold", justify="right")
    gained = 1 - t["error"] / t["qlora_error"] if t["qlora_error"] else 0.0
    rows = {
        "quantized": f"{t['matrices']} matrices, {t['quantized_weights']:,} of {t['parameters']:,} parameters",
        "stored bits per quantized weight": f"{t['bits_per_weight']:.3f}",
        "on disk, all files": f"{spell_size(t['disk_bytes'])} ({spell_size(t['adapter_bytes'])} of it the adapter)",
        "compression against 16 bits, all files": f"{t['compression']:.2f}x",
        **_largest(t),
        "trainable": f"{t['trainable_share']:.2%}",
        "relative error of Q": spell_error(t["qlora_error"]),
        "relative error of Q + s·BA": f"{spell_error(t['error'])} ({_change(gained)})",
    }
    if "output_error" in t:
        less = 1 - t["output_error"] / t["qlora_output_error"] if t["qlora_output_error"] else 0.0
        rows["relative output error of Q (held-out)"] = spell_error(t["qlora_output_error"])
        rows["relative output error of Q + s·BA (held-out)"] = f"{spell_error(t['output_error'])} ({_change(less)})"
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _largest(t: dict[str, Any]) -> dict[str, str]:
    part = t.get("largest")  # not in manifests of before
    if part is None:
        return {}
    share = f"{quoted(part['what'])}, {spell_size(part['bytes'])} ({part['bytes'] / t['disk_bytes']:.0%})"
    return {"largest part on disk": share + (f"; smaller with {quoted(part['option'])}" if part["option"] else "")}
