"""How long would a large checkpoint take on many workers: shard sizes, a slow node, lost nodes, bandwidth of storage?

A simulation of `loftq quantize --shared`, matrix by matrix: who takes which unit, who helps, who closes it, and when a
lost node is taken for dead. A node is a process with 16 workers of one CPU each. What a matrix costs is the measured
law of `loftq.solver.cost`; sizes are the models' own shapes at 2 bits, rank 64, with an adapter in bfloat16. All nodes
share the bandwidth of one storage, for reading sources and for writing twice what is made. Planning, listing and
claiming cost nothing here. Nothing of this was run on many machines.

    python benchmarks/simulate.py     # docs/data/simulate.json, and the table in docs/how-to/several-machines.md
"""

import argparse
import heapq
import json
import math
import random
import re
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from harness import ROOT, environment
from loftq.checkpoint.claims import STALE
from loftq.solver import seconds
from loftq.spec import PRESETS, SolveSpec

PRESET, RANK, BITS = "fitted", 64, 2.25
WORKERS = 16  # of a node
SPEED = 0.3  # of a slow node
STORAGE = (10.0, 2.0)  # GB/s of all nodes together
COLUMNS = 3 + len(STORAGE)  # of a model, a number of workers and a size of shards
PAGE = ROOT / "docs" / "how-to" / "several-machines.md"
Shape = tuple[int, int]


def llama(layers: int, hidden: int, mlp: int, keys: int) -> list[Shape]:
    layer = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]
    return [*layer, (mlp, hidden), (mlp, hidden), (hidden, mlp)] * layers


def deepseek() -> list[Shape]:
    """V3 and R1: 61 layers, the first 3 dense, the others with 256 experts and a shared one."""
    attention = [(1536, 7168), (24576, 1536), (576, 7168), (32768, 512), (7168, 16384)]
    expert = [(2048, 7168), (2048, 7168), (7168, 2048)]
    dense = [(18432, 7168), (18432, 7168), (7168, 18432)]
    return (attention + dense) * 3 + (attention + expert * 257) * 58


MODELS = {
    "70B": llama(80, 8192, 28672, 1024),
    "405B": llama(126, 16384, 53248, 1024),
    "671B": deepseek(),
}


@dataclass(frozen=True)
class Case:
    """One row: a model, workers, bytes of a shard, and what goes wrong.

    Attributes:
        slow: nodes at ``SPEED`` of the others' speed.
        lost: nodes that die in the middle of the time that it takes without.
        gigabytes: that all nodes together read or write in a second; infinite if storage is no limit.
    """

    model: str
    workers: int
    shard: int
    slow: int = 0
    lost: int = 0
    gigabytes: float = math.inf


@dataclass
class Unit:
    items: list[int]
    owner: int = -1
    done: set[int] = field(default_factory=set)
    helped: dict[int, int] = field(default_factory=dict)  # item -> the node that has claimed it
    closed: bool = False


@dataclass
class Node:
    """A process: what it has begun, and what runs or waits for a worker."""

    speed: float
    order: list[int]  # of units, to take
    seek: list[int]  # the same, to help
    mine: list[int] = field(default_factory=list)
    begun: set[int] = field(default_factory=set)
    queue: list[int] = field(default_factory=list)
    running: int = 0
    lost_at: float = math.inf


