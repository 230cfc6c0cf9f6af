"""What every benchmark shares: sides called in turn, statistics, goals, a table, a JSON file, processes of their own.

A script makes one :class:`Bench`, compares and records, and calls ``finish``, which writes docs/data/bench/<name>.json;
``report.py`` makes docs/performance.md of these files. The docstring of a script is part of its data: the first line
is the question, the paragraphs that begin with "Peer:" and "Goal:" say against what, and how good.
"""

import argparse
import ctypes
import datetime
import gc
import importlib.metadata
import inspect
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "numpy", "numba", "triton", "transformers", "peft", "bitsandbytes", "hqq", "torchao")

T = TypeVar("T")

for noisy in ("bitsandbytes", "torchao", "torch.utils._pytree"):  # advice about optional parts of theirs
    logging.getLogger(noisy).setLevel(logging.ERROR)


@dataclass(frozen=True)
class Versus:
    """The speed of ``side`` as a multiple of the speed of ``peer``, and the multiple that is the goal."""

    side: str
    peer: str
    at_least: float | None = None


class Bench:
    """One script's options, measurements and results.

    Attributes:
        quick: sizes that only show that the script works; nothing is written unless ``--output`` is given.
        threads: what every library was told to use.
        options: further numbers, by their names.
        clock: what calls are timed by; a script on one thread may take the CPU's.
    """

    clock: Callable[[], float] = staticmethod(time.perf_counter)

    def __init__(self, script: str, doc: str, **numbers: int) -> None:
        self.name = Path(script).stem
        paragraphs = [" ".join(p.split()) for p in doc.split("\n\n")]
        told = dict(p.split(": ", 1) for p in paragraphs if p.startswith(("Peer: ", "Goal: ")))
        parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--quick", action="store_true", help="small sizes: does it run? nothing is written")
        parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
        parser.add_argument("--output", type=Path, help="directory of the JSON file [default: docs/data/bench]")
        parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further part after so many")
        for name, number in numbers.items():
            parser.add_argument(f"--{name}", type=int, default=number, help=f"[default: {number}]")
        options = parser.parse_args()
        if os.environ.get("OMP_NUM_THREADS") != str(options.threads):  # each library reads it once, when it is loaded
            os.environ["OMP_NUM_THREADS"] = str(options.threads)
            os.execv(sys.executable, sys.orig_argv)
        self.quick: bool = options.quick
        self.threads: int = options.threads
        self.options: dict[str, int] = {name: getattr(options, name) for name in numbers}
        self.output: Path | None = options.output or (None if self.quick else ROOT / "docs" / "data" / "bench")
        self.console = Console(width=None if sys.stdout.isatty() else 120)
        self.end = time.monotonic() + 60 * options.minutes
        self.in_parts = False
        self.result: dict[str, Any] = {
            "name": self.name,
            "question": paragraphs[0],
            "peer": told.get("Peer", ""),
            "goal": told.get("Goal", ""),
            "quick": self.quick,
            "environment": environment(),
            "notes": [],
            "cases": [],
        }

    def compare(
        self,
        case: str,
        sides: Mapping[str, Callable[[], Any]],
        versus: Sequence[Versus] = (),
        *,
        repeats: int = 5,
        slow: Collection[str] = (),
        number: int = 1,
    ) -> dict[str, list[float]]:
        """Seconds of every call of every side, which take turns, in alternating order, after one call each to warm up.

        In a part, a side that fails becomes a note, and the others are measured.

        Args:
            slow: sides that are called once only, without warming up, after the others.
            number: calls that are timed together, for calls too short for the clock.
        """
        seconds: dict[str, list[float]] = {side: [] for side in sides}

        def call(side: str, timed: bool) -> None:
            def measure() -> bool:
                if timed:
                    seconds[side].append(_seconds(sides[side], number, self.clock))
                else:
                    sides[side]()
                return True

            if side in seconds and not self.attempt(measure, f"{case}: {side}"):
                del seconds[side]

        def tell(side: str) -> None:
            if side in seconds:
                row = {"side": side, "unit": "s", **_statistics(seconds[side])}
                self._case(case)["times"].append(row)
                self._tell(case, side, row)

        quick = [side for side in sides if side not in slow]
        for side in quick:
            call(side, timed=False)
        for i in range(repeats):
            for side in quick[:: -1 if i % 2 else 1]:
                gc.collect()
                call(side, timed=True)
        for side in quick:
            tell(side)
        for side in (side for side in sides if side in slow):
            gc.collect()
            call(side, timed=True)
            tell(side)
        for v in versus:
            if {v.side, v.peer} <= seconds.keys():
                pairs = [_of(seconds[v.peer], i) / _of(seconds[v.side], i) for i in range(repeats)]
                once = v.peer in slow and v.side in slow
                what = f"speed of {v.side} / {v.peer}"
                self.record(case, what, pairs[: 1 if once else None], "x", at_least=v.at_least)
        return seconds

    def record(
        self,
        case: str,
        what: str,
        values: Sequence[float],
        unit: str,
        *,
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> None:
        """A finding; a goal is judged by the median."""
        found = _statistics(values)
        middle, reached = found["median"], None
        if (at_least is not None or at_most is not None) and not self.quick:
            reached = (at_least is None or middle >= at_least) and (at_most is None or middle <= at_most)
        row = {"what": what, "unit": unit, **found, "at_least": at_least, "at_most": at_most, "reached": reached}
        self._case(case)["findings"].append(row)
        self._tell(case, what, row)

    def part(self, measure: Callable[[], Any], what: str) -> None:
        """One part of a script that measures the most telling things first, within ``--minutes``.

        Every figure is printed and written as soon as it is known. A part for which no time is left, or that fails,
        becomes a note; the parts after it still run.
        """
        self.in_parts = True
        if time.monotonic() > self.end:
            self.note(f"Not measured, the time was over: {what}.")
            return
        self.attempt(measure, what)
        self._write()

    def attempt(self, call: Callable[[], T], what: str) -> T | None:
        """What a call returns. In a part, None if it fails, which becomes a note."""
        try:
            return call()
        except Exception as e:  # whatever a device, a driver or a peer raises
            if not self.in_parts:
                raise
            lines = str(e).strip().splitlines() or [""]
            self.note(f"Failed: {what}: {type(e).__name__}: {lines[0][:200]}")
            return None

    def built(self, makers: Mapping[str, Callable[[], T]]) -> dict[str, T]:
        """What each side's maker returns, without those that fail, as :meth:`attempt` has it."""
        made = {side: self.attempt(make, side) for side, make in makers.items()}
        return {side: one for side, one in made.items() if one is not None}

    def go_on(self, **numbers: int) -> None:
        """Begin the script anew with other numbers and what is known so far: a process cannot use a device again that
        failed in it."""
        self._write()
        left = max(0.0, (self.end - time.monotonic()) / 60)
        given = [word for name, number in numbers.items() for word in (f"--{name}", str(number))]
        os.execv(sys.executable, [*sys.orig_argv, "--minutes", f"{left:.3f}", *given])

    def recall(self) -> None:
        """Take over what the script knew when it went on."""
        path = self.output and self.output / f"{self.name}.json"
        if path and path.is_file():
            self.result |= {key: json.loads(path.read_text("utf-8"))[key] for key in ("notes", "cases")}

    def note(self, text: str) -> None:
        self.result["notes"].append(text)
        if self.in_parts:
            self.console.print(text)

    def _tell(self, case: str, what: str, row: Mapping[str, Any]) -> None:
        if self.in_parts:
            self.console.print(f"{case}: {what}: {shown(row['median'], row['unit'])}", highlight=False)
            self._write()

    def finish(self) -> None:
        """Print what was found, and write it."""
        for case in self.result["cases"]:
            table = Table("", "median", "min", "max", "n", "goal", title=case["case"], title_justify="left")
            for row in case["times"]:
                table.add_row(row["side"], *_numbers(row))
            for row in case["findings"]:
                table.add_row(row["what"], *_numbers(row), verdict(row), style="bold")
            self.console.print(table)
        for text in self.result["notes"]:
            self.console.print(text)
        if self.quick:
            self.console.print("a quick run: these are not measurements")
        if self.output:
            self.console.print(f"written: {self._write()}")

    def _write(self) -> Path | None:
        """The JSON file of all that is known so far."""
        if self.output is None:
            return None
        self.output.mkdir(parents=True, exist_ok=True)
        path = self.output / f"{self.name}.json"
        path.write_text(json.dumps(self.result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return path

    def _case(self, name: str) -> dict[str, Any]:
        for case in self.result["cases"]:
            if case["case"] == name:
                return case
        self.result["cases"].append({"case": name, "times": [], "findings": []})
        return self.result["cases"][-1]


def _of(values: list[float], i: int) -> float:
    return values[min(i, len(values) - 1)]


def _seconds(call: Callable[[], Any], number: int, clock: Callable[[], float]) -> float:
    """Seconds of one call, on average over ``number``; work queued on a GPU included."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = clock()
    for _ in range(number):
        call()
    wait()
    return (clock() - start) / number


def _statistics(values: Sequence[float]) -> dict[str, Any]:
    kept = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    return {"n": len(values), **{k: float(f"{v:.5g}") for k, v in kept.items()}}


def _numbers(row: Mapping[str, Any]) -> list[str]:
    return [*(shown(row[k], row["unit"]) for k in ("median", "min", "max")), str(row["n"])]


def shown(value: float, unit: str) -> str:
    """A number as people read it: seconds and bytes in units of their size."""
    if unit == "s" and abs(value) < 1:
        return f"{value * 1e3:.3g} ms" if abs(value) >= 1e-3 else f"{value * 1e6:.3g} µs"
    if unit == "B":
        return f"{value / 1e9:.3g} GB" if value >= 1e9 else f"{value / 1e6:.3g} MB"
    digits = f"{value:.5g}" if 0.99 < value < 1.01 else f"{value:.3g}" if value < 100 else f"{value:.0f}"
    return f"{digits}x" if unit == "x" else f"{digits} {unit}".strip()


def goal(row: Mapping[str, Any]) -> str:
    """``≥ 5x``; empty without a goal."""
    for key, sign in (("at_least", "≥"), ("at_most", "≤")):
        if row[key] is not None:
            return f"{sign} {shown(row[key], row['unit'])}"
    return ""


def verdict(row: Mapping[str, Any]) -> str:
    """The goal and whether it is reached; a quick run does not judge."""
    return goal(row) + {True: ": reached", False: ": missed", None: ""}[row["reached"]]


def environment() -> dict[str, Any]:
    """Machine, versions, and the commit; ``dirty`` if the code is not the commit's."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        if installed(package):
            versions[package] = importlib.metadata.version(package)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": _git("rev-parse", "--short", "HEAD") or "unknown",
        "dirty": bool(_git("status", "--porcelain", "--", "src", "benchmarks", "pyproject.toml")),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions,
    }


def installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    features = [f for f in ("avx2", "avx512f", "amx_bf16") if any(f in line.split() for line in lines)]
    return " ".join([names[0] if names else platform.processor() or platform.machine(), *features])


def save_shards(directory: Path, shards: Iterable[dict[str, torch.Tensor]], count: int) -> int:
    """Write a checkpoint of ``count`` shards, made one after another, and its index; bytes of the shards."""
    index, size = {}, 0
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{count:05d}.safetensors"
        save_file(shard, directory / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, name))
        size += (directory / name).stat().st_size
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return size


def in_own_process(function: Callable[..., Any], *arguments: Any, **environ: str) -> Any:
    """``function(*arguments)`` of a benchmark script, called in a new process; arguments and result pass as JSON."""
    script = Path(inspect.getfile(function))
    code = (
        f"import json, sys; sys.path.insert(0, {str(script.parent)!r}); import {script.stem} as script; "
        f"print(json.dumps(script.{function.__name__}(*json.loads(sys.argv[1]))))"
    )
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **environ})
    return json.loads(run.stdout.splitlines()[-1])


def reset_peak() -> None:
    """Let the peak of this process's memory begin anew at what it holds now (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def resident(what: str = "VmRSS") -> int:
    """Bytes of this process that are in memory now; ``VmHWM``: at the peak (Linux)."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith(what))
