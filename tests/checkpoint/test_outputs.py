"""What may stand where the output goes, who else may be working on it, and what a continued run accepts."""

import dataclasses
import errno
import fcntl
import itertools
import json
import os
import resource
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from harness import (
    FLAGS,
    POLICY,
    Child,
    cli,
    hooked,
    refused,
    run,
    start_cli,
    tiny_source,
    tree,
    unprivileged,
)
from loftq.checkpoint import quantize as module
from loftq.errors import ConflictError, InputError, StorageError, UsageError

pytestmark = pytest.mark.usefixtures("quick")

PARTIAL = "out.loftq-partial"
OTHER = dataclasses.replace(POLICY, bits="4")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return tiny_source(tmp_path_factory.mktemp("outputs") / "source")


@pytest.fixture
def source(original, tmp_path):
    """A copy that a test may change."""
    return Path(shutil.copytree(original, tmp_path / "source"))


@pytest.fixture
def output(tmp_path):
    (tmp_path / "place").mkdir()
    return tmp_path / "place" / "out"


def interrupted(source, output, shards=4, **changes):
    """A run that ends when ``shards`` shards are done."""
    made = []

    def stop(op, path):
        made.append(op == "rename" and path.parent.name == "units" and path.suffix == ".json")
        if sum(made) > shards:
            raise KeyboardInterrupt

    with hooked(stop), pytest.raises(KeyboardInterrupt):
        run(source, output, **changes)
    assert len(list((output.parent / PARTIAL / "units").glob("*.json"))) == shards


def solved(monkeypatch):
    """Names of the matrices that are solved from now on."""
    names, solve = [], module.solve_matrix

    def counted(matrix, *rest):
        names.append(matrix.name)
        return solve(matrix, *rest)

    monkeypatch.setattr(module, "solve_matrix", counted)
    return names


def stopped(source, output, matrices, **changes):
    """A run that ends when so many matrices are done, all of one shard."""
    made = []

    def stop(op, path):
        made.append(op == "rename" and path.parent.parent.name == "units")
        if sum(made) > matrices:
            raise KeyboardInterrupt

    with hooked(stop), pytest.raises(KeyboardInterrupt):
        run(source, output, max_shard_bytes=10**9, **changes)
    assert not list((output.parent / PARTIAL / "units").glob("*.json"))


# What stands there


def test_a_file_at_the_output_is_left_alone(source, output):
    output.write_text("mine")
    refused(cli("quantize", source, "-o", output, *FLAGS), 5, "not a directory", "--output")
    refused(cli("quantize", source, "-o", output, *FLAGS, "--overwrite"), 5)
    assert tree(output.parent) == {"out": b"mine"}


@pytest.mark.parametrize("flags", [(), ("--overwrite",)])
def test_a_directory_that_is_not_ours(source, output, flags):
    output.mkdir()
    (output / "thesis.txt").write_text("mine")
    refused(cli("quantize", source, "-o", output, *FLAGS, *flags), 5, "loftq did not make")
    assert tree(output.parent) == {"out/thesis.txt": b"mine"}


def test_an_empty_directory_is_fine(source, output):
    output.mkdir()
    assert cli("quantize", source, "-o", output, *FLAGS).code == 0
    assert set(os.listdir(output.parent)) == {"out"}
    assert (output / "loftq_manifest.json").exists()


def test_a_complete_output_of_the_same_command(source, output):
    first = cli("quantize", source, "-o", output, *FLAGS)
    before, times = tree(output), {p: p.stat().st_mtime_ns for p in output.rglob("*")}
    again = cli("quantize", source, "-o", output, *FLAGS)
    assert first.code == again.code == 0
    assert ["already done" in ended.out for ended in (first, again)] == [False, True]
    assert f"`loftq verify {output}` checks their bytes" in again.out
    assert tree(output) == before
    assert {p: p.stat().st_mtime_ns for p in output.rglob("*")} == times
    assert set(os.listdir(output.parent)) == {"out"}


def test_an_output_of_other_options(source, output):
    run(source, output, policy=OTHER)
    before = tree(output)
    line = refused(cli("quantize", source, "-o", output, *FLAGS), 5, "--overwrite")
    assert "options.bits: 4 -> 2" in line
    assert "steps" not in line
    assert tree(output) == before