class Simulation:
    """The protocol of ``loftq.checkpoint.team``, in simulated time."""

    def __init__(self, case: Case, seed: int, lose_at: float = math.inf) -> None:
        shapes = MODELS[case.model]
        self.case, spec = case, SolveSpec(**PRESETS[PRESET])
        self.cost = [seconds(*shape, spec) for shape in shapes]
        self.read = [2 * m * n for m, n in shapes]
        self.made = self.sizes(case.model)
        self.units = list(_units(self.made, case.shard))
        self.unit_of = {item: u for u, unit in enumerate(self.units) for item in unit.items}
        chance = random.Random(seed)
        count = case.workers // WORKERS
        orders = [self._order(chance) for _ in range(count)]
        self.nodes = [Node(1.0, order, list(order)) for order in orders]
        picked = chance.sample(range(count), case.slow + case.lost)
        for n in picked[: case.slow]:
            self.nodes[n].speed = SPEED
        for n in picked[case.slow :]:
            self.nodes[n].lost_at = lose_at
        self.events: list[tuple[float, int, str, int, int]] = []
        self.serial = iter(range(1 << 62))
        self.busy = 0

    @staticmethod
    def sizes(model: str) -> list[float]:
        """Bytes that are made of every matrix."""
        return [m * n * BITS / 8 + 2 * RANK * (m + n) for m, n in MODELS[model]]

    def _order(self, chance: random.Random) -> list[int]:
        """As ``team.in_order``: the dearest first, by powers of two, and within one by chance."""
        costs = [sum(self.cost[i] for i in unit.items) for unit in self.units]
        return sorted(range(len(self.units)), key=lambda u: (-round(costs[u]).bit_length(), chance.random()))

    def run(self) -> float:
        """Seconds until the last unit is closed."""
        left = len(self.units)
        for n, node in enumerate(self.nodes):
            self._fill(0.0, n)
            if node.lost_at < math.inf:
                self._at(node.lost_at, "lost", n)
        while left:
            now, _, what, n, item = heapq.heappop(self.events)
            node = self.nodes[n]
            if what == "lost":
                self.busy -= node.running
                self._at(now + STALE, "stale", n)
            elif what == "stale":
                self._take_over(now)
            elif now < node.lost_at:
                if what == "solved":
                    node.running -= 1
                    self.busy -= 1
                    unit = self.units[self.unit_of[item]]
                    unit.done.add(item)
                    if self._whole(unit) and self._alive(unit.owner, now):
                        self._close(now, unit)
                elif not self.units[self.unit_of[item]].closed:
                    self.units[self.unit_of[item]].closed = True
                    left -= 1
                self._fill(now, n)
        return now

    def _at(self, time: float, what: str, node: int, item: int = -1) -> None:
        heapq.heappush(self.events, (time, next(self.serial), what, node, item))

    def _alive(self, node: int, now: float) -> bool:
        return node >= 0 and now < self.nodes[node].lost_at

    def _whole(self, unit: Unit) -> bool:
        return len(unit.done) == len(unit.items) and not unit.closed

    def _moving(self, size: float) -> float:
        """Seconds to read or write, where all that are busy share the storage."""
        return size * max(1, self.busy) / (self.case.gigabytes * 1e9)

    def _fill(self, now: float, n: int) -> None:
        """Begin as much as a process does: twice as many items as it has workers, help only where it is idle."""
        node = self.nodes[n]
        while now < node.lost_at and node.running + len(node.queue) < 2 * WORKERS:
            found = self._own(node, n)
            if found is None:
                found = self._take(node, n, now)
            if found is None and node.running + len(node.queue) < WORKERS:
                found = self._help(node, n)
            if found is None:
                break
            node.begun.add(found)
            node.queue.append(found)
        while now < node.lost_at and node.queue and node.running < WORKERS:
            item = node.queue.pop(0)
            if item in self.units[self.unit_of[item]].done:
                continue
            node.running += 1
            self.busy += 1
            took = self.cost[item] / node.speed + self._moving(self.read[item] + self.made[item])
            self._at(now + took, "solved", n, item)

    def _own(self, node: Node, n: int) -> int | None:
        for u in node.mine:
            unit = self.units[u]
            for item in unit.items:
                if item not in node.begun and item not in unit.done and item not in unit.helped:
                    return item
        return None

    def _take(self, node: Node, n: int, now: float) -> int | None:
        while node.order:
            u = node.order.pop(0)
            if self.units[u].owner < 0:
                self._owns(u, n, now)
                found = self._own(node, n)
                if found is not None:
                    return found
        return None

    def _owns(self, u: int, n: int, now: float) -> None:
        unit, node = self.units[u], self.nodes[n]
        unit.owner = n
        node.mine = [m for m in node.mine if not self.units[m].closed] + [u]
        if self._whole(unit):
            self._close(now, unit)

    def _close(self, now: float, unit: Unit) -> None:
        self._at(now + self._moving(sum(self.made[i] for i in unit.items)), "closed", unit.owner, unit.items[0])

    def _take_over(self, now: float) -> None:
        """Units of the dead get living owners, and what dead helpers had is open again."""
        living = [n for n, node in enumerate(self.nodes) if now < node.lost_at]
        for u, unit in enumerate(self.units):
            unit.helped = {item: n for item, n in unit.helped.items() if self._alive(n, now)}
            if not unit.closed and not self._alive(unit.owner, now):
                self._owns(u, living[u % len(living)], now)
        for n in living:
            self.nodes[n].seek = list(range(len(self.units)))
            self._fill(now, n)

    def _help(self, node: Node, n: int) -> int | None:
        """A matrix of a unit that another has, from the end, that no helper has claimed; or one of its own."""
        node.seek = [u for u in node.seek if len(self.units[u].done) < len(self.units[u].items)]
        for u in node.seek:
            unit = self.units[u]
            for item in unit.items if unit.owner == n else reversed(unit.items):
                free = unit.owner == n or item not in unit.helped
                if free and item not in unit.done and item not in node.begun:
                    if unit.owner != n:
                        unit.helped[item] = n
                    return item
        return None


