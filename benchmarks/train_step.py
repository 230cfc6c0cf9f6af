"""What does training on packed weights cost: a LoRA step's time, and the memory of training?

Peer: the same model with dense float32 weights and LoRA, and bitsandbytes NF4 through transformers and PEFT (QLoRA),
which computes in float32 too. Memory is the peak of a process of its own over two steps, the libraries included; what
the libraries take alone is given.

Goal: 0.9 times the speed of dense LoRA, and 1.05 times that of bitsandbytes, at 4 and at 2 bits. A step is forward,
backward and AdamW on the adapters of rank 16, for 512 tokens; a Llama of 4 layers, hidden 2048.
"""

import gc

import torch

from harness import Bench, Versus, in_own_process, reset_peak, resident
from models import BNB, DENSE, LOFTQ2, LOFTQ4, WAYS, llama, training_step

RANK = 16
CPU_GOALS = tuple(Versus(ours, peer, goal) for ours in (LOFTQ4, LOFTQ2) for peer, goal in ((DENSE, 0.9), (BNB, 1.05)))
Shape = tuple[int, int, int, str, str]  # the arguments of models.llama


def one_step(bench: Bench, shape: Shape, tokens: int, versus: tuple[Versus, ...]) -> None:
    """Training steps of all ways, in turn; all models are in memory."""
    ways = dict.fromkeys(side for v in versus for side in (v.peer, v.side))
    steps = bench.built({w: lambda w=w: training_step(WAYS[w](llama(*shape), RANK), 1, tokens) for w in ways})
    hidden, layers, _, dtype, device = shape
    case = f"training step, hidden {hidden}, {layers} layers, {tokens} tokens, {dtype}, {device}"
    bench.compare(case, steps, versus, repeats=5)


def memory(way: str, shape: Shape, tokens: int) -> dict[str, int]:
    """Bytes of this process: before there is a model, before training, at the peak of two training steps."""
    libraries = resident()
    model = WAYS[way](llama(*shape), RANK)
    step = training_step(model, 1, tokens)
    gc.collect()
    reset_peak()
    before = resident()
    step()
    step()
    return {"libraries": libraries, "before": before, "peak": resident("VmHWM")}


def main() -> None:
    bench = Bench(__file__, __doc__)
    torch.set_flush_denormal(True)
    bench.note("Denormals are flushed to zero for all sides: random weights make some, and attention crawls on them.")
    shape, tokens = ((256, 2, 256), 64) if bench.quick else ((2048, 4, 1024), 512)
    shape = (*shape, "float32", "cpu")
    one_step(bench, shape, tokens, CPU_GOALS)
    peaks = {}
    for way in (DENSE, BNB, LOFTQ4, LOFTQ2):
        found = in_own_process(memory, way, shape, tokens)
        peaks[way] = found["peak"]
        added = found["before"] - found["libraries"]
        bench.record("memory", f"peak in training, {way}", [found["peak"]], "B")
        bench.record("memory", f"model, adapters and the libraries they load, {way}", [added], "B")
    bench.record("memory", "before there is a model", [found["libraries"]], "B")
    for way in (BNB, LOFTQ4, LOFTQ2):
        bench.record("memory", f"peak of {way} / {DENSE}", [peaks[way] / peaks[DENSE]], "x")
    bench.finish()


if __name__ == "__main__":
    main()