def test_overwrite(source, output):
    run(source, output, policy=OTHER)
    old, seen = tree(output), []
    with hooked(lambda op, path: seen.append(tree(output) if output.exists() else None)):
        run(source, output, overwrite=True)
    new = tree(output)
    assert [state for state, _ in itertools.groupby(seen)] == [old, None, new]
    assert json.loads((output / "loftq_manifest.json").read_text())["identity"]["options"]["bits"] == "2"
    assert set(os.listdir(output.parent)) == {"out"}


def test_overwrite_that_fails_keeps_the_old(source, output):
    run(source, output, policy=OTHER)
    old = tree(output)

    fails = [errno.EIO]

    def fail(op, path):
        if op == "rename" and path == output and fails:
            raise OSError(fails.pop(), "Input/output error")

    with hooked(fail), pytest.raises(StorageError):
        run(source, output, overwrite=True)
    assert tree(output) == old


@pytest.mark.sampled(3)
@pytest.mark.parametrize("damage", ["shard gone", "shard cut", "manifest edited"])
def test_a_damaged_output_is_not_taken_for_done(source, output, damage):
    run(source, output)
    good = tree(output)
    shard, manifest = next(output.glob("model-*")), output / "loftq_manifest.json"
    if damage == "shard gone":
        shard.unlink()
    elif damage == "shard cut":
        os.truncate(shard, shard.stat().st_size - 1)
    else:
        manifest.write_text(manifest.read_text().replace('"kept": 2', '"kept": 1'))
    refused(cli("quantize", source, "-o", output, *FLAGS), 5, "damaged", "--overwrite")
    assert cli("quantize", source, "-o", output, *FLAGS, "--overwrite").code == 0
    assert tree(output) == good


@pytest.mark.parametrize("name", ["model.safetensors", "loftq_init/adapter_model.bin"])
def test_a_file_that_a_loader_may_take_was_added(source, output, name):
    run(source, output)
    for note in ("notes.md", "mine/rows.jsonl", "checkpoint-3/model.safetensors"):  # these harm nobody
        (output / note).parent.mkdir(exist_ok=True)
        (output / note).write_text("mine")
    assert "already done" in cli("quantize", source, "-o", output, *FLAGS).out
    (output / name).write_text("mine")
    for flags in ((), ("--overwrite",)):
        refused(cli("quantize", source, "-o", output, *FLAGS, *flags), 5, f"since then {name} was added", "move that")
    assert (output / name).read_text() == "mine"


# Where it stands


@pytest.mark.sampled(3)
@pytest.mark.parametrize("where", ["itself", "inside", "parent", "link to it", "link inside", "its workspace"])
def test_output_and_source_must_not_touch(source, tmp_path, where):
    (tmp_path / "link").symlink_to(source)
    output = {
        "itself": source,
        "inside": source / "sub" / "out",
        "parent": tmp_path,
        "link to it": tmp_path / "link",
        "link inside": tmp_path / "link" / "out",
        "its workspace": tmp_path / "out",
    }[where]
    if where == "its workspace":
        source = source.rename(tmp_path / PARTIAL)
    before = tree(tmp_path)
    refused(cli("quantize", source, "-o", output, *FLAGS), 2, "the source", "--output")
    assert tree(tmp_path) == before


def test_a_source_behind_a_link_counts_too(source, tmp_path):
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(UsageError, match="lies in the source"):
        run(tmp_path / "link", source / "out")