def _units(made: list[float], shard: int) -> Iterator[Unit]:
    """As ``shards.split``."""
    items, filled = [], 0.0
    for item, size in enumerate(made):
        if items and filled + size > shard:
            yield Unit(items)
            items, filled = [], 0.0
        items.append(item)
        filled += size
    yield Unit(items)


def simulated(case: Case, repeats: int) -> list[float]:
    """Seconds, for several orders of taking units and choices of slow and lost nodes."""
    found = []
    for seed in range(repeats):
        whole = Simulation(replace(case, lost=0), seed).run() if case.lost else math.inf
        found.append(Simulation(case, seed, whole / 2).run())
    return found


def cases() -> Iterator[Case]:
    mebi = 1 << 20
    auto = {model: min(max(int(sum(Simulation.sizes(model))) // 1024, 64 * mebi), 1024 * mebi) for model in MODELS}
    for model in MODELS:
        for workers in (64, 1024):
            for shard in (1024 * mebi, auto[model]):
                plain = Case(model, workers, shard)
                yield from (plain, replace(plain, slow=1), replace(plain, lost=1))
                yield from (replace(plain, gigabytes=rate) for rate in STORAGE)


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """One line for a model, workers and shards; a column for what goes wrong."""
    storage = " | ".join(f"storage of {rate:g} GB/s" for rate in STORAGE)
    yield f"| model | workers | shards | undisturbed | one slow node | one node lost | {storage} |"
    yield "|" + "---|" * (3 + COLUMNS)
    for first in range(0, len(rows), COLUMNS):
        plain, *others = rows[first : first + COLUMNS]
        size = f"{plain['shard'] / (1 << 20):.0f} MiB" + (" (auto)" if plain["shard"] < 1 << 30 else "")
        cells = [shown(plain["seconds"]), *(f"{shown(r['seconds'])} ({r['ratio']:.2f}x)" for r in others)]
        yield f"| {plain['model']} | {plain['workers']:,} | {size} | {' | '.join(cells)} |"


def shown(seconds_: float) -> str:
    return f"{seconds_ / 60:.1f} min" if seconds_ >= 60 else f"{seconds_:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "data" / "simulate.json")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for case in cases():
        middle = statistics.median(found := simulated(case, options.repeats))
        first = len(rows) // COLUMNS * COLUMNS  # the undisturbed case
        base = rows[first]["seconds"] if first < len(rows) else middle
        told = {**asdict(case), "gigabytes": None if math.isinf(case.gigabytes) else case.gigabytes}
        rows.append({**told, "seconds": middle, "min": min(found), "max": max(found), "ratio": middle / base})
        print(json.dumps(rows[-1]), flush=True)
    law = {"preset": PRESET, "rank": RANK, "slow": SPEED, "workers_of_a_node": WORKERS, "repeats": options.repeats}
    result = {**law, "environment": environment(), "rows": rows}
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = PAGE.read_text(encoding="utf-8")
    lines = "\n".join(table(rows))
    marked = f"<!-- simulated: begin -->\n{lines}\n<!-- simulated: end -->"
    text = re.sub(r"<!-- simulated: begin -->.*<!-- simulated: end -->", lambda _: marked, text, flags=re.DOTALL)
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
