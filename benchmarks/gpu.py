"""On a CUDA device: is decoding as fast as memory, and training and decoding as fast as the peers'?

    python benchmarks/gpu.py --minutes 4    # prints and writes each figure as it is known, the most telling first

Peer: a copy of the decoded matrix; bitsandbytes NF4 (QLoRA), if it is installed, and dense bfloat16 LoRA in training;
dense bfloat16 in generating a token; the official algorithm and PEFT's loftq_init for one matrix. Models
have the layers of Llama-2-7B: 4 of them for the comparisons of time, all 32 for memory and for the time of quantizing a
whole model. Nothing is downloaded.

Goal: none yet; they are set after a first measurement.
"""

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache

import loftq
from harness import Bench, Versus, installed
from models import BNB, BNB_NESTED, DENSE, LOFTQ2, LOFTQ4, WAYS, llama, training_step
from quantize import dequantize
from solver import one_matrix
from train_step import one_step

RANK = 64
PEERS = (DENSE, *((BNB,) if installed("bitsandbytes") else ()))
VERSUS = tuple(Versus(ours, peer) for ours in (LOFTQ4, LOFTQ2) for peer in PEERS)


def next_token(model: Any, context: int) -> Callable[[], None]:
    """One forward of one token after ``context`` others."""
    model.eval()
    ids = torch.randint(model.config.vocab_size, (1, context + 1), device=model.device)
    cache = DynamicCache()

    @torch.inference_mode()
    def forward(tokens: torch.Tensor) -> None:
        model(input_ids=tokens, past_key_values=cache, use_cache=True)

    def step() -> None:
        forward(ids[:, -1:])
        cache.crop(-1)

    forward(ids[:, :-1])
    return step


def one_token(bench: Bench, shape: tuple[Any, ...], context: int) -> None:
    ways = (*PEERS, LOFTQ4, LOFTQ2)
    steps = bench.built({way: lambda way=way: next_token(WAYS[way](llama(*shape), RANK), context) for way in ways})
    case = f"one token, batch 1, after {context}, hidden {shape[0]}, {shape[1]} layers, {shape[3]}"
    bench.compare(case, steps, VERSUS, repeats=15, number=5)


def free() -> None:
    """Give what no model holds any more back to the device."""
    gc.collect()
    torch.cuda.empty_cache()


def is_usable() -> bool:
    """Whether this process can use the device still: after some errors, such as a wrong address, nothing works."""
    try:
        free()
        torch.ones(1, device="cuda").item()
    except RuntimeError:
        return False
    return True


def memory(bench: Bench, shape: tuple[Any, ...], tokens: int) -> None:
    """Bytes that PyTorch holds on the device: before training, and at the peak of two training steps."""
    case, peaks = f"memory, hidden {shape[0]}, {shape[1]} layers, {tokens} tokens, {shape[3]}", {}

    def measure(way: str) -> None:
        step = training_step(WAYS[way](llama(*shape), RANK), 1, tokens)
        free()
        torch.cuda.reset_peak_memory_stats()
        bench.record(case, f"before training, {way}", [torch.cuda.memory_allocated()], "B")
        step()
        step()
        peaks[way] = torch.cuda.max_memory_allocated()
        bench.record(case, f"peak in training, {way}", [peaks[way]], "B")

    for way in (LOFTQ4, LOFTQ2, *((BNB_NESTED,) if BNB in PEERS else ())):
        bench.attempt(lambda way=way: measure(way), f"{case}: {way}")
        free()
    if peaks.keys() >= {LOFTQ2, BNB_NESTED}:
        bench.record(case, f"peak of {LOFTQ2} / {BNB_NESTED}", [peaks[LOFTQ2] / peaks[BNB_NESTED]], "x")


def whole_model(bench: Bench, bits: int, shape: tuple[Any, ...]) -> None:
    """Seconds of LoftQ of a model in memory, without the start of CUDA and of the kernels."""
    loftq.quantize_weight(torch.randn(1024, 1024, device=shape[-1]), bits=bits, rank=RANK, preset="loftq")
    model = llama(*shape)
    torch.cuda.synchronize()
    start = time.perf_counter()
    loftq.get_peft_model(model, bits=bits, rank=RANK, preset="loftq", progress=False)
    torch.cuda.synchronize()
    seconds = [time.perf_counter() - start]
    bench.record(f"LoftQ of a whole model, hidden {shape[0]}, {shape[1]} layers", f"{bits} bits", seconds, "s")


def main() -> None:
    if not torch.cuda.is_available():
        print("gpu: there is no CUDA device here; nothing was measured")
        return
    bench = Bench(__file__, __doc__, first=0)
    if bench.options["first"]:
        bench.recall()
    hidden, layers, vocabulary, size, tokens = (256, 2, 256, 1024, 64) if bench.quick else (4096, 4, 32000, 8192, 512)
    shape = (hidden, layers, vocabulary, "bfloat16", "cuda")
    whole = (hidden, 8 * layers, vocabulary, "bfloat16", "cuda")

    def decode(*widths: int) -> None:
        weight = torch.randn(size, size, device="cuda").bfloat16()
        for bits in widths:
            dequantize(bench, weight, bits, number=20)

    def solve(bits: int) -> None:
        one_matrix(bench, bits, 1024 if bench.quick else 4096, RANK, goal=None, device="cuda")

    parts: list[tuple[Callable[[], None], str]] = [
        (lambda: decode(4, 2), "decoding 4 and 2 bits"),
        (lambda: one_step(bench, shape, 4 * tokens, VERSUS), "a training step"),
        (lambda: one_token(bench, shape, tokens), "one token"),
        (lambda: memory(bench, whole, tokens), "the peak of memory"),
        (lambda: solve(4), "LoftQ of one matrix, 4 bits"),
        (lambda: solve(2), "LoftQ of one matrix, 2 bits"),
        (lambda: decode(3, 8), "decoding 3 and 8 bits"),
        (lambda: whole_model(bench, 4, whole), "LoftQ of a whole model, 4 bits"),
        (lambda: whole_model(bench, 2, whole), "LoftQ of a whole model, 2 bits"),
    ]
    for i, (measure, what) in enumerate(parts[bench.options["first"] :], bench.options["first"] + 1):
        bench.part(measure, what)
        if not is_usable():
            bench.go_on(first=i)
    bench.finish()


if __name__ == "__main__":
    main()
