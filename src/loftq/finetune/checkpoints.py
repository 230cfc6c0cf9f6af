"""The trainer's checkpoints: which are whole, and what has to be added to continue a run.

The trainer writes ``trainer_state.json`` last. Into it go, under :data:`KEPT`, the other files of the checkpoint and
the losses that are not logged yet.
"""

import json
from pathlib import Path
from typing import Any

KEPT = "LoftQTrainer"  # among the states of callbacks, where the trainer keeps what it does not know
STATE = "trainer_state.json"


def files_in(checkpoint: Path) -> dict[str, int]:
    """Name -> size of every file of a checkpoint but its state."""
    found = (path for path in checkpoint.rglob("*") if path.is_file() and path.name != STATE)
    return {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in found}


def newest(directory: Path) -> Path | None:
    """The newest checkpoint that is whole: written to its end, and of which nothing was removed since."""
    numbered = [p for p in directory.glob("checkpoint-*") if p.name.rpartition("-")[2].isdecimal()]
    by_step = sorted(numbered, key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)
    return next((checkpoint for checkpoint in by_step if _is_whole(checkpoint)), None)


def is_at_end(checkpoint: Path) -> bool:
    """Whether training had come to its last step."""
    state = _state(checkpoint)
    return state["global_step"] >= state["max_steps"]


def _is_whole(checkpoint: Path) -> bool:
    try:
        listed = kept(_state(checkpoint)).get("files", {})
    except (OSError, ValueError):
        return False
    there = files_in(checkpoint)
    return all(there.get(name, -1) >= size for name, size in listed.items())  # other processes may still have written


def kept(state: dict[str, Any]) -> dict[str, Any]:
    """Our part of the state of a checkpoint; empty if another trainer wrote it."""
    return state.get("stateful_callbacks", {}).get(KEPT, {})


def _state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / STATE).read_bytes())
