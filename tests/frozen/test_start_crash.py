"""``loftq start`` killed at every change of the file system: the same command continues, and loses no layer."""

import os
import shutil
from pathlib import Path

import pytest
from bases import make_llama

import loftq.frozen.layers
import models
from harness import Child, hooked, one_skeleton, tree
from loftq.errors import ConflictError
from loftq.frozen import start as module
from loftq.planning import Policy

pytestmark = pytest.mark.slow

LOST = 9
LAYERS = 2
OPTIONS = module.StartOptions(policy=Policy(bits="q_proj=4,16", rank="4", min_coverage=0.0))


class Bench:
    """A base, its original, and what an undisturbed run makes and does."""

    def __init__(self, root: Path) -> None:
        self.place, self.source, self.base = root / "place", root / "source", root / "base"
        self.place.mkdir()
        self.fitted: list[str] = []
        self.calls: list[str] = []
        make_llama().save_pretrained(self.source)
        models.quantize(self.source, self.base, steps=0)

    def run(self):
        return module.start(str(self.base), str(self.source), self.place / "out", OPTIONS, lambda total, done: print)

    def empty(self) -> None:
        shutil.rmtree(self.place)
        self.place.mkdir()

    def killed(self, k: int) -> None:
        """A run that ends just before primitive ``k``."""
        left = iter(range(10_000))
        child = Child(lambda: self._watched(lambda op, path: next(left) == k and os._exit(LOST)))
        ended = child.ended()
        assert ended.code == LOST, ended.err

    def _watched(self, step) -> None:
        with hooked(step):
            self.run()

    def finished(self) -> int:
        """Layers whose record is there: it is written after what it is of."""
        return len(list(self.place.glob("out.loftq-partial/units/?????.json")))


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    made = Bench(tmp_path_factory.mktemp("start"))
    model = loftq.frozen.layers.load(made.base)
    fit = module.fit

    def counted(layer, *rest):
        made.fitted.append(layer.name)
        return fit(layer, *rest)

    with one_skeleton(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(loftq.frozen.layers, "load", lambda directory, device: model)
        patch.setattr(module, "fit", counted)
        with hooked(lambda op, path: made.calls.append(op)):
            made.run()
        made.golden = tree(made.place)
        assert len(made.fitted) == LAYERS
        yield made


@pytest.mark.parametrize("op", ["mkdir", "create", "rename", "rmtree"])
def test_killed_before_every(op, bench):
    """What a write or a sync leaves is never under its name: these are all states."""
    for k in [n for n, called in enumerate(bench.calls) if called == op]:
        bench.empty()
        bench.killed(k)
        output = bench.place / "out"
        assert not output.exists() or tree(output) == {n.removeprefix("out/"): raw for n, raw in bench.golden.items()}
        done = LAYERS if output.exists() else bench.finished()
        bench.fitted.clear()
        bench.run()
        assert tree(bench.place) == bench.golden
        assert len(bench.fitted) == LAYERS - done


def test_a_damaged_layer_is_made_again(bench):
    for name in ("00000.safetensors", "00001.json"):
        bench.empty()
        bench.killed(bench.calls.index("rmtree") - 12)
        file = bench.place / "out.loftq-partial" / "units" / name
        raw = bytearray(file.read_bytes())
        raw[-9] ^= 1
        file.write_bytes(raw)
        bench.fitted.clear()
        bench.run()
        assert tree(bench.place) == bench.golden
        assert len(bench.fitted) == 1


def test_an_original_that_changed_meanwhile(bench, monkeypatch):
    bench.empty()
    bench.killed(bench.calls.index("rmtree") - 12)
    assert bench.finished() == LAYERS
    with monkeypatch.context() as patch:
        patch.setattr(module, "code_path", lambda device: {"cpu": "ABACUS"})
        with pytest.raises(ConflictError, match=r"another machine .* -> ABACUS"):
            bench.run()
    os.utime(bench.source / "model.safetensors", ns=(1, 1))
    with pytest.raises(ConflictError, match=r"unfinished work from before .*source changed .*delete the directory"):
        bench.run()
    shutil.rmtree(bench.place / "out.loftq-partial")
    bench.run()
    assert os.listdir(bench.place) == ["out"]
