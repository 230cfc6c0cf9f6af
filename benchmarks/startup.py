"""How long until something happens: the command line, the import, and the first call of the compiled kernels?

Peer: `import torch` alone, which the import cannot be quicker than; a warm Numba cache against an empty one.

Goal: `loftq --help` in 0.5 s; `import loftq` in 0.3 s more than `import torch`.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from harness import Bench, in_own_process


def first_calls() -> dict[str, float]:
    """Seconds of the first use of every kernel on a tiny matrix, in this process."""
    seconds = {}
    start = time.perf_counter()

    def lap(what: str) -> None:
        nonlocal start
        seconds[what] = time.perf_counter() - start
        start = time.perf_counter()

    from loftq import QuantSpec, kernels

    kernel = kernels.backend(torch.device("cpu"))
    weight = torch.randn(64, 128)
    lap("import of the kernels")
    for bits in (2, 3, 4, 8):
        spec = QuantSpec(bits=bits)
        quantized, _ = kernel.quantize_residual(weight, weight, spec)
        stored = {"weight": kernel.pack(quantized.codes, bits), **quantized.scales}
        lap(f"quantize, {bits} bits")
        for dtype in (torch.float32, torch.bfloat16):
            kernel.dequantize(stored, spec, 128, dtype)
            lap(f"decode to {str(dtype)[6:]}, {bits} bits")
        kernel.linear(torch.randn(1, 128), stored, spec, 128)
        lap(f"product of one token, {bits} bits")
    return {"all kernels": sum(seconds.values()), **seconds}


def run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    bench = Bench(__file__, __doc__)
    repeats = 2 if bench.quick else 11
    script = Path(sys.executable).with_name("loftq")
    command = [str(script)] if script.exists() else [sys.executable, "-m", "loftq"]
    sides = {
        "loftq --help": lambda: run(*command, "--help"),
        "python -c pass": lambda: run(sys.executable, "-c", "pass"),
        "import torch": lambda: run(sys.executable, "-c", "import torch"),
        "import torch, loftq": lambda: run(sys.executable, "-c", "import torch, loftq"),
        "import loftq": lambda: run(sys.executable, "-c", "import loftq"),
    }
    seconds = bench.compare("process", sides, repeats=repeats)
    bench.record("process", "loftq --help", seconds["loftq --help"], "s", at_most=0.5)
    pairs = zip(seconds["import torch"], seconds["import torch, loftq"], strict=True)
    bench.record("process", "import loftq beyond import torch", [b - a for a, b in pairs], "s", at_most=0.3)

    calls: dict[str, list[dict[str, float]]] = {"empty cache": [], "warm cache": []}
    for _ in range(1 if bench.quick else 3):
        with tempfile.TemporaryDirectory() as cache:
            for found in calls.values():
                found.append(in_own_process(first_calls, NUMBA_CACHE_DIR=cache))
    for state, found in calls.items():
        for what in found[0]:
            bench.record(f"first call of the kernels, {state}", what, [f[what] for f in found], "s")
    bench.finish()


if __name__ == "__main__":
    main()
