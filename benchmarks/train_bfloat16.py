"""What does a training step cost in bfloat16, on a CPU with fast products in it or without?

Peer: the same model with dense weights and LoRA, in bfloat16 and in float32, under autocast as Trainer's `bf16` has it.

Goal: 0.9 times the speed of dense LoRA in bfloat16. A step is forward, backward and AdamW on the adapters of rank
16, for 128 tokens; a Llama of 4 layers, hidden 512.
"""

import time
from collections.abc import Callable

import torch

from harness import Bench, Versus
from loftq.numerics.machine import SLOW_DTYPES
from models import DENSE, LOFTQ2, LOFTQ4, WAYS, llama, training_step

RANK = 16


def under_autocast(step: Callable[[], None]) -> Callable[[], None]:
    def stepped() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            step()

    return stepped


def main() -> None:
    bench = Bench(__file__, __doc__)
    torch.set_flush_denormal(True)
    if bench.threads == 1:
        bench.clock = time.process_time
        bench.note("Times are CPU seconds of one thread, since others worked on the machine.")
    has = "no fast" if torch.bfloat16 in SLOW_DTYPES else "fast"
    bench.note(f"This CPU has {has} products in bfloat16. Denormals are flushed to zero for all sides.")
    shape, tokens = ((256, 2, 256), 16) if bench.quick else ((512, 4, 1024), 128)
    builds = {}
    for way in (DENSE, LOFTQ4, LOFTQ2):
        for dtype in ("float32", "bfloat16"):
            wrap = under_autocast if dtype == "bfloat16" else lambda step: step
            builds[f"{way}, {dtype}"] = lambda way=way, dtype=dtype, wrap=wrap: wrap(
                training_step(WAYS[way](llama(*shape, dtype), RANK), 1, tokens)
            )
    versus = [Versus(f"{w}, bfloat16", f"{DENSE}, bfloat16", 0.9) for w in (LOFTQ4, LOFTQ2)]
    versus += [Versus(f"{w}, bfloat16", f"{w}, float32") for w in (DENSE, LOFTQ4, LOFTQ2)]
    case = f"training step, hidden {shape[0]}, {shape[1]} layers, {tokens} tokens"
    bench.compare(case, bench.built(builds), tuple(versus), repeats=5)
    bench.finish()


if __name__ == "__main__":
    main()
