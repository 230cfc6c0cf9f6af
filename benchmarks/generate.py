"""How fast is one token generated on packed weights, and what does a loaded model hold in memory?

Peer: the same model with dense float32 and dense bfloat16 weights, and bitsandbytes NF4 through transformers; llama.cpp
has a script of its own. All have LoRA of rank 16 on every linear layer, in the dtype that PEFT gives it; switched off,
the products of the base alone are compared. Memory is what a process of its own takes to load a directory of 4 bits,
and to make a token, beyond what torch, transformers and PEFT take; the libraries that each side loads for it are
counted. The whole process is given too, all libraries included.

Goal: for one token at 4, 3 and 2 bits, in bfloat16, 1.5 times the speed of dense float32 and 1.2 times that of dense
bfloat16, on one thread; at most 1.2 times the memory of bitsandbytes, both ways. A Llama of 5 layers, hidden 2048, 0.27
billion weights; a token after a prompt of 8. Trellises, slow to make, have one layer, and no goal.
"""

import contextlib
import ctypes
import gc
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import loftq
from harness import Bench, Versus, in_own_process, resident
from models import BNB, DENSE, LOFTQ2, LOFTQ3, LOFTQ4, TRELLIS2, WAYS, llama

RANK, PROMPT = 16, 8
FLOAT, HALF = "float32", "bfloat16"
Shape = tuple[int, int, int]  # hidden, layers, vocabulary


def one_token(model: Any) -> Callable[[], Any]:
    """A call that makes one token after a prompt, always the same one."""
    model.eval()
    ids = torch.randint(model.config.vocab_size, (1, PROMPT + 1))
    with torch.inference_mode():
        cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values

    @torch.inference_mode()
    def call() -> None:
        model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return call


def speed(bench: Bench, shape: Shape, packed: Sequence[str], goals: Sequence[tuple[str, float | None]]) -> None:
    """One token of all models, in turn; all are in memory.

    Args:
        goals: dtypes of the dense peer, and how many times its speed a packed model in bfloat16 should have.
    """
    ways = [(DENSE, FLOAT), (DENSE, HALF), (BNB, HALF), (packed[0], FLOAT), *((way, HALF) for way in packed)]
    models = {}
    for way, dtype in ways:
        models[f"{way}, {dtype}"] = WAYS[way](llama(*shape, dtype), RANK)
        trim()
    calls = {side: one_token(model) for side, model in models.items()}
    versus = [Versus(f"{way}, {HALF}", f"{DENSE}, {dtype}", goal) for way in packed for dtype, goal in goals]
    versus += [Versus(f"{way}, {HALF}", f"{BNB}, {HALF}") for way in packed]
    versus += [Versus(f"{packed[0]}, {FLOAT}", f"{DENSE}, {FLOAT}")]
    told = [Versus(v.side, v.peer) for v in versus]
    hidden, layers, _ = shape
    repeats = 3 if bench.quick else 9
    for threads in sorted({1, bench.threads}):
        torch.set_num_threads(threads)
        case = f"one token, hidden {hidden}, {layers} layers, {threads} thread{'s' * (threads > 1)}"
        bench.compare(case, calls, versus if threads == 1 else told, repeats=repeats, number=2)
        with contextlib.ExitStack() as switched_off:
            for model in models.values():
                switched_off.enter_context(model.disable_adapter())
            bench.compare(f"{case}, without adapter", calls, told, repeats=repeats, number=2)


def trim() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def loaded(directory: str) -> dict[str, int]:
    """Bytes that this process takes for a loaded model, and after it has made a token; and all that it takes then."""
    from transformers.models.llama import modeling_llama  # noqa: F401  # which every side needs

    before = resident()
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    gc.collect()
    after = resident()
    with torch.inference_mode():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long))
    trim()
    made = resident()
    return {"loaded": after - before, "loaded, a token made": made - before, "the whole process": made}


def memory(bench: Bench, shape: Shape) -> None:
    with tempfile.TemporaryDirectory() as work:
        dense = f"{work}/dense"
        llama(*shape, HALF).save_pretrained(dense)
        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
        theirs: Any = AutoModelForCausalLM.from_pretrained(dense, quantization_config=nf4, dtype=torch.bfloat16)
        theirs.save_pretrained(f"{work}/bnb")
        loftq.quantize(dense, f"{work}/loftq", bits=4, rank=RANK, preset="qlora", code="nf", progress=False)
        found: dict[str, list[dict[str, int]]] = {f"{BNB}": [], f"{LOFTQ4}": []}
        for _ in range(1 if bench.quick else 3):
            for way, directory in ((BNB, "bnb"), (LOFTQ4, "loftq")):
                found[way].append(in_own_process(loaded, f"{work}/{directory}"))
        for way, directory in ((BNB, "bnb"), (LOFTQ4, "loftq")):
            size = sum(file.stat().st_size for file in Path(work, directory).glob("*.safetensors"))
            bench.record("memory, bfloat16", f"files of {way}", [size], "B")
            for what in found[way][0]:
                bench.record("memory, bfloat16", f"{way}, {what}", [each[what] for each in found[way]], "B")
    for what, goal in (("loaded", None), ("loaded, a token made", 1.2), ("the whole process", 1.2)):
        pairs = [ours[what] / theirs[what] for ours, theirs in zip(found[LOFTQ4], found[BNB], strict=True)]
        bench.record("memory, bfloat16", f"{LOFTQ4} / {BNB}, {what}", pairs, "x", at_most=goal)


def main() -> None:
    bench = Bench(__file__, __doc__)
    shape = (256, 2, 256) if bench.quick else (2048, 5, 4096)
    short = (256, 1, 256) if bench.quick else (2048, 1, 4096)
    goals, told = ((FLOAT, 1.5), (HALF, 1.2)), ((FLOAT, None), (HALF, None))
    bench.part(lambda: speed(bench, shape, (LOFTQ4, LOFTQ3, LOFTQ2), goals), "one token")
    bench.part(lambda: memory(bench, shape), "memory")
    bench.part(lambda: speed(bench, short, (TRELLIS2, LOFTQ2), told), "one token of a trellis")
    bench.finish()


if __name__ == "__main__":
    main()
