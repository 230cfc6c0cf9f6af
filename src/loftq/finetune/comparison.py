"""Runs side by side: a table shaped like the paper's, as text and Markdown, and two pictures.

A row is what ``loftq compare`` keeps of a finished run: plain values, one JSON object a line. Rows of one ``arm``
differ in seed and learning rate; its ``settings`` are what a table shows of it.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loftq.report.tables import console, plain_table

Row = Mapping[str, Any]

NAMES = {"full": "Full FT", "lora": "LoRA", "qlora": "QLoRA", "loftq": "LoftQ"}
ALWAYS = ("method", "bits")
IN_NAME = ("preset",)  # told by the method's name
CALIBRATION = ("calibrate", "samples")  # of some initializations of LoftQ
HEADINGS = {"steps": "T", "embeddings": "embeddings too", "calibrate": "texts"}
COUNTS = ("n", "tokens")  # of one split or another; no results
WORDS = ("method", "code", "scales", "order")
NOT_CONVERGED = "N.A."


@dataclass(frozen=True)
class ArmResult:
    """The runs of one arm: a line of the table.

    Attributes:
        rate: the learning rate chosen, of ``rates``.
        tried: those of ``rates`` that the first seed has had; of an unfinished comparison not all.
        rows: the runs with that rate, one a seed.
    """

    task: str
    settings: dict[str, Any]
    rate: float
    rates: tuple[float, ...]
    tried: tuple[float, ...]
    rows: tuple[Row, ...]

    @property
    def name(self) -> str:
        """``LoftQ 2-bit nf, rank 16``: for legends and notes."""
        s = self.settings
        width = f" {s['bits']}-bit {s['code']}" if "code" in s else ""
        return f"{self.method}{width}" + (f", rank {s['rank']}" if "rank" in s else "")

    @property
    def method(self) -> str:
        """``LoftQ``, and what is not the paper's: ``LoftQ (fitted, trellis)``, ``LoftQ (descent, calibrated)``."""
        s = self.settings
        words = [*({s.get("preset", "loftq")} - {"loftq"}), *({s.get("code")} & {"trellis"})]
        words += ["calibrated"] if s.get("calibrate") else []
        return NAMES[s["method"]] + (f" ({', '.join(words)})" if words else "")

    @property
    def bytes(self) -> dict[str, int]:
        """On disk, of what is needed to use the result: ``backbone`` and ``adapter``; empty if every run was lost."""
        return next((row["bytes"] for row in self.rows if row["bytes"]), {})

    def values(self, metric: str) -> list[float]:
        """Of every seed, sorted; a run that did not converge counts as the worst possible."""
        worst = -math.inf if self.rows[0]["greater_is_better"] else math.inf
        return sorted(worst if row["failed"] else row["metrics"][metric] for row in self.rows)


class Comparison(list[Row]):
    """A row for every run of :func:`loftq.compare`; a notebook shows the table of ``comparison.md``."""

    def __repr__(self) -> str:
        return f"<Comparison: {len(self)} runs of {len(arms(self))} arms>"

    def _repr_markdown_(self) -> str:
        return markdown(*table(self))


def chosen_rate(rows: Iterable[Row]) -> float:
    """The learning rate of the best of an arm's runs with one seed: the rule by which rates are chosen.

    The best has converged and has the best main metric; the first of equals, and the first of all if none has.
    """
    rows = list(rows)
    converged = [row for row in rows if not row["failed"]]
    sign = 1 if rows[0]["greater_is_better"] else -1
    best = max(converged, key=lambda row: sign * row["metrics"][row["metric"]], default=rows[0])
    return best["learning_rate"]


