"""Equal options give equal bytes, whatever the machine is doing meanwhile."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from harness import FLAGS, Child, run, tiny_source, tree
from models import BERT

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick")]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_source(tmp_path_factory.mktemp("determinism") / "source")


def made(source, output, **changes):
    """The files of a run at ``output``, which is cleared for the next one."""
    run(source, output, **changes)
    files = tree(output)
    output.rename(output.with_name(f"{len(os.listdir(output.parent))}"))
    return files


def stored(directory):
    """Every tensor, of the backbone and of the adapter, as bytes."""
    files = [*directory.glob("*.safetensors"), *directory.glob("*/*.safetensors")]
    return {n: t.view(torch.uint8).numpy().tobytes() for f in files for n, t in load_file(f).items() if t.numel()}


def test_any_number_of_workers_writes_the_same_bytes(source, tmp_path):
    first = made(source, tmp_path / "out", workers=1)
    assert all(made(source, tmp_path / "out", workers=n) == first for n in (1, 2, 4, 0))


def test_size_of_shards(source, tmp_path):
    run(source, tmp_path / "a")
    run(source, tmp_path / "b", max_shard_bytes=1 << 30)
    run(source, tmp_path / "c", max_shard_bytes=1)
    files = [len(list((tmp_path / name).glob("*.safetensors"))) for name in "abc"]
    assert files == [7, 1, len(load_file(source / "model.safetensors"))]
    assert stored(tmp_path / "a") == stored(tmp_path / "b") == stored(tmp_path / "c")


def test_threads_of_lapack(tmp_path):
    """Matrices of 256 and more, where LAPACK's bits depend on its threads."""
    torch.manual_seed(0)
    sizes = {**BERT, "vocab_size": 16, "hidden_size": 288, "intermediate_size": 260, "num_hidden_layers": 1}
    BertModel(BertConfig(**sizes)).save_pretrained(tmp_path / "source")
    before = torch.get_num_threads()
    seen = []
    for threads in (1, 4):
        torch.set_num_threads(threads)
        try:
            seen.append(made(tmp_path / "source", tmp_path / "out", workers=threads))
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_umask(source, tmp_path, mask):
    """Only modes depend on it."""
    first = made(source, tmp_path / "out")
    before = os.umask(mask)
    try:
        assert made(source, tmp_path / "out") == first
    finally:
        os.umask(before)
    for path in (tmp_path / "2").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask


def test_global_random_state(source, tmp_path):
    first = made(source, tmp_path / "out")
    torch.manual_seed(99)
    torch.rand(3)
    assert made(source, tmp_path / "out") == first


def test_another_environment_writes_the_same_bytes(source, tmp_path):
    """Another process: other hash seed, locale, time zone, no home, no terminal."""
    first = made(source, tmp_path / "out")
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join(
            filter(None, [os.environ.get("PYTHONPATH"), str(Path(__file__).parents[2] / "src")])
        ),
        "PYTHONHASHSEED": "7",
        "PYTHONUTF8": "0",
        "LC_ALL": "C",
        "TZ": "Pacific/Chatham",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "loftq", "quantize", str(source), "-o", str(tmp_path / "out"), *FLAGS]
    ended = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=120)
    assert ended.returncode == 0, ended.stderr.decode()
    assert tree(tmp_path / "out") == first


def test_no_file_depends_on_paths(source, tmp_path, monkeypatch):
    """Neither the output's path and name nor the source's are in any file."""
    first = made(source, tmp_path / "out")
    (tmp_path / "elsewhere").symlink_to(source)
    monkeypatch.chdir(tmp_path)
    assert made(Path("elsewhere"), tmp_path / "deep" / "other name") == first
    for raw in first.values():
        assert not any(str(place).encode() in raw for place in (tmp_path, source, Path.home()))


def test_a_fork_changes_nothing(source, tmp_path):
    """What all the other tests in forked children rest on."""
    first = made(source, tmp_path / "out")
    assert Child(lambda: run(source, tmp_path / "out") and 0).ended().code == 0
    assert tree(tmp_path / "out") == first
