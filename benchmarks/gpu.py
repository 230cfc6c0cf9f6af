"""On a CUDA device: is decoding as fast as memory, and training and decoding as fast as the peers'?

Peer: a copy of the decoded matrix; bitsandbytes NF4 (QLoRA) and dense bfloat16 LoRA in training; dense bfloat16 in
generating a token; the official algorithm and PEFT's loftq_init for the start of one matrix. Models have the layers of
Llama-2-7B, 8 of them for the comparisons of time, all 32 for memory and for the time of quantizing a whole model.

Goal: none yet; they are set after a first measurement.
"""

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache

import loftq
from harness import Bench, Versus, in_own_process
from models import BNB, BNB_NESTED, DENSE, LOFTQ2, LOFTQ4, WAYS, llama, training_step
from quantize import dequantize
from solver import one_matrix
from train_step import one_step

RANK = 64
VERSUS = tuple(Versus(ours, peer) for ours in (LOFTQ4, LOFTQ2) for peer in (DENSE, BNB))


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
    models = {way: WAYS[way](llama(*shape), RANK) for way in (DENSE, BNB, LOFTQ4, LOFTQ2)}
    steps = {way: next_token(model, context) for way, model in models.items()}
    case = f"one token, batch 1, after {context}, hidden {shape[0]}, {shape[1]} layers, {shape[3]}"
    bench.compare(case, steps, VERSUS, repeats=15, number=5)


def memory(way: str, shape: list[Any], tokens: int) -> dict[str, int]:
    """Bytes that PyTorch holds on the device: before training, and at the peak of two training steps."""
    step = training_step(WAYS[way](llama(*shape), RANK), 1, tokens)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    step()
    return {"before": before, "peak": torch.cuda.max_memory_allocated()}


def whole_model(bits: int, shape: list[Any]) -> float:
    """Seconds of LoftQ of a model in memory, without the start of CUDA and of the kernels."""
    loftq.quantize_weight(torch.randn(1024, 1024, device=shape[-1]), bits=bits, rank=RANK, preset="loftq")
    model = llama(*shape)
    torch.cuda.synchronize()
    start = time.perf_counter()
    loftq.get_peft_model(model, bits=bits, rank=RANK, progress=False)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    if not torch.cuda.is_available():
        print("gpu: there is no CUDA device here; nothing was measured")
        return
    bench = Bench(__file__, __doc__)
    hidden, layers, vocabulary, size, tokens = (256, 2, 256, 1024, 64) if bench.quick else (4096, 8, 32000, 8192, 512)
    shape = (hidden, layers, vocabulary, "bfloat16", "cuda")
    whole = (hidden, 4 * layers, vocabulary, "bfloat16", "cuda")

    weight = torch.randn(size, size, device="cuda").bfloat16()
    for bits in (2, 3, 4, 8):
        dequantize(bench, weight, bits, number=20)
    del weight
    one_step(bench, shape, 4 * tokens, VERSUS)
    one_token(bench, shape, tokens)
    for bits in (4, 2):
        one_matrix(bench, bits, 1024 if bench.quick else 4096, RANK, goal=None, device="cuda")
    gc.collect()
    torch.cuda.empty_cache()

    case = f"memory, hidden {hidden}, {4 * layers} layers, {tokens} tokens, bfloat16"
    peaks = {}
    for way in (BNB_NESTED, LOFTQ4, LOFTQ2):
        found = in_own_process(memory, way, whole, tokens)
        peaks[way] = found["peak"]
        bench.record(case, f"before training, {way}", [found["before"]], "B")
        bench.record(case, f"peak in training, {way}", [found["peak"]], "B")
    bench.record(case, f"peak of {LOFTQ2} / {BNB_NESTED}", [peaks[LOFTQ2] / peaks[BNB_NESTED]], "x")
    for bits in (4, 2):
        seconds = [in_own_process(whole_model, bits, whole)]
        bench.record(f"LoftQ of a whole model, hidden {hidden}, {4 * layers} layers", f"{bits} bits", seconds, "s")
    bench.finish()


if __name__ == "__main__":
    main()
