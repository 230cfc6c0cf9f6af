"""What the three studies share: their options, their runs within a time, and where the rows go.

A study is a list of recipes with a section ``compare``; :func:`loftq.finetune.compare.run_grids` runs them so that
all methods have had the first seed before any has the second. Every finished run is a line of
docs/data/study/NAME-SIZE.jsonl, and the same command continues from there, on another day or another machine. Started
several times, with OMP_NUM_THREADS=1 or on a large GPU, the processes share the runs.
"""

import argparse
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from tqdm.auto import tqdm

from loftq.finetune.compare import finished, read_rows, run_grids, settings
from loftq.finetune.comparison import print_comparison
from loftq.finetune.grid import Arm, Run, grid
from loftq.finetune.recipe import Recipe, parse
from loftq.numerics.machine import SLOW_DTYPES

ROOT = Path(__file__).resolve().parent.parent
ROWS = ROOT / "docs" / "data" / "study"
STRAIGHT = {"save_strategy": "no", "logging_steps": 10, "dataloader_pin_memory": False}  # for every study
TRELLIS_RATES = [2.1875, 1.9375, 1.4375]  # and a scale of 16 bits for a row of some 300 weights


def options(doc: str, *, model: Path | None, tasks: Sequence[str]) -> argparse.Namespace:
    """The command line of a study.

    Args:
        model: the default of ``--model``; None if there is none.
        tasks: all that the study has.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("small", "full"), default="small", help="small: for two cores; full: a GPU")
    parser.add_argument("--data", type=Path, default=os.environ.get("LOFTQ_DATA"), help="[default: $LOFTQ_DATA]")
    parser.add_argument("--model", type=Path, default=model, required=model is None, help="directory of the model")
    parser.add_argument("--name", help="of the model, in the rows [default: of its directory]")
    parser.add_argument("--tasks", nargs="+", choices=tasks, help="only these")
    parser.add_argument("--only", nargs="+", default=[], help="only arms with these settings: method=loftq bits=2")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "study", help="for backbones and runs")
    parser.add_argument("--rows", type=Path, default=ROWS, help="directory of the rows")
    given = parser.parse_args()
    if given.data is None:
        parser.error("no data: give --data or set LOFTQ_DATA")
    if not given.model.is_dir():
        parser.error(f"--model {given.model}: no such directory")
    return given


def recipe(given: argparse.Namespace, task: str, data: dict[str, Any], values: dict[str, Any]) -> Recipe:
    """A recipe for one task of a study; ``data`` names files below the study's data."""
    placed = {k: _below(given.data, v) if isinstance(v, (str, list)) else v for k, v in data.items()}
    training = {**STRAIGHT, **values["training"]}
    return parse({"model": str(given.model), "task": task, "data": placed, **values, "training": training})


def trellis_arms(calibration: Path) -> list[dict[str, Any]]:
    """Trellis codes, data-free and calibrated, that store 2.25, 2 and 1.5 bits a weight with their scale of a row."""
    rates = {"quantization.code": "trellis", "quantization.bits": TRELLIS_RATES}
    return [
        {"method": "loftq", "quantization.preset": "fitted", **rates},
        {"method": "loftq", "quantization.preset": "descent", "quantization.calibrate": str(calibration), **rates},
    ]


def multiply_in_float32() -> torch.library.Library | None:
    """Make the matrix products of 16 bits in float32, and round them, where the CPU has no fast ones of its own.

    So do the processors that have them; with PyTorch's own loops a run takes ten times as long. Packed layers do it by
    themselves: this is for dense ones, so that all methods of a study are computed alike.
    """
    if torch.bfloat16 not in SLOW_DTYPES:
        return None
    library = torch.library.Library("aten", "IMPL")

    def replace(name: str, product: Callable[..., Any]) -> None:
        def made(*matrices: torch.Tensor, **scalars: float) -> torch.Tensor:
            dtype = matrices[-1].dtype
            wide = [m.float() if dtype in SLOW_DTYPES else m for m in matrices]
            out = wide[-1].new_empty(0)
            return product(*wide, **scalars, out=out).to(dtype)

        library.impl(name, made, "CPU")

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # that one is replaced
        for name in ("mm", "bmm", "addmm", "baddbmm"):  # each has a second operator, which writes into `out`
            replace(name, getattr(torch.ops.aten, name).out)
    return library


