"""Files of every format, directories of them, and every bad input, which gives one clear line."""

import csv
import errno
import gzip
import json
import os

import datasets
import pytest

from loftq.errors import InputError, StorageError, UsageError
from loftq.finetune.tasks import get_task, load_data

SST2 = [{"sentence": "a fine cat", "label": 1}, {"sentence": "None", "label": 0}, {"sentence": "7, or so", "label": 1}]
LOADED = [{"text": row["sentence"], "label": row["label"]} for row in SST2]


def write(path, rows):
    """Rows as a file of the format that its name says."""
    suffix = path.name.removesuffix(".gz").rpartition(".")[2]
    opener = gzip.open if path.name.endswith(".gz") else open
    if suffix == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
        return path
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        if suffix == "jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        elif suffix == "json":
            json.dump(rows, file)
        elif suffix == "csv":
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(row["text"] + "\n" for row in rows)
    return path


def one_line(error):
    """The message of an error; it must be of one line."""
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet", "jsonl.gz", "json.gz", "csv.gz"])
def test_every_file_format_gives_the_same_rows(suffix, tmp_path):
    path = write(tmp_path / f"rows.{suffix}", SST2)
    assert load_data(get_task("sst2"), {"train": str(path)})["train"].to_list() == LOADED


@pytest.mark.parametrize("suffix", ["txt", "txt.gz"])
def test_lines_of_a_text_file_are_rows(suffix, tmp_path):
    rows = [{"text": " = Cats = "}, {"text": ""}, {"text": "The cat sat."}]
    path = write(tmp_path / f"rows.{suffix}", rows)
    assert load_data(get_task("wikitext2"), {"train": str(path)})["train"].to_list() == rows


def test_csv_as_other_programs_write_it(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbfsentence,label\r\n"two\nlines, ""quoted""",1\r\n\r\nnull,0\r\n')
    rows = load_data(get_task("sst2"), {"train": str(path)})["train"]
    assert rows["text"][:] == ['two\nlines, "quoted"', "null"]


def test_csv_with_an_index_that_has_no_name(tmp_path):
    (tmp_path / "a.csv").write_text(",sentence,label\n0,so,1\n1,no,0\n")
    assert load_data(get_task("sst2"), {"train": str(tmp_path / "a.csv")})["train"]["text"][:] == ["so", "no"]


def test_conversations_begin_with_someone_else(tmp_path):
    task = get_task({"kind": "instruction", "columns": {"messages": "m"}})
    path = write(tmp_path / "a.jsonl", [{"m": [{"role": "assistant", "content": "hi"}]}])
    with pytest.raises(InputError, match="of which the last is the assistant's and the first is not"):
        load_data(task, {"train": str(path)})


@pytest.mark.parametrize("name", ["rows [1].jsonl", "rows*.jsonl", "röws.jsonl"])
def test_odd_names_of_files(name, tmp_path):
    path = write(tmp_path / name, SST2)
    assert len(load_data(get_task("sst2"), {"train": str(path)})["train"]) == 3


@pytest.mark.parametrize(
    ("task", "files"),
    [
        ("sst2", {"train": "train.csv", "validation": "dev.jsonl.gz", "test": "test.parquet"}),
        ("sst2", {"train": "TRAIN.JSONL", "validation": "valid.jsonl"}),
        ("sst2", {"validation": "val.jsonl"}),
        ("sst2", {"train": "train-00000-of-00001.parquet", "validation": "validation_0.jsonl"}),
        ("mnli", {"validation_matched": "dev_matched.jsonl", "validation_mismatched": "validation_mismatched.csv"}),
    ],
)
def test_directories(task, files, tmp_path):
    for name in files.values():
        rows = SST2 if task == "sst2" else [{"premise": "a", "hypothesis": "b", "label": "neutral"}]
        write(tmp_path / name.lower(), rows).rename(tmp_path / name)
    (tmp_path / "README.md").write_text("about")
    write(tmp_path / "training_notes.jsonl", SST2)
    loaded = load_data(get_task(task), tmp_path)
    assert list(loaded) == list(files)
    assert load_data(get_task(task), {"directory": str(tmp_path)}).keys() == loaded.keys()


def test_a_split_of_several_files(tmp_path):
    for i, row in enumerate(SST2):
        write(tmp_path / f"train-0000{i}-of-00003.jsonl", [row])
    task = get_task("sst2")
    assert load_data(task, tmp_path)["train"].to_list() == LOADED
    assert load_data(task, {"test": str(tmp_path / "*-0000[12]-*")})["test"].to_list() == LOADED[1:]
    both = [str(tmp_path / "train-00002-of-00003.jsonl"), str(tmp_path / "*.jsonl")]
    assert load_data(task, {"test": both})["test"].to_list() == [LOADED[2], *LOADED[:2]]


def test_rounds_of_anli(tmp_path):
    for number in (1, 2, 3):
        for split in ("dev", "test"):
            rows = [{"premise": "a", "hypothesis": str(number), "label": "neutral"}]
            write(tmp_path / f"{split}_r{number}.jsonl", rows)
    loaded = load_data(get_task("anli"), tmp_path)
    assert loaded["validation"]["text_pair"][:] == loaded["test"]["text_pair"][:] == ["1", "2", "3"]


def test_first_rows_and_wanted_splits(tmp_path):
    write(tmp_path / "train.jsonl", SST2)
    write(tmp_path / "dev.jsonl", SST2)
    task, data = get_task("sst2"), {"directory": str(tmp_path), "max_train_samples": 2, "max_eval_samples": 9}
    assert {split: len(rows) for split, rows in load_data(task, data).items()} == {"train": 2, "validation": 3}
    assert list(load_data(task, data, ["validation"])) == ["validation"]
    with pytest.raises(InputError, match="task sst2: no split test in the data given; it has train, validation"):
        load_data(task, data, ["test"])


def test_labels_of_the_hub_by_their_names():
    """A data set whose classes are numbered otherwise than the task's is read by the names of its classes."""
    from loftq.finetune.tasks.columns import canonical

    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["positive", "negative"])}
    )
    rows = datasets.Dataset.from_dict({"sentence": ["a", "b"], "label": [0, 1]}, features=features)
    assert canonical(rows, get_task("sst2"), "place")["label"][:] == [1, 0]