def test_an_output_behind_a_link(source, output, tmp_path):
    """The link stays, and leads to the result."""
    (tmp_path / "link").symlink_to(output)
    run(source, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (output / "loftq_manifest.json").exists()


def test_a_link_that_leads_to_itself(source, output):
    output.symlink_to(output)
    refused(cli("quantize", source, "-o", output, *FLAGS), 2, "--output", "a link that leads to itself")
    refused(cli("status", output), 3, "no output of loftq")
    assert os.listdir(output.parent) == ["out"]


def test_missing_parents_are_made(source, output):
    run(source, output / "deep" / "er")
    assert (output / "deep" / "er" / "loftq_manifest.json").exists()


def test_a_name_that_is_too_long(source, output):
    refused(cli("quantize", source, "-o", output.parent / ("n" * 250), *FLAGS), 2, "--output", "the name is too long")


def test_a_name_that_is_not_utf8(source, output):
    """Files name it, and safetensors cannot."""
    for name in (os.fsdecode(b"caf\xe9"), os.fsdecode(b"caf\xe9/out")):
        with pytest.raises(UsageError, match=r"caf.*: the name is not UTF-8; rename"):
            run(source, output.parent / name)
    moved = source.rename(source.parent / os.fsdecode(b"caf\xe9"))
    with pytest.raises(UsageError, match=r"MODEL .*: the name is not UTF-8; rename"):
        run(moved, output)
    assert os.listdir(output.parent) == []


def test_a_file_where_a_parent_should_be(source, output):
    output.write_text("mine")
    refused(cli("quantize", source, "-o", output / "x", *FLAGS), 4, "choose another --output")


def test_a_parent_that_is_not_writable(source, output):
    output.parent.chmod(0o555)
    refused(cli("quantize", source, "-o", output, *FLAGS, setup=unprivileged), 4, "not writable", "--output")
    assert tree(output.parent) == {}


def test_a_source_that_may_not_be_read(source, output):
    (source / "model.safetensors").chmod(0)
    ended = cli("quantize", source, "-o", output, *FLAGS, setup=unprivileged)
    refused(ended, 4, "model.safetensors", "permission")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a small tmpfs here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_too_small(source, small_disk, output):
    """Refused before the work; and when others fill it meanwhile, the run continues once there is room."""
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(1_000_000))
    refused(cli("quantize", source, "-o", small_disk / "out", *FLAGS), 4, "no space", "needs about", "KB are free")
    ballast.unlink()

    def fill(op, path):
        if op == "create" and "00003-of" in path.name:
            free = os.statvfs(small_disk)
            ballast.write_bytes(bytes(free.f_bavail * free.f_bsize))

    with hooked(fill), pytest.raises(StorageError, match=r"no space left .*free some space and run the same command"):
        run(source, small_disk / "out")
    assert not (small_disk / "out").exists()
    ballast.unlink()
    run(source, small_disk / "out")
    run(source, output)
    assert tree(small_disk / "out") == tree(output)


def test_a_mount_point(source, small_disk):
    refused(cli("quantize", source, "-o", small_disk, *FLAGS), 2, "mount point")


def test_a_limit_on_file_sizes(source, output):
    ended = cli(
        "quantize", source, "-o", output, *FLAGS, setup=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9000,) * 2)
    )
    refused(ended, 4, "ulimit -f")
    assert not output.exists()


# Two processes


def test_two_processes_on_one_output(source, output):
    """While the first works the second says who does; the first is not disturbed."""

    def wait(op, path):
        if op == "create" and "00002-of" in path.name:
            while not (output.parent / "go").exists():
                time.sleep(0.005)

    def slow():
        with hooked(wait):
            run(source, output)

    first = Child(slow)
    while not (output.parent / PARTIAL / "units" / "00000.json").exists():
        time.sleep(0.005)
    refused(cli("quantize", source, "-o", output, *FLAGS), 5, f"in use by process {first.pid} on")
    (output.parent / "go").touch()
    assert first.ended().code == 0
    assert cli("quantize", source, "-o", output, *FLAGS).code == 0
    assert cli("verify", output).code == 0


def test_a_lock_left_by_a_dead_process(source, output):
    (output.parent / PARTIAL).mkdir()
    (output.parent / PARTIAL / "lock").write_text('{"pid": 1, "host": "elsewhere"}')
    run(source, output)
    assert set(os.listdir(output.parent)) == {"out"}


@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [False, True], ids=["", "overwrite"])
@pytest.mark.parametrize("lead", [0, 20, 60, 120])
def test_two_processes_where_locks_only_pretend(source, output, lead, overwrite, tmp_path):
    """Both may end well, or one with an error of its own; one complete result stands in any case."""
    run(source, tmp_path / "golden" / "out")
    if overwrite:
        run(source, output, policy=OTHER)

    def no_lock():
        fcntl.flock = lambda *_: None

    flags = [*FLAGS, "--overwrite"] if overwrite else FLAGS
    first = start_cli("quantize", source, "-o", output, *flags, setup=no_lock)
    time.sleep(lead / 1000)
    second = start_cli("quantize", source, "-o", output, *flags, setup=no_lock)
    ends = [first.ended(), second.ended()]
    assert 0 in [e.code for e in ends], ends
    assert {e.code for e in ends} <= {0, 3, 4, 5}, ends
    assert cli("verify", output).code == 0
    stored = {n: raw for n, raw in tree(output).items() if n.startswith(("model", "loftq_init/adapter_model"))}
    wanted = tree(tmp_path / "golden" / "out")
    assert {n for n in wanted if n.startswith(("model", "loftq_init/adapter_model"))} == set(stored)
    assert all(wanted[n] == raw for n, raw in stored.items())


