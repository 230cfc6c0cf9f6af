"""What a verb reports, as Python calls return it: a dict that shows itself in one line."""

from collections.abc import Mapping
from typing import Any

from loftq.spelled import spell_error, spell_size


class Report(dict[str, Any]):
    """Plain values by name, as a JSON file has them; its ``repr`` is one line with the figures that matter.

    Attributes:
        line: that line.
    """

    def __init__(self, values: Mapping[str, Any], line: str) -> None:
        super().__init__(values)
        self.line = line

    def __repr__(self) -> str:
        return f"<Report: {self.line}; keys: {', '.join(self)}>"


def of_checkpoint(values: Mapping[str, Any], found: str = "") -> Report:
    """Of a LoftQ checkpoint, from what has its ``totals``.

    Args:
        found: to be said after the figures.
    """
    totals = values["totals"]
    error = f"error {spell_error(totals['error'])} (quantized alone {spell_error(totals['qlora_error'])})"
    size = f"{totals['matrices']} matrices at {totals['bits_per_weight']:.2f} bits, {spell_size(totals['disk_bytes'])}"
    return Report(values, ", ".join(filter(None, (size, error, found))))


def of_start(values: Mapping[str, Any]) -> Report:
    """Of the initialization of a quantized base: its ``layers`` and the errors of all together."""
    errors = f"error {spell_error(values['error'])} (before {spell_error(values['error_before'])})"
    return Report(values, f"{len(values['layers'])} layers, {errors}")
