"""Files that verbs read, changed at random or made to hurt: exit 0 or one documented error, never a traceback."""

import copy
import json
import random
import shutil
from pathlib import Path

import pytest

from harness import FLAGS, cli, refused, run, tiny_source
from loftq.checkpoint.verify import read_manifest, verify
from loftq.errors import InputError, LoftqError
from loftq.finetune.compare import read_rows
from loftq.finetune.recipe import read
from loftq.finetune.run import RunDirectory, RunResult
from loftq.formats import fsio, hashed_json
from loftq.report.inspect import inspection
from loftq.report.tables import print_inspection

pytestmark = pytest.mark.slow

MUTANTS = 300
VALUES = [
    *(
        None,
        True,
        0,
        -1,
        1,
        2**31,
        2**63,
        10**99,
        0.5,
        -0.5,
        1e308,
        5e-324,
        "",
        "x",
        "../x",
        "\x00",
        "\u202e",
        "é" * 2000,
    ),
    *([], {}, [[]], [0, 0], [-1, 4], {"a": {}}, [0.5] * 50, {"bits": 2}, ["x"] * 5),
]
RECIPE = """\
model: org/model
task: sst2
method: loftq
data: {train: a.jsonl, validation: b.jsonl}
quantization: {bits: 2.5, preset: fitted}
lora: {rank: 8, dropout: 0.1}
training: &t {learning_rate: 1.0e-4, num_train_epochs: 5, bf16: false}
generation: {num_beams: 4}
max_length: 128
seed: 0
output: runs/x
compare: {methods: [loftq, qlora], again: *t}
"""
TOKENS = [
    *(
        "&a ",
        "*a",
        "*t",
        "!!int ",
        "!x ",
        "[",
        "]",
        "{",
        "}",
        ": ",
        ", ",
        "- ",
        "? ",
        "\n",
        "\t",
        "#",
        "'",
        '"',
        "|",
        ">",
    ),
    *(
        "%",
        "@",
        "`",
        "---\n",
        "...\n",
        "~",
        "null",
        ".nan",
        ".inf",
        "-0",
        "08",
        "1e999",
        "9" * 200,
        "\\u202e",
        "\u202e",
    ),
    *("[" * 200, "{a: " * 200, '"\\uD800"', "a: 1\na: 2\n", "<<: ", "x" * 3000, "true", "-1", "2147483648", "= "),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("hostile")
    run(tiny_source(root / "source"), root / "out")
    return root / "out"


@pytest.fixture
def out(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "out"))


def places(value, path=()):
    """The way to everything in a JSON value."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield from places(one, (*path, key))


def mutant(value, rng):
    """A copy with one to three places that are gone, others, or doubled."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        *way, key = rng.choice([path for path in places(value) if path])
        holder = value
        for step in way:
            holder = holder[step]
        match rng.randrange(4):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, list):
                holder.append(copy.deepcopy(holder[key]))
            case _:
                holder[key] = copy.deepcopy(rng.choice(VALUES))
    return value


def outcome(call):
    """0, or the exit code of a documented error of one line."""
    error = None
    try:
        call()
    except LoftqError as e:
        error = e
    assert not set("\n\u202e") & set(str(error))
    return error.exit_code if error else 0


def test_manifests(out, capsys):
    """Sealed again, as by somebody who means harm."""
    rng = random.Random(20261129)
    manifest = json.loads((out / "loftq_manifest.json").read_bytes())
    del manifest["sha256"]
    codes = []
    for _ in range(MUTANTS):
        hashed_json.write(out / "loftq_manifest.json", mutant(manifest, rng))
        codes.append(outcome(lambda: print_inspection(inspection(read_manifest(out)))))
        if codes[-1] == 0:
            codes.append(outcome(lambda: verify(out)))
    assert set(codes) == {0, 3}