# name of the file, its text, what is said about it
BROKEN = [
    ("a.jsonl", "", "no rows; the file is empty"),
    ("a.jsonl", "\n\n", "no rows; the file is empty"),
    ("a.json", "[]", "no rows"),
    ("a.csv", "sentence,label\n", "no rows; the file is empty"),
    ("a.jsonl", '{"sentence": "a", "label": 1}\n{"sentence": "b", "lab', "line 2 is not JSON: Unterminated string"),
    ("a.jsonl", '{"sentence": "a", "label": 1}\n[1, 2]\n', r"line 2 is not a JSON object but \[1, 2\]"),
    ("a.json", '[{"sentence": "a", "label": 1},', "not JSON: "),
    ("a.csv", "sentence,label\na,1\nb,0,x\n", "line 3 has 3 fields where the header has 2"),
    ("a.csv", "sentence,label\na,1,x\nb,0,x\n", "line 2 has 3 fields where the header has 2"),
    ("a.csv", 'sentence,label\na,1\n"b,0\n', "line 3 is not CSV: unexpected end of data"),
    ("a.jsonl", '{"text": "a"}\n', "no column label; it has text; task sst2 needs it"),
    ("a.jsonl", '{"words": "a"}\n', "no column sentence or text, label; it has words"),
    ("a.jsonl", '{"sentence": "a", "label": 1}\n{"label": 0}\n', "column sentence, row 2: nothing is not text"),
    ("a.jsonl", '{"sentence": 5, "label": 1}\n', "column sentence, row 1: 5 is not text; mend or remove the row"),
    ("a.jsonl", '{"sentence": "a", "label": 1}\n{"sentence": ["b"], "label": 1}\n', "column sentence"),
    ("a.jsonl", '{"sentence": "a", "label": 1}\n{"sentence": "b", "label": 2}\n',
     "column label, row 2: 2 is not one of negative, positive or 0 to 1"),
    ("a.jsonl", '{"sentence": "a", "label": "good"}\n', "column label, row 1: 'good' is not one of negative, positive"),
    ("a.jsonl", '{"sentence": "a", "label": null}\n', "column label, row 1: nothing is not one of"),
    ("a.csv", "sentence,label\na,1\nb,\n", "column label, row 2: '' is not one of"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "why"), BROKEN)
def test_broken_files(name, text, why, tmp_path):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InputError, match=why) as error:
        load_data(get_task("sst2"), {"train": str(path)})
    assert str(path) in one_line(error)


@pytest.mark.parametrize("keep", [5, 40])
def test_a_cut_off_gzip_file(keep, tmp_path):
    path = write(tmp_path / "a.jsonl.gz", SST2 * 50)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"a\.jsonl\.gz: not a whole gzip file") as error:
        load_data(get_task("sst2"), {"train": str(path)})
    one_line(error)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "txt"])