def arms(rows: Sequence[Row]) -> list[ArmResult]:
    """The arms of all tasks, in the order in which their first runs came."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["arm"]), []).append(row)
    result = []
    for group in groups.values():
        first = group[0]
        choosing = [row for row in group if row["seed"] == first["seed"]]
        rate = chosen_rate(choosing)
        tried = sorted(row["learning_rate"] for row in choosing)
        rates = sorted({*tried, *first["learning_rates"]})
        kept = tuple(row for row in group if row["learning_rate"] == rate)
        result.append(ArmResult(first["task"], dict(first["settings"]), rate, tuple(rates), tuple(tried), kept))
    return result


def columns(found: Sequence[ArmResult]) -> list[str]:
    """The settings worth a column: method and bits, and what differs between arms of one method that have it.

    All initializations of LoftQ are one method here: what their names do not tell is shown.
    """
    keys = dict.fromkeys(key for arm in found for key in arm.settings if key not in IN_NAME)
    values: dict[tuple[str, str], set[Any]] = {}
    for arm in found:
        for key, value in arm.settings.items():
            values.setdefault((key, arm.settings["method"]), set()).add(value)
    differ = {key for (key, _), seen in values.items() if len(seen) > 1}
    return [k for k in keys if k in ALWAYS or k in differ]


def metrics(found: Sequence[ArmResult]) -> list[str]:
    """The metrics worth a column, the main one first."""
    row = next((row for arm in found for row in arm.rows if row["metrics"]), None)
    names = [m for m in row["metrics"] if m.split("_")[-1] not in COUNTS and not m.startswith("lead3_")] if row else []
    return sorted(names, key=lambda name: name != found[0].rows[0]["metric"])


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and lines for the runs of one task: settings, median and spread of every metric, cost."""
    found = arms(rows)
    settings, measured = columns(found), metrics(found)
    before = any(row.get("before") for row in rows)
    main = rows[0]["metric"]
    headings = [HEADINGS.get(k, k) for k in settings]
    headings += [f"{main} before"] * before + measured + ["learning rate", "seeds", "backbone MB", "adapter MB"]
    body = []
    if lead3 := _lead3(rows):
        cells = [number(lead3.get(heading)) for heading in headings]
        body.append(["Lead-3", *cells[1:]])
    for arm in found:
        line = [_setting(arm, key) for key in settings]
        line += [number((arm.rows[0].get("before") or {}).get(main))] * before
        line += [spread(arm.values(metric)) for metric in measured]
        line += [_rates(arm), str(len(arm.rows)), *(_megabytes(arm, part) for part in ("backbone", "adapter"))]
        body.append(line)
    return headings, body