def test_a_finished_command_leaves_the_work_of_another_alone(source, output):
    """Asked again for what is done, it must not clean away what was begun with other options."""
    run(source, output)
    interrupted(source, output, policy=OTHER, overwrite=True)
    before = tree(output.parent)
    run(source, output)
    assert tree(output.parent) == before


# Continuing


def test_changed_options(source, output):
    interrupted(source, output, policy=OTHER)
    before = {n: raw for n, raw in tree(output.parent).items() if not n.endswith("lock")}
    line = refused(cli("quantize", source, "-o", output, *FLAGS), 5, "unfinished work of another command")
    assert "options.bits: 4 -> 2" in line
    assert tree(output.parent) == before


def change_weights(source):
    weights = load_file(source / "model.safetensors")
    weights["encoder.layer.1.output.dense.weight"] += 1
    save_file(weights, source / "model.safetensors", {"format": "pt"})


def change_config(source):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-6}))


def change_vocabulary(source):
    (source / "vocab.txt").write_text("[PAD]\nother\n")


CHANGES = {
    change_weights: "source.model.safetensors.mtime_ns",
    change_config: "source.config.json",
    change_vocabulary: "source.vocab.txt",
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_source(source, output, change):
    interrupted(source, output)
    change(source)
    line = refused(cli("quantize", source, "-o", output, *FLAGS), 5, "unfinished work", CHANGES[change])
    assert "options" not in line
    shutil.rmtree(output.parent / PARTIAL)
    assert cli("quantize", source, "-o", output, *FLAGS).code == 0


def test_a_newer_version(source, output, monkeypatch):
    interrupted(source, output)
    monkeypatch.setattr(module, "__version__", "9.9")
    with pytest.raises(ConflictError, match=r"loftq: .* -> 9\.9"):
        run(source, output)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("when", ["model-00001", "adapter_config", "README"])
def test_the_source_changes_while_it_is_read(source, output, change, when):
    def hook(op, path):
        if op == "create" and when in path.name:
            change(source)

    with hooked(hook), pytest.raises(InputError, match=r"source changed while reading .*begins anew"):
        run(source, output)
    assert os.listdir(output.parent) == []
    assert cli("quantize", source, "-o", output, *FLAGS).code == 0


@pytest.mark.sampled(3)
@pytest.mark.parametrize("length", [0, 100, 30_000])
def test_the_source_is_cut_while_it_is_read(source, output, length):
    def cut(op, path):
        if op == "create" and "model-00002" in path.name:
            os.truncate(source / "model.safetensors", length)

    def work():
        with hooked(cut), pytest.raises(InputError, match=r"source changed while reading|model\.safetensors"):
            run(source, output)

    assert Child(work).ended().code == 0  # in a child: reading by mmap would end it with SIGBUS
    assert not output.exists()


# A workspace that was touched


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def torn(path):
    path.write_bytes(path.read_bytes()[:-40])


def zeroed(path):
    path.write_bytes(bytes(path.stat().st_size))


def sound_but_different(path):
    path.write_text(path.read_text().replace('"kept": 2', '"kept": 1').replace('"rank": 4', '"rank": 5'))


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("output/model-00003-of-00007.safetensors", flip),
        ("output/model-00003-of-00007.safetensors", torn),
        ("output/model-00003-of-00007.safetensors", Path.unlink),
        ("units/00002.safetensors", flip),
        ("units/00002.safetensors", Path.unlink),
        ("units/00002.json", flip),
        ("units/00002.json", torn),
        ("units/00002.json", zeroed),
        ("units/00002.json", Path.unlink),
        ("units/00002.json", sound_but_different),
    ],
)
def test_a_damaged_unit_is_made_again(source, output, file, damage, monkeypatch, caplog, tmp_path):
    run(source, output)
    golden = tree(output)
    shutil.rmtree(output)
    interrupted(source, output, shards=5)  # first those without matrices, then 00002 and 00003
    records = [json.loads(f.read_text()) for f in sorted((output.parent / PARTIAL / "units").glob("*.json"))]
    names = solved(monkeypatch)
    damage(output.parent / PARTIAL / file)
    run(source, output)
    damaged, whole = ({m["name"] for m in records[i]["matrices"]} for i in (2, 3))
    assert len(damaged) == len(whole) == 3
    assert damaged <= set(names)
    assert not whole & set(names)
    assert tree(output) == golden
    assert ("it is made again" in caplog.text) == (damage is not Path.unlink or "json" not in file)


