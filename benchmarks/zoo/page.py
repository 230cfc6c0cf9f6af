"""docs/families.md, made of the results of a sweep."""

import collections
from collections.abc import Iterable
from typing import Any

from zoo.stages import DEFECT, NOT_BUILT, REFUSED, UPSTREAM, WORKS

ORDER = (DEFECT, WORKS, REFUSED, UPSTREAM, NOT_BUILT)
MEANING = {
    WORKS: "every stage gives what the dense model gives",
    REFUSED: "one clear line, before anything is made",
    DEFECT: "something is made that is wrong or cannot run",
    UPSTREAM: "transformers itself does not read back what it saved of the dense model, as it is or merged by PEFT",
    NOT_BUILT: "nothing is said about the family: this script found no sizes or inputs with which the tiny model runs, "
    "its outputs jump, or it was over the limits of time and memory",
}
WAY = """\
Made by `benchmarks/families.py`; do not edit. A tiny random model of every model type of transformers is taken the
whole way. It is built, planned and quantized (4 bits, rank 4), verified and loaded, and must compute what the dense
model with the dequantized weights computes. The initialization is put on it, by plain PEFT and by `loftq.load_start`.
It must sit on every packed layer and compute Q + s·BA; every adapter whose layer has a gradient in the dense model must
have one. Adapter and packed model are saved and loaded again, the merged model too. At last `loftq.get_peft_model` must
make the same in memory. How good a large model of the family is after quantization is not said here."""
UNUSED = """\
`coverage` is the share of the layers' weights that is quantized. `unused` counts adapters that the inputs of this
script do not reach, those of a vision tower where only text was given, for instance; the dense weights there have no
gradient either."""
TITLES = {
    WORKS: "Works",
    REFUSED: "Refused",
    DEFECT: "Defects",
    UPSTREAM: "Not in transformers",
    NOT_BUILT: "Not built",
}


def page(results: dict[str, dict[str, Any]], total: int) -> str:
    """The whole page. ``total``: how many types there are to be tried."""
    counts = collections.Counter(r["outcome"] for r in results.values())
    commits, versions = (_counted(r[key] for r in results.values()) for key in ("commit", "versions"))
    partial = [r for r in results.values() if r["outcome"] == WORKS and "asked" in r]
    tried = len(results) - counts[NOT_BUILT] - counts[UPSTREAM]
    parts = [
        "# Model families",
        WAY,
        f"**{counts[WORKS]} of {tried} model types work**, {len(partial)} of them only with `--min-coverage 0`, "
        "because most of their weights stay dense.",
        _table(["outcome", "n", "it means"], [[o, counts[o], MEANING[o]] for o in ORDER if counts[o]]),
        f"<sub>commits (rows): {commits}; {versions}; float32 on a CPU; n = {len(results)} of the {total} model types "
        "that have a class of their own, one tiny model each</sub>",
        *_sections(results),
    ]
    return "\n\n".join(parts) + "\n"


def _counted(values: Iterable[str]) -> str:
    return ", ".join(f"{value} ({n})" for value, n in collections.Counter(values).most_common())


def _sections(results: dict[str, dict[str, Any]]) -> Iterable[str]:
    for outcome in ORDER:
        chosen = [r for _, r in sorted(results.items()) if r["outcome"] == outcome]
        if not chosen:
            continue
        yield f"## {TITLES[outcome]} ({len(chosen)})"
        if outcome == WORKS:
            yield UNUSED
            yield _table(
                ["family", "class", "matrices", "coverage", "stays dense", "inputs", "unused", "generates"],
                map(_row, chosen),
            )
        else:
            yield _table(
                ["family", "at", "why"], [[r["family"], r.get("stage", ""), _cell(r["why"], 220)] for r in chosen]
            )


def _row(result: dict[str, Any]) -> list[Any]:
    ask = " (`--min-coverage 0`)" if "asked" in result else ""
    return [
        result["family"],
        result["class"],
        result["matrices"],
        f"{result['coverage']:.0%}{ask}",
        _cell("; ".join(dict.fromkeys(map(brief, result.get("missed", [])))), 90),
        ", ".join(n for n in result["inputs"] if not n.endswith("mask")),
        result.get("unused") or "",
        {"yes": "yes"}.get(result.get("generate", ""), ""),
    ]


def brief(reason: str) -> str:
    """A reason of the plan, without names of tensors."""
    if "expert" in reason:
        return "experts"
    return "converted on loading" if reason.startswith("converted by transformers") else reason


def _cell(text: str, most: int) -> str:
    text = " ".join(str(text).replace("|", "/").split())
    return text if len(text) <= most else text[: most - 1] + "…"


def _table(head: list[str], rows: Iterable[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