def run(study: str, given: argparse.Namespace, recipes: Sequence[Recipe]) -> None:
    """Run what is missing, show what there is."""
    products = multiply_in_float32()  # as long as the library lives
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    file = given.rows / f"{study}-{given.size}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    every = [grid(r) for r in recipes]
    of_tasks = [arms for r, arms in zip(recipes, every, strict=True) if not given.tasks or r.task in given.tasks]
    grids = [arms for all_arms in of_tasks if (arms := [arm for arm in all_arms if _has(arm, given.only)])]
    if not grids:
        raise SystemExit(f"--only {' '.join(given.only)}: the study has no such arm")
    _drop_others(file, every)

    def about(rows: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        """``runs_planned``: with those of rates that were the best until the grid grew, so of all rows in the file."""
        missing = sum(arm.missing(rows) for arms in every for arm in arms)
        names = {"model": given.name or given.model.name, "size": given.size, "study": study}
        return {**names, "runs_planned": len(rows) + missing}

    try:
        run_grids(grids, file, given.work / study, begin=_bar(given.minutes), about=about, keep=False)
    except TimeoutError:
        print(f"\n{given.minutes:g} minutes are over; run the same command again to continue", file=sys.stderr)
    for arms in grids:
        rows, missing = finished([arms], file)
        if rows:
            print_comparison(rows)
        print(f"\n{arms[0].recipe.task}: {len(rows)} runs done, {missing} missing\n")
    del products


def _has(arm: Arm, only: Sequence[str]) -> bool:
    """Whether a row of the arm would have these settings, each as ``bits=2``."""
    shown = settings(arm.recipe, Path(arm.recipe.model))
    return all(str(shown.get(name)) == value for name, _, value in (one.partition("=") for one in only))


def _below(root: Path, names: str | list[str]) -> str | list[str]:
    return [str(root / name) for name in names] if isinstance(names, list) else str(root / names)


def _drop_others(file: Path, grids: Sequence[Sequence[Arm]]) -> None:
    """Take out rows of runs that the study does not have, or no longer has."""
    arms = [arm for arms in grids for arm in arms]
    known = {Run(a, rate, s).key for a in arms for rate in (*a.learning_rates, *a.further_rates) for s in a.seeds}
    lines = file.read_text("utf-8").splitlines(keepends=True) if file.exists() else []
    kept = [line for line, row in zip(lines, read_rows(file), strict=True) if row["key"] in known]
    if len(kept) < len(lines):
        print(f"{file.name}: {len(lines) - len(kept)} rows of runs that this study does not have are dropped")
        file.write_text("".join(kept), "utf-8")


def _bar(minutes: float) -> Callable[[int], Callable[[dict[str, Any] | None, int], None]]:
    """A bar over runs that raises TimeoutError after a run when the time is over."""
    began = time.monotonic()

    def begin(total: int) -> Callable[[dict[str, Any] | None, int], None]:
        bar = tqdm(total=total, unit="run", dynamic_ncols=True)

        def advance(row: dict[str, Any] | None, runs: int) -> None:
            bar.total = runs
            if row is None:
                return bar.set_postfix_str("waiting for runs of other processes")
            value = "N.A." if row["failed"] else f"{row['metrics'][row['metric']]:.4g}"
            s = row["settings"]
            bar.set_postfix_str(f"{row['task']} {s['method']} {s['bits']}: {value}", refresh=False)
            bar.update()
            if time.monotonic() - began > 60 * minutes:
                bar.close()
                raise TimeoutError

        return advance

    return begin