@pytest.mark.parametrize("name", ["config.json", "loftq_init/adapter_config.json", "model.safetensors.index.json"])
def test_other_json_of_a_checkpoint(out, name):
    """With digests that fit."""
    rng = random.Random(name)
    value = json.loads((out / name).read_bytes())
    manifest = json.loads((out / "loftq_manifest.json").read_bytes())
    del manifest["sha256"]
    codes = set()
    for _ in range(MUTANTS // 6):
        digest = fsio.write_json(out / name, mutant(value, rng))
        manifest["files"][name] = {"size": digest.size, "sha256": digest.sha256}
        hashed_json.write(out / "loftq_manifest.json", manifest)
        codes.add(outcome(lambda: verify(out)))
    assert codes <= {0, 3}


def test_recipes(tmp_path):
    rng = random.Random(20261130)
    codes = []
    for _ in range(MUTANTS):
        text = RECIPE
        for _ in range(rng.choice((1, 1, 2, 3))):
            at = rng.randrange(len(text))
            text = text[:at] + rng.choice(TOKENS) + text[at + rng.randrange(6) :]
        (tmp_path / "recipe.yaml").write_text(text)
        codes.append(outcome(lambda: read(tmp_path / "recipe.yaml")))
    assert set(codes) == {0, 2, 3}


HOSTILE = {
    "types": lambda m: m.update(matrices={}),
    "negative": lambda m: m["matrices"][0].update(bytes=-1),
    "options": lambda m: m["identity"]["options"].pop("solve"),
    "steps": lambda m: m["identity"]["options"]["solve"].update(steps="many"),
    "errors": lambda m: m["matrices"][0].update(errors=[0.5] * 300_000),
}


@pytest.mark.parametrize("kind", [*HOSTILE, "nan", "deep", "digits", "values"])
def test_every_verb_on_a_hostile_manifest(out, finished, tmp_path, kind):
    path = out / "loftq_manifest.json"
    if kind in HOSTILE:
        manifest = json.loads(path.read_bytes())
        del manifest["sha256"]
        HOSTILE[kind](manifest)
        hashed_json.write(path, manifest)
    else:
        wrong = {
            "nan": "NaN",
            "deep": "[" * 5000 + "]" * 5000,
            "digits": "9" * 6000,
            "values": "[0" + ",0" * 2_500_000 + "]",
        }
        path.write_text(path.read_text().replace('"format_version": 1', f'"format_version": {wrong[kind]}', 1))
    (tmp_path / "recipe.yaml").write_text(
        f"model: {out}\ntask: sst2\nmethod: loftq\nmax_length: 8\n"
        f"data: {{train: {tmp_path}/a.jsonl, validation: {tmp_path}/b.jsonl}}\n"
        "compare: {arms: [{}]}\n"
    )
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text('{"sentence": "x", "label": 0}\n' * 4)
    trained = [("train", "a"), ("compare", "b")] if kind in ("steps", "deep") else []
    verbs = [("inspect", out), ("verify", out)]
    verbs += [(verb, tmp_path / "recipe.yaml", "-o", tmp_path / name) for verb, name in trained]
    for verb in verbs:
        refused(cli(*verb), 3, "loftq_manifest.json")
    refused(cli("quantize", finished.parent / "source", "-o", out, *FLAGS), 5, "damaged", "--overwrite")


RESULT = {
    "task": "t",
    "method": "m",
    "seed": 0,
    "metrics": {"a": 1.0, "b": float("nan"), "n": 5},
    "splits": ["v"],
    "history": [{"step": 1, "loss": None}],
    "steps": 3,
    "epochs": 1.0,
    "seconds": 1.5,
    "learning_rate": 1e-4,
    "bytes": {"backbone": 3},
    "base": "x",
    "processes": 1,
    "device": "cpu",
    "versions": {"torch": "3"},
}


def test_results_of_runs(tmp_path):
    place = RunDirectory(tmp_path)
    place.finish(RunResult(**RESULT))
    assert place.result().metrics["n"] == 5
    sound, rng = json.loads(place.metrics.read_bytes()), random.Random(20261201)
    codes = []
    for _ in range(MUTANTS):
        fsio.write_json(place.metrics, mutant(sound, rng))
        codes.append(outcome(place.result))
    assert set(codes) == {0, 3}
    fsio.write_json(place.metrics, {**sound, "metrics": []})
    assert outcome(place.result) == 3


@pytest.mark.parametrize("line", ["[]", "{}", '{"key": []}', '{"key": NaN}', "[" * 5000])
def test_rows_of_comparisons(tmp_path, line):
    (tmp_path / "rows.jsonl").write_text(f'{{"key": "a"}}\n{line}\n')
    with pytest.raises(InputError, match=r"rows\.jsonl, line 2: "):
        read_rows(tmp_path / "rows.jsonl")
