"""``loftq status``: how far a run of ``loftq quantize`` is, from what lies in its workspace. Nothing is changed."""

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from loftq.checkpoint import claims, team
from loftq.checkpoint.claims import Watch, Worker
from loftq.checkpoint.manifest import MANIFEST
from loftq.checkpoint.output_dir import SHARED, is_ours
from loftq.checkpoint.shards import Workspace
from loftq.errors import InputError, LoftqError, command
from loftq.formats import hashed_json, strict_json
from loftq.formats.regular import local_path, shown

PATIENCE = 5.0  # seconds that a beat may take until it is seen
WORKING, SILENT, GONE = "working", "silent", "gone"


def status(directory: Path) -> dict[str, Any]:
    """What is done, by whom, what is in work, and how long the rest takes.

    Where processes share the work, it looks for some seconds whether each still gives a sign of life.

    Returns: ``state`` (``done``, ``unfinished``); ``units`` and ``matrices``, each ``done`` of ``all`` (None while a
        budget is measured); ``workers``, each with ``host``, ``pid``, ``since``, ``state`` (``working``; ``silent``: no
        sign of life; ``gone``), units ``done`` and files ``at`` work; ``seconds_left``, None while nothing tells.

    Raises: InputError where there is neither an output of ours nor work for one.
    """
    work = Workspace(Path(os.path.realpath(local_path("the directory", directory))))
    if not _is_done(work):
        try:
            return _unfinished(work)
        except InputError:
            if not _is_done(work):  # else its last process has just ended
                raise
    return {"state": "done", "units": None, "matrices": None, "workers": [], "seconds_left": 0.0}


def _is_done(work: Workspace) -> bool:
    """Whether the output is there, and what is left of the work for it waits to be removed."""
    manifest, identity = work.target / MANIFEST, {}
    with contextlib.suppress(LoftqError):
        identity = hashed_json.load(manifest).get("identity", {})
    return manifest.is_file() and is_ours(work, identity)


def _unfinished(work: Workspace) -> dict[str, Any]:
    if not work.identity.exists():
        begin = command("quantize", "MODEL", output=str(work.target))
        raise InputError(f"{shown(work.target)}: no output of loftq, and no unfinished run; start it: {begin}")
    files, units, matrices, left = [], None, None, None
    records = {path.stem: _record(path) for path in sorted(work.units.glob("?????.json"))}
    if work.tasks.exists():
        files = strict_json.load_object(work.tasks)["units"]
        inside = [_results(work.units / f"{i:05d}") for i in range(len(files))]
        whole = [f"{i:05d}" in records for i in range(len(files))]
        units = {"done": sum(whole), "all": len(files)}
        counts = [n if done else min(n, some) for (_, n, _), done, some in zip(files, whole, inside, strict=True)]
        matrices = {"done": sum(counts), "all": sum(n for _, n, _ in files)}
        rows = list(zip(files, counts, whole, strict=True))
        cost = sum(c * (n - some) / n for (_, n, c), some, done in rows if not done and n)
        made = sum(c for (_, _, c), _, done in rows if done)
        spent = sum(float(r.get("seconds", 0)) for r in records.values())
        left = cost / made * spent if made else None
    shared = strict_json.load_object(work.identity).get(SHARED) is True
    workers = _sharing(work, records, files) if shared else _alone(work, records)
    at_work = sum(w["state"] == WORKING for w in workers)
    seconds = None if left is None else left / max(1, at_work)
    return {"state": "unfinished", "units": units, "matrices": matrices, "workers": workers, "seconds_left": seconds}


def _record(path: Path) -> dict[str, Any]:
    with contextlib.suppress(LoftqError):
        return hashed_json.load(path)
    return {}


def _results(directory: Path) -> int:
    """Matrices that wait in a directory for their shard."""
    return sum(n.endswith(".safetensors") for n in team.names_in(directory))


def _alone(work: Workspace, records: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The process that holds the lock, if it has not ended; else those that made what is there."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        signed = json.loads(work.lock.read_text())
        here = claims.namespace() if signed["host"] == socket.gethostname() else ""
        holder = Worker("", str(signed["host"]), int(signed["pid"]), here, "")
        made = sum((r.get("host"), r.get("pid")) == (holder.host, holder.pid) for r in records.values())
        state = GONE if holder.has_ended else WORKING
        return [{"host": holder.host, "pid": holder.pid, "since": None, "state": state, "done": made, "at": []}]
    return []


def _sharing(work: Workspace, records: dict[str, dict[str, Any]], files: list[Any]) -> list[dict[str, Any]]:
    watch = Watch(work.root / "workers")
    there = sorted(team.names_in(watch.directory))
    until = time.monotonic() + claims.BEAT + PATIENCE
    beating: set[str] = set()
    while len(beating) < len(there) and time.monotonic() < until:
        beating |= {name for name in there if watch.has_beaten(name) or not watch.is_alive(name)}
        time.sleep(min(0.1, claims.BEAT / 5))
    names = team.names_in(work.units)
    held: dict[str, list[str]] = {}
    for index in range(len(files)):
        if f"{index:05d}" not in records:
            held.setdefault(claims.holder(work.units, names, f"{index:05d}").get("id", ""), []).append(files[index][0])
    makers = [record.get("maker", "") for record in records.values()]
    found = []
    for name in sorted({*there, *makers, *held} - {""}):
        worker = watch.worker(name)
        known = next((r for r in records.values() if r.get("maker") == name), {})
        state = GONE if not watch.is_alive(name) else WORKING if name in beating else SILENT
        found.append(
            {
                "host": worker.host if worker else known.get("host"),
                "pid": worker.pid if worker else known.get("pid"),
                "since": worker and worker.time,
                "state": state,
                "done": makers.count(name),
                "at": held.get(name, []),
            }
        )
    return found
