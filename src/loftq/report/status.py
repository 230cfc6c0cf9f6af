"""The output of ``loftq status``."""

from pathlib import Path
from typing import Any

from loftq.errors import listed, quoted
from loftq.report.tables import console, plain_table
from loftq.spelled import spell_time


def line(found: dict[str, Any]) -> str:
    """How far it is: ``5 of 14 units, 31 of 84 matrices, 2 processes at work, about 12.0 minutes left``."""
    if found["state"] == "done":
        return "done"
    at_work = sum(w["state"] == "working" for w in found["workers"])
    parts = ["no matrix is begun"] if not found["units"] else []
    for what in ("units", "matrices"):
        if found[what]:
            parts.append(f"{found[what]['done']} of {found[what]['all']} {what}")
    parts.append(f"{at_work} {'process' if at_work == 1 else 'processes'} at work")
    if found["seconds_left"] is not None:
        parts.append(f"about {spell_time(found['seconds_left'])} left" + ("" if at_work else " for one process"))
    return ", ".join(parts)


def print_status(directory: Path, found: dict[str, Any]) -> None:
    """The line, and a row for every process that took part."""
    out = console()
    out.print(f"{quoted(directory)}: {line(found)}")
    if not found["workers"]:
        return
    headings = (("host", "left"), ("pid", "right"), ("since", "left"), ("state", "left"), ("units", "right"))
    table = plain_table(*headings, ("at work on", "left"))
    for w in found["workers"]:
        table.add_row(
            quoted(w["host"] or "?"),
            str(w["pid"] or "?"),
            w["since"] or "",
            w["state"],
            str(w["done"]),
            listed(w["at"], 2),
        )
    out.print(table)
