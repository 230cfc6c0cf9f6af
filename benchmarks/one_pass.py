"""How much disk and memory does calibrating and solving in one pass take, with Llama-2-7B's shapes?

Peer: none; beside it, by the sizes of its files, what `loftq calibrate` keeps of all 32 layers.

Goal: with 8 windows of 512 tokens and `descent`, 2 bits, rank 64, at most 3 GB of statistics on disk at any time. All
files in the run's directory of moments count, unfinished ones and hidden states too; it is looked at fifty times a
second. Every layer has the same shapes, so two show what 32 repeat (`--layers`), and every step takes the same memory
(`--steps`, of which the preset has 6). Weights and texts are random.
"""

import json
import os
import random
import resource
import shutil
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from harness import Bench
from streaming import BITS, HIDDEN, IMPORTS, MLP, RANK, VOCABULARY, peak_of, write_checkpoint

WINDOWS, TOKENS, LAYERS = 8, 512, 32
EVERY = 0.02  # seconds between two looks


@dataclass
class Watch:
    """What was seen in a directory while a run used it.

    Attributes:
        most: bytes of all files at a time.
        blocks: of every block's moments their bytes, and when they were first and last there.
    """

    most: int = 0
    blocks: dict[str, tuple[int, float, float]] = field(default_factory=dict)

    def until(self, run: "Future[int]", directory: Path) -> int:
        """Look at ``directory`` until ``run`` has its result, which is returned."""
        while not run.done():
            sizes = _sizes(directory)
            self.most = max(self.most, sum(sizes.values()))
            for path in (path for path in sizes if path.name.startswith("block-")):
                now = time.perf_counter()
                self.blocks[path.name] = sizes[path], self.blocks.get(path.name, (0, now, 0))[1], now
            time.sleep(EVERY)
        return run.result()


def _sizes(directory: Path) -> dict[Path, int]:
    found = {}
    for path in directory.rglob("*"):
        try:
            found[path] = os.lstat(path).st_size
        except FileNotFoundError:  # it went between the two looks
            continue
    return found


def write_texts(directory: Path) -> Path:
    """A tokenizer of as many words as the model has, and more random text than is asked for."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(directory)
    chance, texts = random.Random(0), directory.with_name("texts.txt")
    lines = (" ".join(f"w{chance.randrange(1, VOCABULARY)}" for _ in range(TOKENS)) for _ in range(4 * WINDOWS))
    texts.write_text("\n".join(lines), "utf-8")
    return texts


def main() -> None:
    bench = Bench(__file__, __doc__, layers=2, steps=6)
    (layers, steps), workers = bench.options.values(), bench.threads
    hidden, mlp = (256, 688) if bench.quick else (HIDDEN, MLP)
    watch = Watch()
    with tempfile.TemporaryDirectory() as work:
        source, output = Path(work) / "source", Path(work) / "output"
        source.mkdir()
        size = write_checkpoint(source, layers, hidden, mlp)
        texts = write_texts(source)
        quantize = (
            f"import loftq; loftq.quantize({str(source)!r}, {str(output)!r}, bits={BITS}, rank={RANK}, "
            f"calibrate={str(texts)!r}, calibration_samples={WINDOWS}, steps={steps}, workers={workers})"
        )
        began, spent = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        with ThreadPoolExecutor(1) as pool:
            peak = watch.until(pool.submit(peak_of, quantize), output.with_name("output.loftq-partial") / "moments")
        seconds, used = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        manifest = json.loads((output / "loftq_manifest.json").read_text())
        shutil.rmtree(output)
    options = manifest["identity"]["options"]
    assert options["solve"]["rounding"] == "descent", options
    cpu = used.ru_utime + used.ru_stime - spent.ru_utime - spent.ru_stime
    moments = [size for size, _, _ in watch.blocks.values()]
    case = f"{layers} layers of Llama-2-7B, {WINDOWS} windows, descent, {steps} steps, {BITS} bits, {workers} workers"
    bench.record(case, "most statistics on disk at a time", [watch.most], "B", at_most=3e9)
    bench.record(case, "moments of a block", moments, "B")
    bench.record(case, "peak resident memory", [peak / 2**30], "GiB")
    bench.record(case, "of it, importing the libraries", [peak_of(IMPORTS) / 2**30], "GiB")
    bench.record(case, "solving a block, its moments on disk", [e - b for _, b, e in watch.blocks.values()], "s")
    bench.record(case, "wall time", [seconds / 60], "min")
    bench.record(case, "CPU time", [cpu / 60], "min")
    bench.record(case, "checkpoint", [size], "B")
    bench.record(case, f"CPU time of all {LAYERS} layers, extrapolated", [cpu / layers * LAYERS / 3600], "h")
    bench.record(case, f"moments of all {LAYERS} layers, if they were kept", [LAYERS * max(moments)], "B")
    bench.finish()


if __name__ == "__main__":
    main()
