"""Signals: a run that is told to stop says how to go on, one that is killed says nothing, both continue."""

import os
import signal
import time

import pytest
import torch
import tqdm.auto
import transformers

from harness import Child, cli, refused, start_cli, tree
from models import BERT

pytestmark = pytest.mark.slow

PARTIAL = "out.loftq-partial"


@pytest.fixture
def output(tmp_path):
    (tmp_path / "place").mkdir()
    return tmp_path / "place" / "out"


SLOW = ("--bits", "2", "--rank", "8", "--max-shard-size", "100KB", "--workers", "2", "--svd", "exact")


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """Source, what a run that nobody disturbs makes of it, and how long one takes when nothing is left to compile."""
    root = tmp_path_factory.mktemp("signals")
    source = root / "slow"
    torch.manual_seed(0)
    sizes = {**BERT, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(source)
    first, second = (cli("quantize", source, "-o", root / name, *SLOW) for name in ("out", "again"))
    assert first.code == second.code == 0, first.err + second.err
    return source, tree(root / "out"), second.seconds


def same_but_for_the_place(found, golden):
    return {n for n in golden if found.get(n) != golden[n]} <= {
        "loftq_init/adapter_config.json",
        "loftq_manifest.json",
        "README.md",
    } and set(found) == set(golden)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_a_run_that_then_continues(slow, output, number):
    source, golden, seconds = slow
    child = start_cli("quantize", source, "-o", output, *SLOW)
    while not (output.parent / PARTIAL).exists() and not child.has_ended():
        time.sleep(0.005)
    sent = time.monotonic()
    ended = child.kill(number).ended()
    assert time.monotonic() - sent < 5 + seconds
    line = refused(ended, 75, "run the same command again")
    assert line.startswith("loftq: error[stopped]")
    assert not output.exists()
    assert cli("quantize", source, "-o", output, *SLOW).code == 0
    assert same_but_for_the_place(tree(output), golden)
    assert set(os.listdir(output.parent)) == {"out"}


def test_a_signal_that_is_ignored_stays_so(slow, output):
    """As under nohup."""
    source, golden, seconds = slow
    child = start_cli(
        "quantize", source, "-o", output, *SLOW, setup=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    )
    time.sleep(0.5 * seconds)
    assert child.kill(signal.SIGHUP).ended().code == 0
    assert same_but_for_the_place(tree(output), golden)


def test_sigkill_at_random_times(slow, output):
    """Six kills, spread over the length of a run, then the end: the same bytes."""
    source, golden, seconds = slow
    kills = 0
    for tenth in (3, 5, 7, 2, 8, 4):
        child = start_cli("quantize", source, "-o", output, *SLOW)
        time.sleep(tenth / 10 * seconds)
        kills += child.kill(signal.SIGKILL).ended().code == -signal.SIGKILL
        assert set(os.listdir(output.parent)) <= {"out", PARTIAL}
        if output.exists():
            assert same_but_for_the_place(tree(output), golden)
    assert kills
    assert cli("quantize", source, "-o", output, *SLOW).code == 0
    assert same_but_for_the_place(tree(output), golden)
    assert set(os.listdir(output.parent)) == {"out"}


def test_a_child_killed_in_its_progress_bar(slow, output):
    """The harness itself: what one child held when it died, the next can take."""
    source, golden, _ = slow

    def work():
        tqdm.auto.tqdm.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    assert Child(work).ended().code == -signal.SIGKILL
    assert cli("quantize", source, "-o", output, *SLOW).code == 0
    assert same_but_for_the_place(tree(output), golden)
