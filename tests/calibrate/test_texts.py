"""From files of texts to rows of tokens: exact lengths, evenly spread, one line for what cannot be used."""

import gzip
import itertools
import json
import os

import pytest
import small
import torch

from loftq.calibration import texts
from loftq.errors import InputError, StorageError, UsageError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """What `datasets` makes of files goes away with the test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def rows(path, samples=128, max_length=10, column=None):
    name, table = texts.table(str(path))
    return texts.rows_of_table(name, table, small.tokenizer(), samples, max_length, column)


def write(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def words(*numbers):
    return " ".join(f"w{n}" for n in numbers)


def test_text_is_packed_into_windows(tmp_path):
    """360 words in windows of 8 between [CLS] and [SEP]: nothing lost, in order, whatever the lines are."""
    path = small.text(tmp_path)
    found = rows(path)
    assert [len(row["input_ids"]) for row in found] == [10] * 45
    assert all(row["input_ids"][0] == 2 and row["input_ids"][-1] == 3 for row in found)
    tokens = [t for row in found for t in row["input_ids"][1:-1]]
    assert tokens == small.tokenizer()(path.read_text(), add_special_tokens=False)["input_ids"]
    zipped = tmp_path / "text.txt.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    assert rows(zipped) == found


def test_samples_are_spread_over_the_whole(tmp_path):
    path = small.text(tmp_path, lines=4000)
    found = rows(path, samples=8)
    assert len(found) == 8
    assert rows(path, samples=8) == found, "no chance in it"
    stream = small.tokenizer()(path.read_text(), add_special_tokens=False)["input_ids"]
    places = []
    for row in found:
        window = row["input_ids"][1:-1]
        places.append(next(i for i in range(len(stream)) if stream[i : i + 8] == window))
    assert places == sorted(places)
    assert places[-1] > len(stream) / 2


@pytest.mark.parametrize(("count", "wanted"), [(10, 3), (3, 10), (7, 7), (1000, 128)])
def test_samples_are_evenly_spaced(count, wanted):
    found = texts.spread(count, wanted)
    assert len(found) == min(count, wanted)
    assert found == sorted(set(found))
    assert found[0] == 0
    assert max(found) < count
    gaps = {b - a for a, b in itertools.pairwise(found)}
    assert max(gaps) - min(gaps) <= 1


def test_rows_of_a_table_are_texts_of_their_own(tmp_path):
    items = [{"text": words(*range(i, i + 3 + i % 4)), "label": 0} for i in range(8)]
    found = rows(write(tmp_path / "a.jsonl", items))
    assert [len(row["input_ids"]) for row in found] == [5 + i % 4 for i in range(8)]
    assert found == rows(write(tmp_path / "b.jsonl", [{"q": i["text"], "n": 1} for i in items]), column="q")


def test_a_long_row_is_cut_and_its_rest_kept(tmp_path):
    items = [{"text": words(*range(20)), "label": 0}] * 4
    found = rows(write(tmp_path / "a.jsonl", items))
    assert [len(row["input_ids"]) for row in found] == [10, 10, 6] * 4


def test_two_columns_are_tokenized_as_a_pair(tmp_path):
    items = [{"a": words(1, 2), "b": words(3, i)} for i in range(5)]
    found = rows(write(tmp_path / "a.jsonl", items), column="a,b")
    assert found[1]["input_ids"] == small.tokenizer()(words(1, 2), words(3, 1))["input_ids"]
    assert found[1]["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]


def test_csv_and_empty_texts(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "".join(f"w{i} w2,0\n,1\n" for i in range(5)))
    assert len(rows(path)) == 5


def test_batches_lose_their_padding():
    batches = [
        {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 0]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])},
        {"input_ids": torch.tensor([[0, 6, 7]]), "attention_mask": torch.tensor([[0, 1, 1]])},
    ]
    found = texts.rows_of_batches(batches, 10)
    assert found == [{"input_ids": ids} for ids in ([1, 2, 3], [4, 5], [6, 7])]
    assert texts.rows_of_batches(batches, 2) == found[:2]


def test_refusals(tmp_path):
    table = write(tmp_path / "a.jsonl", [{"q": "w1 w2", "n": i} for i in range(5)])
    one = write(tmp_path / "one.jsonl", [{"text": "w1 w2", "n": 1}])
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    blank = tmp_path / "blank.txt"
    blank.write_text("\n\n\n")
    os.mkfifo(tmp_path / "pipe.txt")
    cases = [
        (lambda: rows(tmp_path / "none.txt"), InputError, r"none\.txt: no such file"),
        (lambda: rows(tmp_path / "pipe.txt"), InputError, r"pipe\.txt: no regular file; save what it gives"),
        (lambda: rows(tmp_path), InputError, "a directory; name one of its files"),
        (lambda: rows(tmp_path / "none" / "a" / "b"), InputError, "no such file"),
        (lambda: rows("org/name"), StorageError, "not found on the hub"),
        (lambda: rows(__file__), UsageError, "not a file of data"),
        (lambda: rows(empty), InputError, "the file is empty"),
        (lambda: rows(blank), InputError, "too little text: 0 samples, wanted 4"),
        (lambda: rows(one), InputError, "too little text: 1 samples"),
        (lambda: rows(table), InputError, "no column text; it has q, n; name the column"),
        (lambda: rows(table, column="z"), InputError, "no column z; it has q, n$"),
        (lambda: rows(table, column="n"), InputError, "column n: 0 is not a text"),
        (lambda: rows(table, column="q,n,z"), UsageError, "column"),
        (lambda: rows(small.text(tmp_path), max_length=2), UsageError, "no room beside 2 special tokens"),
    ]
    for call, error, words_ in cases:
        with pytest.raises(error, match=words_):
            call()
