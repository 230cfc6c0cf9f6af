"""``loftq compare``: every arm of a grid fine-tuned alike; one row per finished run, from which it continues."""

import datetime
import functools
import itertools
import json
import math
import os
import platform
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from loftq.architecture.loading import load_tokenizer
from loftq.checkpoint.manifest import MANIFEST, read_manifest
from loftq.errors import ConflictError, InputError, NumericalError, UsageError, option, quoted
from loftq.finetune.comparison import page
from loftq.finetune.comparison_plots import plot_bytes, plot_losses
from loftq.finetune.convergence import constant_answer, failure
from loftq.finetune.grid import Arm, Run, grid, planned, schedule
from loftq.finetune.inputs import held, read_data, splits_of, task_of
from loftq.finetune.recipe import Quantization, Recipe
from loftq.finetune.run import RunDirectory, RunResult
from loftq.finetune.tasks import Task
from loftq.finetune.train import check_recipe, finetune
from loftq.formats import fsio, strict_json
from loftq.formats import text as texts
from loftq.formats.regular import local_path
from loftq.formats.source import open_checkpoint
from loftq.formats.tensorfile import DTYPES
from loftq.sources.checkpoint import resolve
from loftq.spec import code_for, default_preset
from loftq.version import __version__

# Of a quantization, what settings() tells in words of its own; of the rest, all that is not the default.
TOLD = {"bits", "budget", "code", "preset", "steps", "order", "scales", "calibrate", "calibration_samples"}

MOST_BYTES = 1 << 30  # of all rows together, each with its curve

Row = dict[str, Any]
# Given the number of runs; what it returns, the row of every run, or None while it waits for other processes, and the
# number of runs by now, for a grid may grow.
Begin = Callable[[int], Callable[[Row | None, int], None]]


def compare(recipe: Recipe, begin: Begin | None = None) -> list[Row]:
    """Run the grid of a recipe into its ``output``; the rows of all its runs.

    ``rows.jsonl`` grows by a line with every finished run, and the same call continues from it; several processes that
    make it share the runs. ``runs/`` holds the runs, ``backbones/`` what they share, ``comparison.md`` and two pictures
    the result.

    Raises: UsageError for a recipe without a grid or an output, and under a launcher of processes; whatever a run
        raises, but for a loss that is not finite: that run did not converge.
    """
    if recipe.output is None:
        raise UsageError(
            f"no output: say where the comparison goes, with `output:` in the recipe or {option('output')}"
        )
    output = local_path("output", recipe.output).absolute()
    rows = run_grids([grid(recipe)], output / "rows.jsonl", output, begin=begin)
    pictures = {"training loss": "losses.png", "metric by bytes": "bytes.png"}
    plot_losses(rows, output / pictures["training loss"])
    plot_bytes(rows, output / pictures["metric by bytes"])
    text = page(f"{rows[0]['task']}: {rows[0]['model']}", rows, pictures)
    fsio.write_atomic(output / "comparison.md", [text.encode()])
    return rows


def run_grids(
    grids: Sequence[Sequence[Arm]],
    file: Path,
    directory: Path,
    *,
    begin: Begin | None = None,
    about: Callable[[Mapping[str, Row]], Mapping[str, Any]] = lambda rows: {},
    keep: bool = True,
) -> list[Row]:
    """Run what is missing of several grids, in turn; their rows.

    What can be refused of any arm without reading weights is refused before the first run.

    Processes that are given the same ``file`` and ``directory`` share the runs: each takes the next that no other has,
    and at the end waits for the others. The run of one that was killed is free again.

    Args:
        file: where the rows are, and new ones go; rows of other runs in it are left alone.
        directory: for runs and backbones.
        about: given all rows by key, a new one among them, what more that one is to say.
        keep: False removes each run's files once its row is written.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "a launcher splits one run; to share the runs of a comparison, start the command several times"
        )
    fsio.make_dirs(directory)
    there = _by_key(file)
    for first in (Run(arm, arm.learning_rates[0], arm.seeds[0]) for arms in grids for arm in arms):
        if first.key not in there:
            check_recipe(first.recipe)
    advance = begin(planned(grids, there)) if begin else lambda row, runs: None
    told: set[str] = set()
    while True:
        rows, idle = _by_key(file), True
        for run in schedule(grids, rows):
            row = rows.get(run.key) or _taken(run, grids, file, directory, about, keep)
            if row and run.key not in told:
                rows[run.key], idle = row, False
                told.add(run.key)
                advance(row, planned(grids, rows))
        if len(told) == planned(grids, rows):
            return finished(grids, file)[0]
        if idle:  # others are at what is left
            advance(None, planned(grids, rows))
            time.sleep(1)


def finished(grids: Sequence[Sequence[Arm]], file: Path) -> tuple[list[Row], int]:
    """The rows there are of the grids' runs, as scheduled, and how many are still to do."""
    rows = _by_key(file)
    mine = [rows[run.key] for run in schedule(grids, rows) if run.key in rows]
    return mine, sum(arm.missing(rows) for arms in grids for arm in arms)


