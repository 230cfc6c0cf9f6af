"""An option is written once: every face is made from the tables of ``loftq.options``."""

import collections
import dataclasses
import inspect
import json
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import typer.main
import typing_extensions

import loftq
import loftq.cli
from loftq import codes, options
from loftq.calibration.calibrate import CalibrateOptions
from loftq.calibration.collect import HELD_EVERY
from loftq.checkpoint.quantize import QuantizeOptions, quantize_options
from loftq.cli.entry import usage
from loftq.errors import UsageError
from loftq.finetune import recipe
from loftq.formats import layouts
from loftq.frozen.start import StartOptions
from loftq.planning import Policy
from loftq.serving.export import ExportOptions
from loftq.serving.generate import GenerateOptions
from loftq.serving.merge import MergeOptions
from loftq.serving.options import Exporting, Generating, Merging
from loftq.spec import PRESETS, QuantSpec, SolveSpec

PLACE = Path(loftq.__file__).parent
RECIPE = {"model": "org/model", "task": "sst2", "method": "loftq"}


def flags(verb):
    command = typer.main.get_command(loftq.cli.app).commands[verb]
    return {parameter.name: parameter for parameter in command.params}


def quantization(**values):
    return recipe.parse({**RECIPE, "quantization": values}).quantization


@pytest.mark.parametrize("holder", [QuantSpec, SolveSpec, Policy, QuantizeOptions, CalibrateOptions, StartOptions])
def test_a_dataclass_has_the_default_of_the_table(holder):
    defaults = {f.name: f.default for f in dataclasses.fields(holder) if f.name in options.TABLE}
    if holder is QuantSpec:  # of one matrix, for which the width is needed, and the code is decided
        assert (defaults.pop("bits"), defaults.pop("code")) == (dataclasses.MISSING, "nf")
    assert defaults == {name: options.default(name) for name in defaults}


@pytest.mark.parametrize(
    ("verb", "group", "holder"),
    [
        ("merge", Merging, MergeOptions),
        ("export", Exporting, ExportOptions),
        ("generate", Generating, GenerateOptions),
    ],
)
def test_a_verb_on_what_was_trained_has_the_options_of_its_group(verb, group, holder):
    table = options.rows(group)
    defaults = {f.name: f.default for f in dataclasses.fields(holder) if f.name in table}
    assert defaults == {name: options.default(name, group) for name in defaults}
    assert {name: (flags(verb)[name].help, flags(verb)[name].default) for name in table} == {
        name: (option.help, option.default) for name, (_, option) in table.items()
    }


def test_quantize_has_every_option_but_those_of_python_and_recipes():
    elsewhere = {*options.rows(options.Variant, options.Collection, options.Training)}
    ours = {name: flag for name, flag in flags("quantize").items() if name in options.TABLE}
    assert {*ours} == {*options.TABLE} - elsewhere
    for name, flag in ours.items():
        _, option = options.TABLE[name]
        assert flag.help == option.help
        assert flag.default in (None, option.default)
        assert (flag.default is None) == (option.default is None or option.open in ("preset", "format", "calibrate"))


def test_recipes_have_the_options_of_storage_solver_and_calibration():
    section = recipe.Quantization.model_fields
    assert [*section] == [*options.rows(options.Storage, options.Solver, options.Calibration, "device")]
    assert {*recipe.Lora.model_fields} == {*options.rows(options.Ranks, options.Training)}
    for name, field in {**section, **recipe.Lora.model_fields}.items():
        assert field.default in (None, options.default(name))


CALLS = {
    loftq.plan: options.Plans,
    loftq.get_peft_model: options.Plans,
    loftq.quantize: options.Quantizing,
    loftq.quantize_weight: options.OneMatrix,
    loftq.start: options.Starting,
    loftq.calibrate: options.Collecting,
    loftq.register_preset: options.OwnPreset,
    loftq.merge: Merging,
    loftq.export: Exporting,
    loftq.generate: Generating,
}


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_a_call_names_its_options_in_signature_types_and_docstring(call):
    parameters, hints = inspect.signature(call).parameters, CALLS[call].__annotations__
    assert {*hints} <= {*parameters}
    for name, hint in hints.items():
        kind, option = typing.get_args(hint)[:2]
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].default in (None, option.default)
        assert parameters[name].annotation == kind
        assert parameters[name].default is not None or type(None) in typing.get_args(kind), name
        assert inspect.getdoc(call).count(f"\n    {name}: ") == 1
    assert "\n    options:" not in inspect.getdoc(call)


TYPED = """import loftq

loftq.quantize("m", "o", bits=2, rank="mlp=8,4", budget_ranks=[4, 8], calibrate=None, overwrite=True)
loftq.quantize("m", "o", bit=2)
loftq.plan("m", block_size="64")
loftq.start("base", "m", "o", rank=8, steps=3)
loftq.register_preset("own", steps=2, seed=0)
"""


@pytest.mark.slow
def test_a_type_checker_knows_every_option(tmp_path):
    (tmp_path / "calls.py").write_text(TYPED, "utf-8")
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, tmp_path / "calls.py"]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=False).stdout)["generalDiagnostics"]
    found = {problem["range"]["start"]["line"] + 1: problem["rule"] for problem in told}
    assert found == {4: "reportCallIssue", 5: "reportArgumentType", 6: "reportCallIssue", 7: "reportCallIssue"}