def test_strangers_in_the_workspace_are_not_published(source, output):
    interrupted(source, output)
    (output.parent / PARTIAL / "output" / "notes.txt").write_text("?")
    (output.parent / PARTIAL / "output" / "pytorch_model.bin").write_text("?")
    run(source, output)
    assert not {"notes.txt", "pytorch_model.bin"} & set(os.listdir(output))
    assert cli("verify", output).code == 0


def test_a_workspace_that_was_moved(source, output, tmp_path, monkeypatch):
    interrupted(source, output)
    (output.parent / PARTIAL).rename(tmp_path / "new.loftq-partial")
    names = solved(monkeypatch)
    run(source, tmp_path / "new")
    assert 0 < len(names) < 12
    assert cli("verify", tmp_path / "new").code == 0


def test_a_workspace_that_is_a_file(source, output):
    (output.parent / PARTIAL).write_text("?")
    refused(cli("quantize", source, "-o", output, *FLAGS), 4, PARTIAL)


# A shard that is not finished


@pytest.mark.sampled(3)
@pytest.mark.parametrize("options", [{}, {"format": "dense"}, {"workers": 3}], ids=str)
def test_matrices_of_an_unfinished_shard_are_kept(source, output, monkeypatch, options):
    """As many as were done, whatever the size of a shard; the bytes are those of a run that was not stopped."""
    run(source, output, max_shard_bytes=10**9, **options)
    golden = tree(output)
    shutil.rmtree(output)
    stopped(source, output, 7, **options)
    begun, names = [], solved(monkeypatch)
    run(source, output, max_shard_bytes=10**9, **options, begin=lambda *counts: begun.append(counts) or names.count)
    assert begun == [(12, 7)]
    assert len(set(names)) == 5  # threads of the stopped run may still be at some of these
    assert tree(output) == golden


def test_a_resumed_run_says_what_it_keeps(source, output):
    stopped(source, output, 7)
    ended = cli("quantize", source, "-o", output, *FLAGS[:-4], "--workers", "1")
    assert ended.code == 0, ended.err
    assert "LoftQ: 7 of 12 matrices are kept from an earlier run\n" in ended.err


def test_a_damaged_matrix_is_solved_again(source, output, monkeypatch, caplog):
    """Any byte of its file may have changed, or the end be missing."""
    stopped(source, output, 7)
    pieces = sorted((output.parent / PARTIAL / "units" / "00000").glob("?????.safetensors"))
    for piece, at in zip(pieces[:3], (40, -1, 700), strict=True):
        raw = bytearray(piece.read_bytes())
        raw[at] ^= 1
        piece.write_bytes(raw)
    pieces[3].write_bytes(pieces[3].read_bytes()[:-1])
    pieces[4].write_bytes(pieces[5].read_bytes())
    names = solved(monkeypatch)
    run(source, output, max_shard_bytes=10**9)
    assert len(names) == 12 - 2
    assert caplog.text.count("is solved again") == 5
    assert cli("verify", output).code == 0


def test_single_matrices_go_when_their_shard_is_there(source, output):
    """What the workspace holds is bounded: the matrices of no finished shard."""
    seen = []

    def watch(op, path):
        if op == "rename" and path.parent.parent.name == "units":
            units = path.parent.parent
            seen.append({p.name for p in units.iterdir() if p.is_dir() and (units / f"{p.name}.json").exists()})

    with hooked(watch):
        run(source, output)
    assert len(seen) == 12
    assert set().union(*seen) == set()


# Another machine


def other_machine(monkeypatch):
    monkeypatch.setattr(module, "code_path", lambda device: {"cpu": "ABACUS", "arithmetic": "by hand"})


def test_work_of_another_machine_is_not_continued(source, output, monkeypatch):
    stopped(source, output, 7)
    before = tree(output.parent)
    other_machine(monkeypatch)
    match = (
        r"begun by this command on another machine \(machine.arithmetic: \w+ -> by hand, machine.cpu: .* -> ABACUS\)"
    )
    with pytest.raises(ConflictError, match=match + ".*delete the directory"):
        run(source, output, max_shard_bytes=10**9)
    before.pop(f"{PARTIAL}/lock", None)
    assert tree(output.parent) == before


def test_a_result_of_another_machine_is_done(source, output, monkeypatch):
    """It is one result, all made there; the manifest says where."""
    first = run(source, output)
    other_machine(monkeypatch)
    names = solved(monkeypatch)
    assert run(source, output) == first
    assert run(source, output, overwrite=True) == first
    assert names == []
    assert first["identity"]["machine"]["cpu"] != "ABACUS"