def read_rows(file: Path) -> list[Row]:
    """The rows of a file, none if it is not there. InputError for a line that is no row."""
    if not file.exists():
        return []
    rows = []
    for number, line in enumerate(texts.read(file, "JSON lines", MOST_BYTES).splitlines(), 1):
        row = strict_json.loads(line, f"{file}, line {number}")
        if not isinstance(row, dict) or not isinstance(row.get("key"), str):
            raise InputError(f"{file}, line {number}: no row of a comparison; remove the line to run it again")
        rows.append(row)
    return rows


def _by_key(file: Path) -> dict[str, Row]:
    return {row["key"]: row for row in read_rows(file)}


def _taken(
    run: Run,
    grids: Sequence[Sequence[Arm]],
    file: Path,
    directory: Path,
    about: Callable[[Mapping[str, Row]], Mapping[str, Any]],
    keep: bool,
) -> Row | None:
    """Do a run and add its row, before those that the schedule has later; None if another process is at it."""
    with ExitStack() as locks:
        try:
            locks.enter_context(fsio.DirectoryLock(directory / f"{run.key}.lock"))
        except ConflictError:
            return None
        done = _by_key(file).get(run.key)  # by another process, meanwhile
        if done:
            return done
        place = directory / "runs" / f"{run.arm.recipe.method}-{run.key}"
        _check_unchanged(run.arm)
        row = _row(run, place, directory / "backbones")
        try:
            _check_unchanged(run.arm)
        except ConflictError:
            fsio.remove_tree(place)  # of which files it is, is not known
            raise
        locks.enter_context(fsio.DirectoryLock(directory / "rows.lock", wait=True))
        others = _by_key(file)
        row |= about({**others, run.key: row})
        order = (other.key for other in schedule(grids, {**others, run.key: row}))
        later = set(itertools.dropwhile(run.key.__ne__, order))
        at = next((i for i, key in enumerate(others) if key in later), len(others))
        ordered = [*others.values()]
        ordered.insert(at, row)
        fsio.write_atomic(file, [json.dumps(r, allow_nan=False).encode() + b"\n" for r in ordered])
        fsio.remove_tree(place if not keep or not row["metrics"] else place / "checkpoints")
        return row


def _check_unchanged(arm: Arm) -> None:
    """ConflictError if files of an arm are others by now than those that the comparison began with."""
    if held(arm.recipe) != arm.held:
        raise ConflictError(
            f"{quoted(arm.recipe.model, 400)} or the data changed while the comparison ran; put the files back, or run "
            "the same command again to compare on the new ones"
        )


def _row(run: Run, place: Path, backbones: Path) -> Row:
    """Fine-tune, and say what came out."""
    recipe = run.recipe.changed(output=str(place))
    task = task_of(recipe)
    began = time.monotonic()
    result: RunResult | None = None
    try:
        resume = not RunDirectory(place).is_of_another(recipe)  # which an earlier version, with other defaults, left
        result = finetune(recipe, backbone_cache=backbones, resume=resume)
        reason = failure(result.metrics, *_constant_answer(recipe))
    except NumericalError as e:
        reason = str(e)
    metrics = dict(result.metrics) if result else {}
    row = {
        "key": run.key,
        "arm": run.arm.key,
        "task": task.name,
        "task_version": task.version,
        "model": Path(recipe.model).name,
        "settings": settings(recipe, resolve(recipe.model)),
        "learning_rate": run.learning_rate,
        "learning_rates": list(run.arm.learning_rates),
        "seed": run.seed,
        "metric": task.main_metric,
        "greater_is_better": task.greater_is_better,
        "metrics": {name: round(value, 4) for name, value in metrics.items() if name != "n"},
        "before": _before(result, task),
        "n": metrics.get("n"),
        "failed": reason,
        "constant_answer": round(_constant_answer(recipe)[1], 4),
        "losses": [[h["step"], round(h["loss"], 4)] for h in result.history if "loss" in h] if result else [],
        "bytes": result.bytes if result else {},
        "train_steps": result.steps if result else None,
        "train_seconds": round(result.seconds, 1) if result else None,
        "seconds": round(time.monotonic() - began, 1),
        **origin(),
        "date": datetime.date.today().isoformat(),
    }
    return strict_json.finite(row)


