"""Units made by a real Ray cluster, two nodes of processes on this machine; a node may die, and so may the driver."""

import dataclasses
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import FLAGS, POLICY, cli, refused, run, tiny_source, tree
from loftq.errors import StorageError, UsageError

# what Ray has to say of itself is no matter of ours
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(900)]
ray = pytest.importorskip("ray", reason="needs Ray: pip install 'loftq[ray]'")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_source(tmp_path_factory.mktemp("cluster") / "source")


@pytest.fixture(scope="module")
def golden(source):
    run(source, source.parent / "alone")
    return tree(source.parent / "alone")


@pytest.fixture
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        yield nodes
    finally:
        ray.shutdown()
        nodes.shutdown()


def wait_for_units(output: Path, count: int, within: float = 400) -> None:
    until = time.monotonic() + within
    while len(list(output.parent.glob(f"{output.name}.loftq-partial/units/?????.json"))) < count:
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_node_and_a_driver_are_lost(cluster, source, golden, tmp_path):
    """The bytes are those of one process: of a budget with a node killed; with a driver killed that is begun again."""
    second = cluster.add_node(num_cpus=1)

    def kill() -> None:
        wait_for_units(tmp_path / "node", 2)
        cluster.remove_node(second, allow_graceful=False)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    counts: list[Any] = []
    budget = dataclasses.replace(POLICY, bits="4", budget="3.5")
    run(source, tmp_path / "alone", policy=budget)
    begin = lambda *given: counts.append(given) or counts.append  # noqa: E731
    run(source, tmp_path / "node", begin, policy=budget, cluster=cluster.address)
    killer.join()
    assert tree(tmp_path / "node") == tree(tmp_path / "alone")
    assert counts == [(12, 0), *[{"measured": ""}] * 12, (12, 0), *[{}] * 12]

    command = [sys.executable, "-m", "loftq", "quantize", str(source), "-o", str(tmp_path / "driver"), *FLAGS]
    driver = subprocess.Popen([*command, "--cluster", cluster.address], stderr=subprocess.DEVNULL)
    wait_for_units(tmp_path / "driver", 2)
    driver.kill()
    driver.wait()
    run(source, tmp_path / "driver", cluster=cluster.address)
    assert tree(tmp_path / "driver") == golden
    assert {path.name for path in tmp_path.iterdir()} == {"alone", "node", "driver"}


def test_addresses_that_do_not_answer(source, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UsageError, match="neither auto nor an address"):
        run(source, tmp_path / "out", cluster="everywhere")
    with pytest.raises(StorageError, match="no Ray cluster answers"):
        run(source, tmp_path / "out", cluster="auto")
    ended = cli("quantize", source, "-o", tmp_path / "out", *FLAGS, "--cluster", "everywhere")
    refused(ended, 2, "--cluster", "ray://HOST:10001")
