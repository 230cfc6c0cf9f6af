"""Names in messages: what cannot be seen of them, or moves others, is escaped everywhere."""

import pickle
from pathlib import Path

import pytest
import torch
from rich.console import Console

from loftq.errors import ConflictError, InputError, StorageError, listed, naming, quoted
from loftq.report.tables import plain_table

UNSEEN = {
    "bidi": "\u202e",
    "isolate": "\u2066",
    "zero-width": "\u200b",
    "joiner": "\u200d",
    "bom": "\ufeff",
    "soft-hyphen": "\u00ad",
    "filler": "\u3164",
    "selector": "\ufe0f",
    "grapheme-joiner": "\u034f",
    "braille-blank": "\u2800",
    "escape": "\x1b",
    "no-break-space": "\u00a0",
    "line-separator": "\u2028",
    "surrogate": "\udc80",
}


@pytest.mark.parametrize("kind", UNSEEN)
def test_what_cannot_be_seen_is_escaped(kind):
    name = f"safe{UNSEEN[kind]}txt.exe"
    for shown in (
        quoted(name),
        listed([name]),
        str(InputError(name)),
        str(StorageError(name)),
        str(ConflictError(name)),
    ):
        assert UNSEEN[kind] not in shown
        assert shown.startswith("safe\\")
        assert shown.endswith("txt.exe")
    table = plain_table(("name", "left"))
    table.add_row(name)
    console = Console(width=80, markup=False)
    with console.capture() as captured:
        console.print(table)
    assert UNSEEN[kind] not in captured.get()


@pytest.mark.parametrize("name", ["é", "e\u0301", "模型", "हिन्दी", "a b", "x" * 120])
def test_what_can_be_seen_stays(name):
    assert quoted(name) == str(InputError(name)) == name


def test_long_names_are_cut():
    assert quoted("x" * 121) == "x" * 119 + "…"
    assert len(quoted("\u202e" * 100)) == 120
    assert listed(range(1_000_000), 2) == "0, 1 and 999998 more"


def test_paths_keep_their_end():
    path = Path("/" + "long/" * 60) / "model.safetensors"
    assert quoted(path) == str(path)
    assert len(quoted(Path("x" * 500))) == 400


def test_errors_travel_between_processes():
    error = pickle.loads(pickle.dumps(StorageError("a\u202eb")))
    assert type(error) is StorageError
    assert str(error) == "a\\u202eb"


@pytest.mark.parametrize(
    ("error", "wanted", "message"),
    [
        (InputError("torn"), InputError, r"^layer\.weight: torn$"),
        (
            MemoryError(),
            StorageError,
            r"^layer\.weight: not enough memory for a matrix of shape \(2, 3\); use fewer --jobs$",
        ),
        (RuntimeError("can't allocate memory"), StorageError, "not enough memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), StorageError, "not enough memory"),
        (RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling"), StorageError, "not enough memory"),
        (RuntimeError("shapes differ"), RuntimeError, "^shapes differ$"),
        (RuntimeError("they refer to a single memory location"), RuntimeError, "^they refer"),
    ],
)
def test_work_on_a_matrix_names_it(error, wanted, message):
    with pytest.raises(wanted, match=message), naming("layer.weight", (2, 3), "--jobs"):
        raise error