def settings(recipe: Recipe, source: Path) -> dict[str, Any]:
    """The settings that distinguish the arms of a comparison, for its table. Dense weights count as stored.

    Args:
        source: the directory of the recipe's model.
    """
    lora, quantization = recipe.lora, recipe.quantization or Quantization()
    if (source / MANIFEST).is_file():
        return _settings_of(source, recipe)
    if recipe.method == "full":
        return {"method": "full", "bits": "32"}  # trained and saved in float32
    adapter = {"rank": lora.rank, "alpha": lora.alpha, "dropout": lora.dropout, "rslora": lora.rslora}
    adapter["embeddings"] = quantization.embeddings
    adapter |= lora.model_dump(exclude_defaults=True, include={"rank_policy"})
    if recipe.method == "lora":
        chosen = {"modules": quantization.bits} if "=" in quantization.bits else {}
        return {"method": "lora", "bits": str(_dense_bits(source)), **adapter, **chosen}
    spec = quantization.solver(recipe.method)
    asked = quantization.model_dump(exclude_defaults=True, exclude=TOLD)
    if quantization.calibrate and recipe.method == "loftq":
        asked |= {"calibrate": Path(quantization.calibrate).name, "samples": quantization.calibration_samples}
    bits = f"≤{quantization.budget}" if quantization.budget else quantization.bits
    stored = {"bits": bits, "code": _codes(quantization.code, bits, spec.scales), "scales": spec.scales, **asked}
    solver: dict[str, Any] = {"steps": spec.steps, "order": spec.order} if recipe.method == "loftq" else {}
    if recipe.method == "loftq":
        solver["preset"] = quantization.preset or default_preset(quantization.calibrate is not None)
    return {"method": recipe.method, **stored, **adapter, **solver}


def _settings_of(packed: Path, recipe: Recipe) -> dict[str, Any]:
    """The settings of an arm that trains a directory of ``loftq quantize``: what that was made with."""
    made = read_manifest(packed)["identity"]["options"]
    solver = made["solve"]
    bits = f"≤{made['budget']}" if made.get("budget") else made["bits"]
    codes = _codes(made["code"], bits, solver["scales"])
    adapter = {"rank": made["rank"], "alpha": made["alpha"], "dropout": recipe.lora.dropout, "rslora": made["rslora"]}
    own = {"steps": solver["steps"], "order": solver["order"]} if recipe.method == "loftq" else {}
    stored = {"bits": bits, "code": codes, "scales": solver["scales"]}
    return {"method": recipe.method, **stored, **adapter, "embeddings": made["embeddings"], **own}


def _dense_bits(source: Path) -> int:
    """Bits of a weight of a dense checkpoint, as most of its weights are stored."""
    counts: Counter[int] = Counter()
    for tensor in open_checkpoint(source).tensors.values():
        counts[8 * DTYPES[tensor.dtype].itemsize] += math.prod(tensor.shape)
    return counts.most_common(1)[0][0]


def _codes(code: str, bits: str, scales: str) -> str:
    """The code; all that ``auto`` may stand for, where the widths leave it open."""
    widths: tuple[float, ...] = (2,) if bits == "2" else (4,) if bits in ("3", "4", "8") else (2, 4)
    try:
        widths = (float(bits),) if float(bits) < 2 else widths
    except ValueError:  # patterns, or a budget's ≤2.5
        widths = (*widths, 1.5) if "=" in bits and "." in bits.rpartition("=")[2] else widths
    return "/".join(dict.fromkeys(code_for(code, width, scales) for width in widths))


def _before(result: RunResult | None, task: Task) -> dict[str, float] | None:
    """The task's figures before the first step, if ``training.eval_on_start`` had them measured on a reported split."""
    first = next((h for h in result.history if h["step"] == 0 and "eval_loss" in h), None) if result else None
    if result is None or first is None or task.dev_split(result.splits) is None:
        return None
    if "perplexity" in result.metrics:
        return {"perplexity": math.exp(min(first["eval_loss"], 700.0))}
    return {name: first[f"eval_{name}"] for name in result.metrics if f"eval_{name}" in first}


def _constant_answer(recipe: Recipe) -> tuple[str, float]:
    """See :func:`loftq.finetune.convergence.constant_answer`; the rows are read once per task and data."""
    task = task_of(recipe)
    key = json.dumps([recipe.model, recipe.to_dict()["data"], repr(task)])
    if key not in _constants:
        split = task.eval_splits(splits_of(recipe, task))[0]
        rows = read_data(recipe, task, [split])[split]
        _constants[key] = constant_answer(task, rows, load_tokenizer(resolve(recipe.model)))
    return _constants[key]


_constants: dict[str, tuple[str, float]] = {}


@functools.cache
def origin() -> dict[str, Any]:
    """Where a row was made: version and commit of this package, device."""
    place = Path(__file__).parent
    git = ["git", "-C", str(place)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", __file__], check=True, capture_output=True)
        described = subprocess.run([*git, "describe", "--always"], check=True, capture_output=True, text=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "."], capture_output=True).returncode != 0
        commit = described.stdout.strip() + ("-dirty" if changed else "")  # of this package; rows lie in the repository
    except (OSError, subprocess.CalledProcessError):  # installed from a package
        commit = "release"
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"CPU {platform.machine()}, {torch.get_num_threads()} threads"
    return {"version": __version__, "commit": commit, "device": device, "torch": torch.__version__}
