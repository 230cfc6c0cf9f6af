"""Data files that would fill the memory or end the process: one line that names file and row."""

import gzip
import json
import tracemalloc

import datasets
import pytest

from loftq.calibration.texts import rows_of_texts, table
from loftq.errors import InputError
from loftq.finetune.tasks import get_task, load_data
from loftq.finetune.tasks.batches import tokenized
from loftq.sources import databounds
from loftq.sources.datafiles import read

ROW = b'{"text": "a", "label": 1}\n'
NESTED = b"[" * 100_000 + b"]" * 100_000


def made(path, raw):
    with gzip.open(path, "wb", 1) if path.suffix == ".gz" else path.open("wb") as file:
        for part in [raw] if isinstance(raw, bytes) else raw:
            file.write(part)
    return path


def refused(path, why):
    with pytest.raises(InputError, match=why) as error:
        read(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "txt", "jsonl.gz", "txt.gz"])
def test_a_line_without_end(suffix, tmp_path):
    """Of 220 MB in the files of users, of 20 MB here. What is held of it does not grow with it."""
    path = made(tmp_path / f"a.{suffix}", [ROW, b'{"text": "', *[b"word " * (1 << 18)] * 16, b'"}\n'])
    datasets.load_dataset  # noqa: B018  # imported before memory is measured
    tracemalloc.start()
    refused(path, "line 2 has more than 16777216 bytes; split it into several")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * databounds.MAX_ROW


def test_a_small_file_that_expands_to_a_large_one(tmp_path):
    path = made(tmp_path / "a.jsonl.gz", [b'{"text": "' + b"a" * 1_000_000 + b'"}\n'] * 100)
    refused(path, f"{path.stat().st_size} bytes expand to more than 67108864; unpack it yourself if that is meant")


@pytest.mark.parametrize(
    ("name", "raw", "why"),
    [
        ("a.jsonl", ROW + b'{"text": ' + NESTED + b"}\n", "line 2 has more than 100 levels of nesting"),
        ("a.jsonl", b'{"a":' * 100_000, "line 1 has more than 100 levels"),
        ("a.json", b'[{"text": ' + NESTED + b"}]", "line 1 has more than 100 levels"),
        ("a.json", b"[\n" * 200, "line 101 has more than 100 levels"),
        ("a.json.gz", b"[" + NESTED + b"]", "line 1 has more than 100 levels"),
        ("a.jsonl", ROW + b"{" + b",".join(b'"k%d":1' % i for i in range(30_000)) + b"}\n", "line 2 has 30000 columns"),
        ("a.jsonl", ROW + b'{"text": "\\ud800", "label": 0}\n', "line 2 has half a surrogate pair"),
        ("a.jsonl", ROW + b'{"text": "a", "text": "b"}\n', "line 2 is not JSON: 'text' stands there twice"),
        ("a.jsonl", ROW + b'{"text": "caf\xe9", "label": 0}\n', "not UTF-8"),
        ("a.jsonl", ROW + b'{"text": "\x00", "label": 0}\n', "line 2 is not JSON: Invalid control character"),
    ],
)  # fmt: skip
def test_lines_that_no_reader_takes(name, raw, why, tmp_path):
    refused(made(tmp_path / name, raw), why)


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("a.jsonl", b"\xef\xbb\xbf" + ROW),
        ("a.jsonl", json.dumps({"text": "[{" * 500, "label": 1}).encode() + b"\n"),
        ("a.jsonl", json.dumps({"text": '"]}\\"' * 500, "label": 1}).encode()),
        ("a.json", b"[\n" + ROW.rstrip() + b"\n]\n"),
        ("a.csv", b"\xef\xbb\xbftext,label\r\n" + b"a" * 200_000 + b",1\r\n"),
    ],
)
def test_what_only_looks_like_it(name, raw, tmp_path):
    """Brackets within texts, a mark before UTF-8, lists over several lines, fields beyond the limit of ``csv``."""
    rows = load_data(get_task("sst2"), {"train": str(made(tmp_path / name, raw))})["train"]
    assert rows["label"][:] == [1]


def test_a_row_group_of_parquet_that_says_it_is_large(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_list([{"text": "a" * 1000, "label": 1}]).to_parquet(path)
    assert len(read(path)) == 1
    monkeypatch.setattr(databounds, "MAX_GROUP", 100)
    refused(path, r"row group 0 holds \d+ bytes, at most 100 are read at a time; write smaller row groups")


def test_texts_in_lists_and_of_parquet_are_bounded_too(tmp_path, monkeypatch):
    monkeypatch.setattr(databounds, "MAX_ROW", 1000)
    rows = [{"text": "a", "label": 1}, {"text": "a" * 1001, "label": 1}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    made(tmp_path / "a.json", json.dumps(rows).encode())
    for name in ("a.parquet", "a.json"):
        with pytest.raises(InputError, match=r"column text, row 2: a text of 1001 bytes, at most 1000 are read; split"):
            load_data(get_task("sst2"), {"train": str(tmp_path / name)})
    said = [{"role": "user", "content": "a" * 999}, {"role": "assistant", "content": "bb"}]
    made(tmp_path / "b.json", json.dumps([{"m": said}]).encode())
    with pytest.raises(InputError, match="column m, row 1: a text of 1001 bytes"):
        load_data(get_task({"kind": "instruction", "columns": {"messages": "m"}}), {"train": str(tmp_path / "b.json")})


def test_long_texts_are_tokenized_few_at_a_time(monkeypatch):
    monkeypatch.setattr(databounds, "MAX_ROW", 1000)
    seen = []

    def function(rows):
        seen.append(len(rows["text"]))
        return {"n": [len(text) for text in rows["text"]]}

    tokenized(datasets.Dataset.from_dict({"text": ["a" * 300] * 7}), function, batched=True)
    assert seen == [3, 3, 1]
    assert databounds.batch_size(datasets.Dataset.from_dict({"text": ["a"] * 3})) == 1000


def test_texts_for_calibration(tmp_path):
    """The same reader; and of a text that is very long no more is tokenized than could be used."""
    with pytest.raises(InputError, match=r"a\.jsonl: line 1 has more than 100 levels"):
        table(str(made(tmp_path / "a.jsonl", NESTED)))
    longest = []

    def tokenizer(*texts, **_):
        longest.append(max(map(len, texts)))
        return {"input_ids": [1] * len(texts[0])}

    rows = rows_of_texts([("a" * 100_000,)], tokenizer, 4, 10)
    assert max(longest) == 320
    assert len(rows) == 4
    rows_of_texts([("a" * 100_000, "b" * 100_000)], tokenizer, 4, 10)
    assert max(longest) == 320
