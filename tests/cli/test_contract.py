"""The command line as it is promised: verbs, options, exit codes, one line for every error, pure JSON on stdout."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import typer.main
from safetensors.torch import load_file

import loftq.cli
from harness import FLAGS, cli, refused, start_cli, tiny_source, tree
from loftq.errors import UsageError, quoted


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_source(tmp_path_factory.mktemp("contract") / "source")


@pytest.fixture(scope="module")
def finished(source):
    """What a plain run says and makes."""
    ended = cli("quantize", source, "-o", source.parent / "out", *FLAGS)
    assert ended.code == 0, ended.err
    return source.parent / "out", ended


@pytest.fixture
def out(finished):
    return finished[0]


PROMISED = {
    "calibrate": {"--output", "--data", "--samples", "--max-length", "--kind", "--column", "--device", "--json"},
    "plan": {"--bits", "--rank", "--json", "--budget", "--budget-ranks", "--budget-solver", "--curves", "--plot"},
    "quantize": {
        "--output", "--bits", "--code", "--block-size", "--rank", "--alpha", "--steps", "--method", "--format",
        "--embeddings", "--workers", "--device", "--seed", "--overwrite", "--rank-policy", "--max-shard-size",
        "--budget", "--budget-ranks", "--budget-solver", "--curves", "--preset", "--calibrate", "--samples", "--scales",
        "--shared", "--cluster",
    },
    "status": {"--json"},
    "start": {
        "--weights", "--output", "--rank", "--alpha", "--rslora", "--embeddings", "--device", "--seed", "--calibrate",
    },
    "train": {"--output", "--restart", "--json"},
    "evaluate": {"--task", "--data", "--split", "--adapter", "--batch-size", "--max-length", "--sampling", "--json"},
    "compare": {"--output", "--json"},
    "inspect": {"--json", "--plot"},
    "merge": {"--adapter", "--dtype", "--max-shard-size", "--output", "--overwrite"},
    "export": {"--adapter", "--to", "--output", "--overwrite"},
    "generate": {"--adapter", "--prompt", "--max-new-tokens", "--temperature", "--top-p", "--seed", "--device"},
    "verify": set(),
}  # fmt: skip


def options(verb):
    command = typer.main.get_command(loftq.cli.app).commands[verb]
    return {o for parameter in command.params for o in parameter.opts if o.startswith("--")} - {"--help"}


def test_the_promised_verbs_and_options():
    assert set(typer.main.get_command(loftq.cli.app).commands) == set(PROMISED)
    for verb, promised in PROMISED.items():
        assert promised <= options(verb), verb


def test_plan_takes_the_options_of_quantize_that_change_a_plan():
    only_work = {
        "--output", "--samples", "--steps", "--order", "--svd", "--format", "--device", "--seed", "--max-shard-size",
        "--task-type", "--overwrite", "--shared", "--cluster", "--push-to-hub", "--private",
    }  # fmt: skip
    assert options("quantize") - options("plan") == only_work
    assert options("plan") - options("quantize") == {"--json", "--plot", "--estimate", "--tokens"}


def test_help(source):
    for verb in ("", *PROMISED):
        ended = cli(*([verb] if verb else []), "--help")
        assert ended.code == 0
        assert "Usage" in ended.out
        assert ended.err == ""


@pytest.mark.parametrize("verb", PROMISED)
def test_help_says_one_default_and_calls_arguments_alike(verb):
    for parameter in typer.main.get_command(loftq.cli.app).commands[verb].params:
        help = parameter.help or ""
        assert "Default:" not in help or parameter.show_default is False or parameter.default is None, parameter.name
        if not parameter.opts[0].startswith("-"):
            assert parameter.metavar.strip("[]. ")[0].isupper(), parameter.name


def test_nothing_at_all():
    ended = cli()
    assert "Usage" in ended.out
    refused(ended, 2, "no command given")


# Bad values


BAD = [
    (("--bits", "5"), "--bits"),
    (("--bits", "2.25x"), "--bits"),
    (("--bits", "4.5"), "between 2.0 and 4.0"),
    (("--bits", "2,4"), "exactly one value"),
    (("--bits", "no_such_layer=4,2"), "matches no module"),
    (("--bits", ""), "--bits"),
    (("--rank", "0"), "--rank"),
    (("--rank", "-3"), "--rank"),
    (("--rank", "four"), "--rank"),
    (("--rank", "72"), "rank"),
    (("--rank-policy", "perhaps"), "--rank-policy"),
    (("--alpha", "0"), "alpha must be positive"),
    (("--alpha", "-1"), "alpha must be positive"),
    (("--alpha", "nan"), "--alpha"),
    (("--alpha", "inf"), "--alpha"),
    (("--code", "nq"), "code must be one of"),
    (("--code", "nf4"), "did you mean nf?"),
    (("--block-size", "0"), "block_size"),
    (("--block-size", "many"), "--block-size"),
    (("--scale-dtype", "int8"), "scale_dtype"),
    (("--steps", "-1"), "steps"),
    (("--preset", "gptq"), "preset must be one of"),
    (("--preset", "lofq"), "did you mean loftq?"),
    (("--method", "qlora", "--steps", "3"), "preset qlora has 0 steps"),
    (("--preset", "cloq"), "needs statistics of the matrices' inputs"),
    (("--preset", "descent", "--order", "svd-first"), "order svd-first"),
    (("--order", "random"), "order"),
    (("--svd", "fast"), "svd"),
    (("--scales", "absmax"), "scales must be one of formula, fitted"),
    (("--scales", "fitted", "--code", "uniform-tensor"), "scales are fitted to blocks"),
    (("--bits", "8", "--code", "lloyd"), "code lloyd has 2, 3 or 4 bits"),
    (("--format", "gguf"), "--format"),
    (("--workers", "-1"), "--workers"),
    (("--device", "cudaa"), "--device"),
    (("--device", "meta"), "--device"),
    (("--seed", "-1"), "seed"),
    (("--max-shard-size", "big"), "--max-shard-size"),
    (("--max-shard-size", "0MB"), "--max-shard-size"),
    (("--max-shard-size", "-1GB"), "--max-shard-size"),
    (("--min-coverage", "2"), "--min-coverage"),
    (("--min-coverage", "nan"), "--min-coverage"),
    (("--task-type", "POETRY"), "--task-type"),
    (("--double-quant", "--code", "uniform-tensor"), "double_quant"),
    (("--format", "bnb", "--code", "uniform"), "--format bnb"),
    (("--budget", "2"), "--budget 2 is too small"),
    (("--budget", "lots"), "--budget"),
    (("--budget", "0MB"), "--budget"),
    (("--budget", "3", "--bits", "2"), "--bits 2 and --budget 3"),
    (("--budget", "3", "--format", "dense"), "--budget counts bytes of --format loftq"),
    (("--budget", "3", "--budget-ranks", "all"), "--budget-ranks"),
    (("--budget", "3", "--budget-solver", "gurobi"), "--budget-solver"),
    (("--budget-ranks", "8"), "--budget-ranks"),
    (("--no-such-option",), "--no-such-option"),
    (("surplus",), "surplus"),
]


@pytest.mark.sampled(5)
@pytest.mark.parametrize(("flags", "word"), BAD, ids=lambda v: " ".join(v) if isinstance(v, tuple) else "")
def test_a_bad_value(source, tmp_path, flags, word):
    """Exit code 2, one line that names it, and nothing on the disk."""
    before = tree(source)
    small = () if "--rank" in flags else ("--rank", "4")
    refused(cli("quantize", source, "-o", tmp_path / "out", *small, *flags), 2, word)
    assert tree(tmp_path) == {}
    assert tree(source) == before


def test_missing_arguments(source):
    refused(cli("quantize"), 2, "Missing argument")
    refused(cli("quantize", source), 2, "--output")
    refused(cli("inspect"), 2, "Missing argument")
    refused(cli("frobnicate"), 2, "frobnicate")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(source, tmp_path):
    refused(cli("quantize", source, "-o", tmp_path / "out", "--device", "cuda"), 2, "--device 'cuda'")
    calibrate = ("calibrate", source, "-o", tmp_path / "out", "--data", "nowhere.txt")
    refused(cli(*calibrate, "--device", "cuda"), 2, "--device 'cuda'")
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("inspect", "nowhere"), 3),
        (("calibrate", "./nowhere", "-o", "out", "--data", "nowhere.txt"), 3),
        (("verify", "nowhere"), 3),
        (("plan", "./nowhere"), 3),
        (("verify", "/dev/null"), 3),
        (("verify", "."), 3),
    ],
)
def test_a_place_without_a_checkpoint(tmp_path, arguments, code):
    refused(cli(*arguments, setup=lambda: os.chdir(tmp_path)), code, arguments[1])


def test_a_bug_is_one_line_too(source, tmp_path):
    """Exit code 70, and the traceback only when it is asked for."""

    def break_it():
        from loftq.checkpoint import quantize

        quantize.split = None

    command = ("quantize", source, "-o", tmp_path / "out", *FLAGS)
    refused(cli(*command, setup=break_it), 70, "please report it")
    debugged = cli(*command, setup=lambda: (break_it(), os.environ.update(LOFTQ_DEBUG="1")))
    assert debugged.code == 70
    assert "Traceback" in debugged.err


def test_not_enough_memory(source, tmp_path):
    def starve():
        from loftq.checkpoint import shards

        def solve(*_):
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

        shards.solve = solve

    ended = cli("quantize", source, "-o", tmp_path / "out", *FLAGS, setup=starve)
    refused(ended, 4, "encoder.layer.0.attention", "(72, 72)", "fewer --workers")
    assert not (tmp_path / "out").exists()


# What is printed


def test_plan_prints_every_matrix(source):
    ended = cli("plan", source, "--bits", "2", "--rank", "4")
    assert ended.code == 0
    assert ended.err == ""
    assert "encoder.layer.0-1.attention.self.query.weight" in ended.out
    assert "12 of " in ended.out


@pytest.mark.sampled(3)
@pytest.mark.parametrize("bits", ["2", "3", "4", "8", "3.0", "layer.0=4,2", "intermediate.dense=3,output.dense=8,2"])
def test_plan_json(source, bits):
    ended = cli("plan", source, "--bits", bits, "--rank", "4", "--json")
    assert ended.code == 0, ended.err
    plan = json.loads(ended.out)
    chosen = {row["name"]: row["bits"] for row in plan["tensors"] if row["action"] == "quantize"}
    assert len(chosen) == 12
    assert {row["name"] for row in plan["tensors"]} == set(load_file(source / "model.safetensors"))
    first = "encoder.layer.0.attention.self.query.weight"
    assert chosen[first] == {"3.0": 4, "layer.0=4,2": 4, "intermediate.dense=3,output.dense=8,2": 2}.get(bits) or int(
        bits
    )


def test_plan_reads_no_weights(source, tmp_path):
    copy = Path(shutil.copytree(source, tmp_path / "source"))
    raw = (copy / "model.safetensors").read_bytes()
    header = int.from_bytes(raw[:8], "little") + 8
    (copy / "model.safetensors").write_bytes(raw[:header] + b"\xff" * (len(raw) - header))  # NaN throughout
    assert cli("plan", copy, "--rank", "4").code == 0


def test_what_quantize_says(finished):
    _, ended = finished
    assert "12 matrices" in ended.out
    assert "Saved to" in ended.out
    last = re.split(r"[\r\n]+", ended.err.strip())[-1]
    assert re.search(r"12/12 \[\d\d:\d\d<.*, error 0\.\d{4}\]", last), "matrices, time left, error"


def test_quantize_says_nothing_else_on_stderr(finished):
    _, ended = finished
    assert all(line.startswith("LoftQ:") for line in re.split(r"[\r\n]+", ended.err) if line), ended.err


def test_inspect_json(out):
    ended = cli("inspect", out, "--json")
    assert ended.code == 0
    assert ended.err == ""
    inspected = json.loads(ended.out)
    assert set(inspected["matrices"][0]) == {
        "name", "shape", "bits", "rank", "alpha", "bytes", "errors", "kept", "qlora_error"
    }  # fmt: skip
    assert len(inspected["matrices"]) == 12
    for row in inspected["matrices"]:
        assert (row["bits"], row["rank"], row["alpha"]) == (2, 4, 4.0)
        assert len(row["errors"]) == 3
        assert row["qlora_error"] == row["errors"][0] > row["errors"][row["kept"]]
    packed = {n: t for f in out.glob("*.safetensors") for n, t in load_file(f).items()}
    row = inspected["matrices"][0]
    stem = row["name"].removesuffix("weight")
    assert row["bytes"] == sum(t.numel() * t.itemsize for n, t in packed.items() if n.startswith(stem + "weight"))
    assert {"error", "qlora_error", "bits_per_weight", "disk_bytes", "compression"} <= set(inspected["totals"])


def test_inspect(out):
    ended = cli("inspect", out)
    assert ended.code == 0
    assert "encoder.layer.1.output.dense.weight" in ended.out
    assert "stored bits per quantized weight" in ended.out


def test_inspect_plot(out, tmp_path):
    pytest.importorskip("matplotlib")
    ended = cli("inspect", out, "--plot", tmp_path / "errors.png")
    assert ended.code == 0, ended.err
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")
    refused(cli("inspect", out, "--plot", tmp_path / "errors.nonsense"), 2, "--plot")
    refused(cli("inspect", out, "--plot", tmp_path / "no" / "errors.png"), 4, "errors.png")
    assert os.listdir(tmp_path) == ["errors.png"]


def test_a_plot_replaces_files_alone(out, tmp_path):
    pytest.importorskip("matplotlib")
    for make in (os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/null")):
        make(tmp_path / "x.png")
        before = os.lstat(tmp_path / "x.png")
        refused(cli("inspect", out, "--plot", tmp_path / "x.png"), 2, "x.png: exists and is not a file")
        after = os.lstat(tmp_path / "x.png")
        assert (after.st_ino, after.st_mode, after.st_mtime_ns) == (before.st_ino, before.st_mode, before.st_mtime_ns)
        (tmp_path / "x.png").rename(tmp_path / f"was{before.st_mode}")
    (tmp_path / "link.png").symlink_to("errors.png")
    (tmp_path / "errors.png").write_bytes(b"")
    assert cli("inspect", out, "--plot", tmp_path / "link.png").code == 0
    assert (tmp_path / "link.png").is_symlink()
    assert (tmp_path / "errors.png").stat().st_size


def test_warnings_do_not_reach_stdout(source, out):
    """A low rank at many bits hardly helps: that is said, and the JSON stays pure."""
    ended = cli("quantize", source, "-o", out.parent / "eight", "--bits", "8", "--rank", "1", "--steps", "1")
    assert ended.code == 0
    inspected = json.loads(cli("inspect", out.parent / "eight", "--json").out)
    assert set(inspected) == {"matrices", "totals", "warnings"}


@pytest.mark.parametrize("verb", ["plan", "inspect"])
def test_a_full_stdout(source, out, verb):
    """What could not be printed is no success."""
    arguments = ("plan", source, "--rank", "4") if verb == "plan" else ("inspect", out, "--json")
    refused(cli(*arguments, stdout="/dev/full"), 4, "No space left")


def test_a_reader_that_leaves(source, tmp_path):
    """Nobody reads stdout any more: no traceback, and no success either."""
    reading, writing = os.pipe()
    os.close(reading)
    ended = start_cli("plan", source, "--rank", "4", stdout=f"/proc/self/fd/{writing}").ended()
    os.close(writing)
    refused(ended, 75, "nobody reads")


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["out [bold]", "out\x1b[31m", "ö ü", "-o", "a:b"])
def test_odd_names_of_directories(source, tmp_path, name):
    ended = cli("quantize", source, f"--output={tmp_path / name}", *FLAGS)
    assert ended.code == 0, ended.err
    assert "\x1b" not in ended.out
    assert os.listdir(tmp_path) == [name]
    assert cli("verify", tmp_path / name).code == 0
    assert f"{quoted(tmp_path / name)}: done" in cli("status", tmp_path / name).out  # where ":b:" is no emoji
    ended = cli("quantize", source, f"--output={tmp_path / name}", *FLAGS, "--seed", "5")
    assert "\x1b" not in refused(ended, 5)


# Methods


def test_methods_differ_only_in_the_start(source, tmp_path):
    at, preset = FLAGS.index("--steps"), FLAGS.index("--preset")
    others = tuple(f for i, f in enumerate(FLAGS) if i not in (at, at + 1, preset, preset + 1))
    for method in ("loftq", "svd", "qlora"):
        flags = FLAGS if method == "loftq" else others  # the others' steps are their own
        ended = cli("quantize", source, "-o", tmp_path / method, *flags, "--preset", method)
        assert ended.code == 0, ended.err
    names = [set(tree(tmp_path / method)) for method in ("loftq", "svd", "qlora")]
    assert names[0] == names[1] == names[2]
    rows = {m: json.loads(cli("inspect", tmp_path / m, "--json").out)["matrices"] for m in ("loftq", "svd", "qlora")}
    for whole, svd, qlora in zip(*rows.values(), strict=True):
        assert [len(r["errors"]) for r in (whole, svd, qlora)] == [3, 2, 1]
        assert whole["qlora_error"] == svd["qlora_error"] == pytest.approx(qlora["qlora_error"], rel=1e-6)
        assert whole["errors"][1] == pytest.approx(svd["errors"][1], rel=1e-6)
        assert whole["errors"][whole["kept"]] <= svd["errors"][1] * (1 + 1e-6) < qlora["errors"][0]
    start = load_file(tmp_path / "qlora" / "loftq_init" / "adapter_model.safetensors")
    assert not any(t.any() for n, t in start.items() if "lora_B" in n)
    assert all(t.any() for n, t in start.items() if "lora_A" in n)


@pytest.mark.slow
def test_alpha_does_not_change_the_error(source, tmp_path):
    errors = []
    for alpha in ("1", "4", "64"):
        assert cli("quantize", source, "-o", tmp_path / alpha, *FLAGS, "--alpha", alpha).code == 0
        inspected = json.loads(cli("inspect", tmp_path / alpha, "--json").out)
        assert {row["alpha"] for row in inspected["matrices"]} == {float(alpha)}
        errors.append(inspected["totals"]["error"])
    assert errors == pytest.approx([errors[0]] * 3, rel=1e-5)


def test_embeddings_adds_the_tables(tmp_path):
    import models

    models.tiny("bert").save_pretrained(tmp_path / "source")
    for flags, count in (((), 12), (("--embeddings",), 14)):
        ended = cli("plan", tmp_path / "source", "--rank", "4", *flags, "--json")
        rows = json.loads(ended.out)["tensors"]
        assert sum(row["action"] == "quantize" for row in rows) == count
    assert cli("quantize", tmp_path / "source", "-o", tmp_path / "out", *FLAGS, "--embeddings").code == 0
    assert cli("verify", tmp_path / "out").code == 0


RECIPE = "model: {model}\ntask: sst2\nmethod: lora\noutput: {output}\ndata: {data}\nmax_length: 8\n"


OUT = "s3://bucket/out"
ELSEWHERE = "nowhere://bucket/out"  # of a scheme that fsspec does not know


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("command", "url"),
    [
        ("quantize {url} -o {dir}", ELSEWHERE),
        ("quantize {source} -o {url}", ELSEWHERE),
        ("quantize {source} -o {dir} --rank 4 --calibrate {url}/texts.txt", OUT),
        ("quantize {source} -o {dir} --rank 4 --budget 3.1 --curves {url}/curves.json", OUT),
        ("plan {url}", ELSEWHERE),
        ("plan {source} --rank 4 --budget 3.1 --plot {url}/budget.png", OUT),
        ("calibrate {source} -o {url} --data {source}/config.json", OUT),
        ("calibrate {source} -o {dir} --data {url}/texts.txt", OUT),
        ("start {source} --weights {url} -o {dir}", ELSEWHERE),
        ("start {source} --weights {source} -o {url}", OUT),
        ("inspect {url}", ELSEWHERE),
        ("verify {url}", ELSEWHERE),
        ("evaluate {url} --task sst2", OUT),
        ("train {recipe} output={url}", OUT),
        ("train {recipe} model={url}", OUT),
        ("train {recipe} data={url}", OUT),
        ("compare {recipe} output={url}", OUT),
    ],
)
def test_a_url_is_refused(tmp_path, monkeypatch, command, url):
    """Wherever a path is taken, in one line and before any work; nothing is made of its name."""
    monkeypatch.chdir(tmp_path)
    source, recipe = tiny_source(tmp_path / "source"), tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=source, output=tmp_path / "run", data=tmp_path))
    before = tree(tmp_path)
    names = {"url": url, "source": source, "dir": tmp_path / "made", "recipe": recipe}
    ended = cli(*(part.format(**names) for part in command.split()))
    refused(ended, 2, url, "a URL, and only paths of this machine are read and written")
    assert tree(tmp_path) == before


def test_nothing_is_no_path(tmp_path, monkeypatch):
    """Of every verb: an empty argument or option is refused, and never taken for the current directory."""
    monkeypatch.chdir(tmp_path)
    for command in typer.main.get_command(loftq.cli.app).commands.values():
        for parameter in command.params:
            if parameter.name in ("prompt", "system") or getattr(parameter, "is_flag", False):
                continue
            flags = [parameter.opts[0]] if parameter.opts[0].startswith("--") else []
            for nothing in ("", " "):
                with pytest.raises(UsageError, match="wanted a value, got an empty text"):
                    command.main([*flags, nothing], standalone_mode=False)
    source, recipe = tiny_source(tmp_path / "source"), tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=source, output=tmp_path / "run", data=tmp_path))
    for key in ("output", "model", "data"):
        refused(cli("train", recipe, f"{key}=' '"), 2, "got an empty text")
    refused(cli("quantize", source, "--output="), 2, "--output: wanted a value, got an empty text")
    assert {p.name for p in tmp_path.iterdir()} == {"source", "recipe.yaml"}


@pytest.mark.parametrize("command", ["quantize {source} -o {name}", "start {source} --weights {source} -o {name}"])
def test_a_name_that_no_directory_can_have_is_refused(tmp_path, monkeypatch, command):
    """Too long as it is, or with what is made beside it while the work goes on."""
    monkeypatch.chdir(tmp_path)
    source = tiny_source(tmp_path / "source")
    for name in ("x" * 300, "x" * 250, "a/" * 3000 + "b"):
        refused(cli(*command.format(source=source, name=name).split()), 2, "the name is too long for this file system")


def test_a_plan_says_what_takes_long(tmp_path):
    """Time that grows as out * in², as measured in docs/methods.md."""
    source = tiny_source(tmp_path / "source")
    told = [cli("plan", source, "--rank", "4", "--preset", preset).out for preset in ("fitted", "descent")]
    assert ["time grows as out·in²" in text for text in told] == [False, True]
    assert re.search(r"descent takes about [\d.]+ seconds of CPU time, of that [\d.]+ seconds for the", told[1])
