"""What do a matrix and a training step cost? The constants of ``loftq plan --estimate``.

Seconds are CPU seconds of one thread. Memory of a worker is the growth of the peak of a process of its own. What a
training step keeps is the peak of all that PyTorch allocates on the CPU, between models of different depth and
vocabulary. Writes src/loftq/solver/constants.json.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RANK, SEQUENCE = 16, 128
FILE = Path(__file__).resolve().parent.parent / "src" / "loftq" / "solver" / "constants.json"


def peak(call: Callable[[], Any]) -> int:
    """Most bytes that PyTorch has on the CPU during a call, beyond what there was before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    events = found.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def kept(layers: int, vocabulary: int, hidden: int = 256) -> tuple[int, int]:
    """Peak of a second forward and backward, gradients being there; inputs and outputs of all layers, together."""
    import loftq
    from models import llama

    torch.manual_seed(0)
    model = loftq.get_peft_model(llama(hidden, layers, vocabulary), bits=2, rank=RANK, preset="qlora", progress=False)
    ids = torch.randint(vocabulary, (2, SEQUENCE))

    def step() -> None:
        model.train()(input_ids=ids, labels=ids).loss.backward()

    step()
    factors = [p.shape for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n]
    features = sum(max(shape) for shape in factors)
    return peak(step), features


def of_training() -> dict[str, float]:
    tokens = 2 * SEQUENCE
    (shallow, few), (deep, many), (wordy, _) = kept(2, 1024), kept(5, 1024), kept(2, 9216)
    return {
        "floats_per_feature": round((deep - shallow) / (many - few) / tokens / 4, 3),
        "bytes_per_logit": round((wordy - shallow) / 8192 / tokens, 2),
    }


def cpu_seconds(size: int, repeats: int, bits: float = 2, **options: Any) -> float:
    """Of one matrix, the least of some calls; after one to warm up."""
    import loftq

    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    found = []
    for _ in range(repeats + 1):
        began = time.process_time()
        loftq.quantize_weight(weight, bits=bits, rank=RANK, **options)
        found.append(time.process_time() - began)
    return min(found[1:])


def of_matrices(quick: bool) -> dict[str, Any]:
    from loftq.spec import PRESETS

    size, repeats, narrow = (256, 1, 128) if quick else (2048, 2, 512)
    plain = cpu_seconds(size, repeats, preset="fitted") / size**2 / PRESETS["fitted"]["steps"]
    steps = PRESETS["descent"]["steps"]
    x = torch.randn(2 * size, size, generator=torch.Generator().manual_seed(1))
    square = cpu_seconds(size, 1, preset="descent", moments=x.T @ x / len(x)) / size**2 / steps
    windows = {
        str(w): cpu_seconds(narrow, 1, bits=2.1875, code="trellis", window=w, preset="fitted") / narrow**2 / 5
        for w in (8, 10, 12)
    }
    return {
        "seconds_per_weight": _rounded(plain),
        "seconds_per_square": _rounded((square - plain) / size),
        "seconds_per_trellis_weight": {window: _rounded(s - plain) for window, s in windows.items()},
    }


def memory(size: int) -> list[int]:
    """Bytes of this process when all is imported; and what its peak is above that for one matrix."""
    import loftq
    from harness import reset_peak, resident

    loftq.quantize_weight(torch.randn(64, 64), bits=2, rank=RANK, preset="fitted")
    weight = torch.randn(size, size)
    reset_peak()
    before = resident()
    loftq.quantize_weight(weight, bits=2, rank=RANK, preset="fitted")
    return [before - 4 * size**2, resident("VmHWM") - before + 4 * size**2]


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def main() -> None:
    from harness import Bench, environment, in_own_process

    bench = Bench(__file__, __doc__)
    torch.set_num_threads(1)
    size = 512 if bench.quick else 4096
    process, worker = in_own_process(memory, size, OMP_NUM_THREADS="1")
    found = {
        **of_matrices(bench.quick),
        "bytes_of_process": process,
        "bytes_per_weight": round(worker / size**2, 1),
        "bytes_per_square": json.loads(FILE.read_text())["bytes_per_square"],  # counted: five of float64
        **of_training(),
    }
    where = environment()
    found["measured"] = {key: where[key] for key in ("date", "commit", "dirty", "cpu")}
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    print(text)
    if not bench.quick:
        FILE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
