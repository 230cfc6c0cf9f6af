"""What ``loftq calibrate`` tells of the statistics that it made."""

from pathlib import Path
from typing import Any

from loftq.errors import quoted
from loftq.formats.statistics import ENOUGH, fewest, samples_wanted
from loftq.report.tables import console, plain_table
from loftq.spelled import spell_size


def summary(manifest: dict[str, Any]) -> dict[str, Any]:
    """The figures of a ``statistics.json`` that people ask for."""
    groups, samples = manifest["groups"], manifest["samples"]
    least = fewest(groups, samples)
    return {
        "kind": manifest["kind"],
        "samples": samples,
        "tokens_fit": manifest["tokens"]["fit"],
        "tokens_held": manifest["tokens"]["held"],
        "matrices": sum(len(group["modules"]) for group in groups),
        "groups": len(groups),
        "bytes": sum(file["size"] for file in manifest["files"].values()),
        "fewest_tokens_per_feature": least["tokens"] / least["width"],
        "fewest_module": least["modules"][0],
        "samples_wanted": samples_wanted(groups, samples),
    }


def print_statistics(output: Path, made: dict[str, Any], began: bool) -> None:
    """The figures of :func:`summary`, and where they lie."""
    out, place = console(), quoted(output)
    if not began:
        out.print(f"{place}: already done by an earlier run of this command.")
    table = plain_table(("", "left"), ("", "right"))
    table.add_row("kind", made["kind"])
    table.add_row("samples", f"{made['samples']:,}")
    table.add_row("tokens, fitted and held out", f"{made['tokens_fit']:,} + {made['tokens_held']:,}")
    table.add_row("matrices, groups with one input", f"{made['matrices']:,} in {made['groups']:,}")
    table.add_row("on disk", spell_size(made["bytes"]))
    table.add_row("fewest tokens per input feature", f"{made['fewest_tokens_per_feature']:.1f}")
    out.print(table)
    if made["kind"] == "full" and made["fewest_tokens_per_feature"] < ENOUGH:
        few = f"Fewer than {ENOUGH}, for {quoted(made['fewest_module'])}: moments are shrunk towards their diagonal"
        out.print(f"{few}; --samples {made['samples_wanted']} would be enough.")
    out.print(f"Saved to {place}. Use it with: loftq quantize MODEL --calibrate {place} …")