def test_no_public_callable_takes_options_of_any_type():
    """What pyright and editors read: the annotations of the source, not the signatures made of them."""
    for name in loftq.__all__:
        public = getattr(loftq, name)
        members = vars(public).values() if inspect.isclass(public) else [public]
        for member in members:
            function = inspect.unwrap(getattr(member, "__func__", member))
            code = getattr(function, "__code__", None)
            if code is None or (inspect.isclass(public) and function.__name__.startswith("_")):
                continue
            names = code.co_varnames[code.co_argcount + code.co_kwonlyargcount :]
            if code.co_flags & inspect.CO_VARKEYWORDS:
                rest = names[bool(code.co_flags & inspect.CO_VARARGS)]
                assert typing_extensions.get_origin(function.__annotations__[rest]) is typing_extensions.Unpack, name


def test_no_two_classes_have_one_name():
    found = [
        name for file in PLACE.rglob("*.py") for name in re.findall(r"^class (\w+)", file.read_text(), re.MULTILINE)
    ]
    assert [name for name, count in collections.Counter(found).items() if count > 1] == []


def test_help_names_what_the_registries_have():
    shown = {name: option.help for name, (_, option) in options.TABLE.items()}
    assert [name for name in codes.names() if name not in shown["code"]] == []
    assert [name for name in PRESETS if name not in shown["preset"]] == []
    assert [name for name in layouts.names() if name not in shown["format"]] == []
    for name, (_, option) in options.TABLE.items():
        if name not in options.rows(options.Variant) and name != "scales":  # "formula" is said in other words
            assert [choice for choice in option.choices if str(choice) not in option.help] == [], name


def test_texts_have_a_row_for_each_side():
    assert options.TABLE["calibration_samples"][1].bounds["ge"] == HELD_EVERY


@pytest.mark.parametrize("name", ["block_size", "double_quant", "scales", "min_coverage"])
def test_the_same_did_you_mean(name):
    wrong = name.replace("s", "z", 1).replace("m", "n", 1).replace("q", "g", 1)
    flag, verb = f"--{wrong.replace('_', '-')}", typer.main.get_command(loftq.cli.app).commands["quantize"]
    with pytest.raises(
        Exception, match=f"No such option:? '?{flag}"
    ) as e:  # typer's own, of a class that is not public
        verb.make_context("quantize", ["org/model", "-o", "out", flag, "1"])
    assert flags("quantize")[name].opts[0] in e.value.possibilities
    assert usage(e.value) == f"No such option: {flag}; did you mean {flags('quantize')[name].opts[0]}?"
    with pytest.raises(UsageError, match=f"quantization.{wrong}: unknown key; did you mean {name}"):
        quantization(**{wrong: 1})
    with pytest.raises(UsageError, match=f"no option '{wrong}'; did you mean '{name}'"):
        loftq.quantize("org/model", "out", **{wrong: 1})


@pytest.mark.parametrize(
    ("name", "value"),
    [("block_size", 0), ("scale_dtype", "int8"), ("min_coverage", 2.0), ("steps", -1), ("svd", "fast")],
)
def test_a_bad_value_is_refused_by_every_face(name, value):
    with pytest.raises(UsageError, match=name):
        quantization(**{name: value})
    with pytest.raises(UsageError, match=name):
        quantize_options({name: value})


def test_a_format_fills_what_is_left_open():
    policy = quantize_options({"format": "bnb", "bits": 4, "scale_dtype": None}).policy
    assert (policy.bits, policy.code, policy.scale_dtype) == ("4", "nf", "float32")
    assert quantize_options({"bits": 4}).policy == Policy(bits="4", solve=SolveSpec(**PRESETS["fitted"]))


ADDED = """
import typer.main, loftq.cli, loftq.errors
assert not any("shrink" in str(p.opts) for p in typer.main.get_command(loftq.cli.app).commands["start"].params)
flag = next(p for p in typer.main.get_command(loftq.cli.app).commands["quantize"].params if p.name == "shrink")
assert (flag.opts, flag.help) == (["--shrink"], "Of Q.")
from loftq.finetune import recipe
read = recipe.parse({"model": "m", "task": "sst2", "method": "loftq", "quantization": {"shrink": 0.5}})
assert read.quantization.solver("loftq").shrink == 0.5
from loftq.cli.entry import usage
from loftq.checkpoint.quantize import quantize_options
assert quantize_options({"shrink": 0.5}).policy.solve.shrink == 0.5
try:
    quantize_options({"shrink": 2.0})
except loftq.errors.UsageError as e:
    print(e)
from loftq.planning import Plan
from loftq.spec import SolveSpec
print(Plan((), (), 1.0, False, 1, SolveSpec()).digest())
"""


@pytest.mark.slow
def test_an_option_of_the_solver_is_two_lines_beside_its_use(tmp_path):
    """The worked example of CONTRIBUTING: after it, every face has the option, and plans without it their digest."""
    from loftq.planning import Plan

    shutil.copytree(PLACE, tmp_path / "loftq", ignore=shutil.ignore_patterns("__pycache__"))
    for name, before, line in (
        (
            "options.py",
            "    scales: Annotated[",
            'shrink: Annotated[float, Option(0.0, bounds={"ge": 0, "le": 1}), "Of Q."]',
        ),
        ("spec.py", '    start: str = default("start")', 'shrink: float = default("shrink")'),
    ):
        text = (tmp_path / "loftq" / name).read_text("utf-8")
        assert text.count(before) == 1
        (tmp_path / "loftq" / name).write_text(text.replace(before, f"    {line}\n{before}"), "utf-8")
    ended = subprocess.run(
        [sys.executable, "-c", ADDED], env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    digest = Plan((), (), 1.0, False, 1, SolveSpec()).digest()
    assert ended.stdout.splitlines() == ["shrink must lie between 0 and 1, got 2.0", digest]