def test_text_that_is_not_utf8(suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes("text\ncaf\xe9\n".encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8") as error:
        load_data(get_task("wikitext2"), {"train": str(path)})
    one_line(error)


def test_a_broken_parquet_file(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 no such thing")
    with pytest.raises(InputError, match=r"a\.parquet: cannot be read: .*[Pp]arquet") as error:
        load_data(get_task("sst2"), {"train": str(path)})
    one_line(error)


def test_a_full_disk_is_not_the_fault_of_the_file(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", SST2)

    def full(*_, **__):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as e:
            raise datasets.exceptions.DatasetGenerationError("while generating") from e

    monkeypatch.setattr(datasets, "load_dataset", full)
    with pytest.raises(StorageError, match=r"a\.jsonl: No space left on device"):
        load_data(get_task("sst2"), {"train": str(path)})


@pytest.mark.parametrize(
    ("name", "row", "why"),
    [
        ("stsb", {"sentence1": "a", "sentence2": "b", "label": "high"}, "'high' is not a finite number"),
        ("stsb", {"sentence1": "a", "sentence2": "b", "label": "nan"}, "'nan' is not a finite number"),
        ("rte", {"sentence1": "a", "label": 1}, "no column sentence2 or hypothesis"),
        ("squad", {"answers": {"text": ["dog"], "answer_start": [4]}}, "at least one answer"),
        ("squad", {"answers": {"text": ["cat"], "answer_start": [5]}}, "at least one answer"),
        ("squad", {"answers": {"text": ["cat"], "answer_start": [-11]}}, "at least one answer"),
        ("squad", {"answers": {"text": [], "answer_start": []}}, "at least one answer"),
        ("squad", {"answers": {"text": ["cat", "the cat"], "answer_start": [4]}}, "at least one answer"),
        ("squad", {"answers": "cat"}, "column answers, row 1: 'cat' is not at least one answer"),
    ],
)
def test_broken_rows(name, row, why, tmp_path):
    row = {"id": "1", "context": "the cat", "question": "who?", **row} if name == "squad" else row
    path = write(tmp_path / "a.jsonl", [row])
    with pytest.raises(InputError, match=why) as error:
        load_data(get_task(name), {"train": str(path)})
    assert str(path) in one_line(error)


@pytest.mark.parametrize(
    ("data", "kind", "why"),
    [
        ("nowhere", InputError, "nowhere: not a directory"),
        (".", InputError, r"no file is named after a split \(train, validation, test, .* has odd.txt, train_set.csv"),
        ({"train": "nowhere.jsonl"}, InputError, r"nowhere\.jsonl: no such file, for split train"),
        ({"train": "*.jsonl"}, InputError, r"\*\.jsonl: no such file"),
        ({"train": "odd.xml"}, InputError, "no such file"),
        ({"train": "."}, UsageError, r"not a file of data; wanted \.jsonl"),
        ({"training": "odd.txt"}, UsageError, "training is neither a split of sst2 .* nor one of directory"),
        ({"train": "odd.txt", "max_train_samples": 0}, UsageError, "max_train_samples: 0 is not a number of rows"),
    ],
)  # fmt: skip
def test_data_that_cannot_be_meant(data, kind, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd.txt").write_text("text\n")
    (tmp_path / "train_set.csv").write_text("sentence,label\na,1\n")
    with pytest.raises(kind, match=why) as error:
        load_data(get_task("sst2"), data)
    one_line(error)


def test_two_formats_of_one_split(tmp_path):
    write(tmp_path / "dev.jsonl", SST2)
    write(tmp_path / "dev.csv", SST2)
    with pytest.raises(InputError, match=r"split validation could be any of dev\.csv, dev\.jsonl; name the one"):
        load_data(get_task("sst2"), tmp_path)


def test_the_hub_out_of_reach():
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(StorageError, match=r"nyu-mll/glue \(rte\), split train, cannot be had .* give data=DIR") as e:
        load_data(get_task("rte"))
    one_line(e)


def test_the_hub_as_it_is_asked(monkeypatch):
    """ANLI's rounds are joined, and only the splits that are wanted are fetched."""
    asked = []

    def load_dataset(path, config, *, split, revision):
        asked.append((path, config, split, revision))
        return datasets.Dataset.from_list([{"premise": "a", "hypothesis": split, "label": 1}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = load_data(get_task("anli"), {"max_eval_samples": 2}, ["validation"])
    assert asked == [("facebook/anli", None, f"dev_r{i}", None) for i in (1, 2, 3)]
    assert loaded["validation"]["text_pair"][:] == ["dev_r1", "dev_r2"]