def overview(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and lines over several tasks: one column a task, with its main metric."""
    found = arms(rows)
    tasks = {arm.task: arm.rows[0]["metric"] for arm in found}
    settings = columns(found)
    lines: dict[tuple, dict[str, ArmResult]] = {}
    for i, arm in enumerate(found):
        earlier = sum(other.task == arm.task and other.settings == arm.settings for other in found[:i])
        lines.setdefault((earlier, *arm.settings.items()), {})[arm.task] = arm
    body = []
    lead3 = {task: _lead3([row for row in rows if row["task"] == task]) for task in tasks}
    if any(lead3.values()):
        cells = [number(lead3[task].get(metric)) for task, metric in tasks.items()]
        body.append(["Lead-3", *[""] * (len(settings) - 1), *cells, ""])
    for mine in lines.values():
        any_arm = next(iter(mine.values()))
        cells = [spread(mine[task].values(metric)) if task in mine else "" for task, metric in tasks.items()]
        sizes = [_megabytes(any_arm, "backbone", "adapter")]
        body.append([_setting(any_arm, key) for key in settings] + cells + sizes)
    headings = [HEADINGS.get(k, k) for k in settings]
    return [*headings, *(f"{task} {metric}" for task, metric in tasks.items()), "MB"], body


def notes(rows: Sequence[Row]) -> list[str]:
    """What has to be known beside the table: what was equal for all, and every run that did not converge, and why."""
    first = next((row for row in rows if row["train_steps"]), rows[0])  # of a lost run little is known
    found = arms(rows)
    lines = [
        f"{first['model']}, {first['task']}, n = {first['n']}; {first['train_steps']} steps for every arm"
        + "".join(f"; {told}" for told in _equal(found))
        + ". Median over seeds (smallest to largest). The learning rate is the one of those named that did best with "
        f"the first seed, by {first['metric']} on the rows that are reported." + _edges(found),
    ]
    for arm in found:
        for row in arm.rows:
            if row["failed"]:
                lines.append(f"{NOT_CONVERGED} ({arm.task}, {arm.name}, seed {row['seed']}): {row['failed']}.")
    return lines


def _edges(found: Sequence[ArmResult]) -> str:
    """Which arms did best at an end of the rates that were tried, so that one beyond might do better."""
    chosen = [arm for arm in found if len(arm.tried) > 1 and not arm.rows[0]["failed"]]
    sides = {
        "largest": [arm for arm in chosen if arm.rate == arm.tried[-1]],
        "smallest": [arm for arm in chosen if arm.rate == arm.tried[0]],
    }
    told = [f"the {side} tried for {_names(some, found)}" for side, some in sides.items() if some]
    return f" It is {', and '.join(told)}: a rate beyond might do better." if told else ""


def _names(some: Sequence[ArmResult], found: Sequence[ArmResult]) -> str:
    """Arms by name, without the rank if they are told apart by the rest; all at once if that is all."""
    if len(some) == len(found):
        return "every arm"
    short = {arm.name: arm.name.partition(", rank")[0] for arm in found}
    return "; ".join(short[arm.name] if len({*short.values()}) == len(found) else arm.name for arm in some)


def _equal(found: Sequence[ArmResult]) -> list[str]:
    """The settings without a column, equal wherever they are: ``rank 16, T 5``, and ``calibrated: samples 128``."""
    shown = {*columns(found), *IN_NAME}
    values = {k: v for arm in found for k, v in arm.settings.items() if v and k not in shown}
    calibrated = {k: v for k, v in values.items() if k in CALIBRATION}
    others = {k: v for k, v in values.items() if k not in CALIBRATION}
    phrases = [", ".join(f"{HEADINGS.get(k, k)} {v}" for k, v in part.items()) for part in (others, calibrated)]
    return [f"{word}{phrase}" for word, phrase in zip(("", "calibrated: "), phrases, strict=True) if phrase]


def provenance(rows: Sequence[Row]) -> str:
    """Where the numbers come from: one phrase for each machine, with the commits that ran there."""
    made: dict[tuple[str, ...], dict[str, None]] = {}
    for r in rows:
        made.setdefault((r["version"], r["device"], r["torch"]), {})[r["commit"]] = None
    seconds = sum(r["seconds"] for r in rows)
    phrases = [f"loftq {v} at {', '.join(commits)}; {d}, torch {t}" for (v, d, t), commits in made.items()]
    return f"{'; '.join(phrases)}. {len(rows)} runs, {seconds / 60:.0f} minutes together."


def markdown(headings: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table; words to the left, numbers to the right."""
    rule = "|".join("---" if heading in WORDS else "---:" for heading in headings)
    return "\n".join([f"| {' | '.join(headings)} |", f"|{rule}|", *(f"| {' | '.join(line)} |" for line in body)])


def number(value: float | None) -> str:
    """Three digits at least, no more than two decimals: ``87.3``, ``5.24``, ``1203``."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return NOT_CONVERGED
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 1000 else f"{value:.0f}"


def spread(values: Sequence[float]) -> str:
    """``87.3 (86.9 to 87.8)``: the median and the extremes of sorted values."""
    low, high = values[0], values[-1]
    middle = number(statistics.median(values))
    return middle if len(values) == 1 or low == high else f"{middle} ({number(low)} to {number(high)})"


def page(title: str, rows: Sequence[Row], pictures: Mapping[str, str]) -> str:
    """The table of one comparison as a Markdown page with its notes and ``pictures`` (what they show -> file name)."""
    parts = [f"# {title}", markdown(*table(rows)), *notes(rows)]
    parts += [f"![{shown}]({file})" for shown, file in pictures.items()]
    return "\n\n".join([*parts, f"<sub>{provenance(rows)}</sub>"]) + "\n"


def print_comparison(rows: Sequence[Row]) -> None:
    """The table and its notes, for the terminal."""
    headings, body = table(rows)
    printed = plain_table(*((h, "left" if h in WORDS else "right") for h in headings))
    for line in body:
        printed.add_row(*line)
    out = console()
    out.print(printed)
    for line in [*notes(rows), provenance(rows)]:
        out.print(f"\n{line}")


def _setting(arm: ArmResult, key: str) -> str:
    value = arm.settings.get(key, "")
    if key == "method":
        return arm.method
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _megabytes(arm: ArmResult, *parts: str) -> str:
    if not arm.bytes:
        return ""
    size = sum(arm.bytes[part] for part in parts) / 1e6
    return f"{size:.1f}" if size >= 0.05 else f"{size:.1g}"


def _rates(arm: ArmResult) -> str:
    """The rate taken, and the others: ``5e-04 of 1e-04, 5e-04``."""
    chosen = f"{arm.rate:.2g}"
    return chosen if len(arm.rates) == 1 else f"{chosen} of {', '.join(f'{rate:.2g}' for rate in arm.rates)}"


def _lead3(rows: Sequence[Row]) -> dict[str, float]:
    """ROUGE of the first three sentences, which is the same for every run."""
    measured = next((row["metrics"] for row in rows if row["metrics"]), {})
    return {name.removeprefix("lead3_"): value for name, value in measured.items() if name.startswith("lead3_")}
