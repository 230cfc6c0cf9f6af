"""Recipes: what is read, and that everything wrong is told at once, in one line."""

import pytest

from loftq import codes
from loftq.errors import InputError, UsageError
from loftq.finetune.recipe import dump, parse, read
from loftq.formats.strict_yaml import loads

WHOLE = """
model: org/model
task: sst2
method: loftq
data: /some/where
quantization: {bits: 2.5, steps: 1}
lora: {rank: 8}
training:
  learning_rate: 1e-4
  lr_scheduler_type: linear
  load_best_model_at_end: true
generation: paper
seed: 3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(WHOLE)
    return path


def refusal(text, *overrides, error=UsageError):
    with pytest.raises(error) as caught:
        parse(loads(text, "r")) if not overrides else read(text, overrides)
    return str(caught.value)


def test_numbers_are_numbers_and_patterns_are_text(file):
    recipe = read(file)
    assert recipe.training["learning_rate"] == 1e-4
    assert (recipe.quantization.bits, recipe.lora.rank) == ("2.5", "8")
    assert (recipe.data.directory, recipe.generation.preset) == ("/some/where", "paper")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E+3", 1e3), ("-.5", -0.5), (".inf", float("inf")), ("007", 7), ("true", True),
        ("null", None), ("no", "no"), ("on", "on"), ("1:30", "1:30"), ("1_000", "1_000"), ("2026-11-25", "2026-11-25"),
        ("0x10", "0x10"),
    ],
)  # fmt: skip
def test_yaml_is_1_2(text, value):
    assert loads(text, "x") == value
    assert type(loads(text, "x")) is type(value)


def test_what_is_written_reads_back(file):
    recipe = read(file)
    assert parse(loads(dump(recipe), "x")) == recipe


def test_overrides(file):
    overrides = [
        "seed=5",
        "data.max_train_samples=9",
        "quantization.bits=layers.0=4,2",
        "method=lora",
        "lora.alpha=4.0",
    ]
    recipe = read(file, overrides)
    assert (recipe.seed, recipe.data.max_train_samples, recipe.data.directory) == (5, 9, "/some/where")
    assert (recipe.quantization.bits, recipe.method, recipe.lora.alpha) == ("layers.0=4,2", "lora", 4)
    assert read(file, ["generation.num_beams=2", "generation.preset=null"]).generation.choice == {"num_beams": 2}
    assert read(file, ["quantization=null"]).quantization is None
    assert "wanted key=value" in refusal(file, "seed")
    assert "model is org/model, not a section" in refusal(file, "model.x=1")


def test_changed_checks_again(file):
    recipe = read(file)
    assert recipe.changed(**{"method": "qlora", "training.learning_rate": 1.0}).training["learning_rate"] == 1.0
    assert recipe.training["learning_rate"] == 1e-4
    with pytest.raises(UsageError, match="method: wanted 'full', 'lora', 'qlora' or 'loftq', got 'x'"):
        recipe.changed(method="x")


def test_all_mistakes_in_one_line(file):
    line = refusal(
        file,
        "seed=-1", "lora.rnk=3", "data.trian=x", "training.learning_rat=2", "training.num_train_epochs=x",
        "training.output_dir=x", "training.lr_scheduler_type=foo", "quantization.code=nq", "metod=lora",
    )  # fmt: skip
    for part in (
        f"{file}: ",
        "seed: wanted greater than or equal to 0, got -1",
        "lora.rnk: unknown key; did you mean rank?",
        "trian: no split; wanted train, validation, test, or directory",
        "training.learning_rat: no field of transformers.TrainingArguments; did you mean learning_rate?",
        "training.num_train_epochs: wanted a valid number, got 'x'",
        "training.output_dir: not to be given here; say output",
        "training.lr_scheduler_type: wanted one of linear, cosine",
        f"quantization.code: wanted {', '.join(map(repr, ('auto', *codes.names()[:-1])))} or ",
        f"{codes.names()[-1]!r}, got 'nq'",
        "metod: unknown key; did you mean method?",
    ):
        assert part in line, part
    assert "\n" not in line


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("quantization.bits=true", "quantization.bits: wanted a valid string, got True"),
        ("quantization.min_coverage=2", "quantization.min_coverage: wanted less than or equal to 1"),
        ("lora.dropout=.nan", "lora.dropout: wanted a finite number"),
        ("lora.alpha=0", "lora.alpha: wanted greater than 0"),
        ("training.bf16=1", "training.bf16: wanted a valid boolean, got 1"),
        ("training.learning_rate=.inf", "training.learning_rate: wanted a finite number"),
        ("training.predict_with_generate=true", "not to be given here; say nothing: the task knows"),
        ("training=5", "training: wanted a valid dictionary, got 5"),
        ("data.train=f.jsonl", "a directory and files are given; wanted one of them"),
        ("data.max_eval_samples=0", "data.max_eval_samples: wanted greater than or equal to 1"),
        ("task=7", "task: wanted a valid string, got 7"),
        ("model=", "model: wanted a valid string, got None"),
        ("model=''", "model: String should have at least 1 character, got ''"),
        ("generation=warm", "generation.preset: wanted 'greedy' or 'paper', got 'warm'"),
        ("generation={preset: greedy, num_beams: 4}", "num_beams: given beside preset; wanted a preset, or settings"),
        ("training.per_device_eval_batch_size=0", "training.per_device_eval_batch_size: wanted greater than or equal"),
        ("training.gradient_accumulation_steps=-1", "gradient_accumulation_steps: wanted greater than or equal to 1"),
        ("training.dataloader_num_workers=-1", "training.dataloader_num_workers: wanted greater than or equal to 0"),
        ("training.log_level=odd", "training.log_level: wanted one of detail, debug, info"),
        ("training.disable_tqdm=true", "not to be given here; say nothing: there is one bar"),
    ],
)
def test_every_mistake_names_its_key(file, override, wanted):
    assert wanted in refusal(file, override)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a: [1", "not YAML"),
        ("a: 1\na: 2", "key 'a' is given twice"),
        ("a: {b: 1, b: 2}", "key 'b' is given twice"),
        ("!!python/object/apply:os.system ['true']", "not YAML: could not determine a constructor"),
        ("[1]", "wanted a mapping with model, task and method"),
        ("", "wanted a mapping"),
        ("? [1]\n: 2", "not YAML"),
        ("\x00", "not YAML"),
    ],
)
def test_broken_files(tmp_path, text, wanted):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"broken\.yaml: ") as caught:
        read(path)
    assert wanted in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "latin").write_bytes(b"\xff")
    for name, wanted in (("latin", "not YAML: .*utf-8"), ("none", "no such file"), (".", "not a regular file")):
        with pytest.raises(InputError, match=wanted):
            read(tmp_path / name)


def test_missing_keys():
    assert "model: missing; task: missing; method: missing" in refusal("{}")
    given = {"task": "sst2"}
    whole = parse(given, changes={"model": "a", "method": "lora", "data": "rows", "data.max_train_samples": 3})
    assert whole.to_dict()["data"] == {"directory": "rows", "max_train_samples": 3}
    assert given == {"task": "sst2"}


def test_a_budget_reaches_the_policy(file):
    """As a number or as a size; without one, none of its fields is written down."""
    from loftq.finetune.compare import settings
    from loftq.finetune.train import policy_of

    recipe = read(file, ["quantization={budget: 2.5, budget_ranks: '4,16'}"])
    policy = policy_of(recipe)
    assert (policy.budget, policy.budget_ranks, policy.budget_solver, policy.bits) == ("2.5", "4,16", "greedy", "4")
    assert [settings(r, file.parent)["bits"] for r in (recipe, read(file))] == ["≤2.5", "2.5"]
    assert "budget" not in dump(read(file))
    assert policy_of(read(file, ["quantization={budget: 30MB, budget_solver: milp}"])).budget == "30MB"
    assert "budget_solver" in refusal(file, "quantization={budget: 2.5, budget_solver: best}")


def test_what_makes_another_run_of_one_that_continues_is_not_given():
    told = refusal(WHOLE.replace("training:", "training:\n  ignore_data_skip: true"))
    assert told.startswith("recipe: training.ignore_data_skip: not to be given here; say nothing: a run that continues")
