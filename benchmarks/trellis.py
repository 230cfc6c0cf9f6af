"""How fast is the trellis code: decoded, multiplied by one token, trained on, and encoded?

Peer: the kernels of `lloyd` at 2 bits with blocks of 64, of the same commit; for a training step the same model with
dense float32 weights and LoRA. Decoding writes to memory that is there, as it does for a product. Strings are random:
decoding takes as long whatever they say. Rates of columns are any from 0 to 4 bits, with a mean of 2.

Goal: at 2 bits and windows of 10 bits, decode in at most 1.5 times the time, multiply one token in at most 1.2 times; a
LoRA step of 512 tokens at 0.85 times the speed of dense. Encoding, one pass with a fitted scale, has none.
"""

import torch
from torch import Tensor

from harness import Bench, Versus
from loftq import QuantSpec
from loftq.codes import Trellis
from loftq.kernels import cpu, trellis_cpu
from loftq.numerics import encode, quantize
from loftq.spec import stored_tensors
from models import DENSE, LOFTQ2, TRELLIS2
from train_step import one_step

LLOYD = "lloyd, 2 bits"
MAIN = "trellis, 2 bits, window 10"
Side = tuple[dict[str, Tensor], QuantSpec]


def trellis_side(size: int, bits: float, window: int, column_rates: bool = False) -> Side:
    spec = QuantSpec(bits=bits, code="trellis", window=window, column_rates=column_rates)
    shape = stored_tensors(spec, size, size)["weight"][1]
    stored = {"weight": torch.randint(-128, 128, shape, dtype=torch.int8)}
    stored["weight_scale"] = torch.rand(size, 1).bfloat16()
    if column_rates:
        half = torch.randint(0, 33, (size // 2,))
        half[half == 1] = 0  # a sixteenth of a bit is less than a window
        stored["weight_rate"] = torch.cat([half, 2 * spec.rate - half])[torch.randperm(size)].byte()
    return stored, spec


def decoding(bench: Bench, size: int) -> None:
    lloyd = QuantSpec(bits=2, code="lloyd")
    sides = {LLOYD: (encode(quantize(torch.randn(size, size), lloyd), lloyd), lloyd)}
    sides |= {f"trellis, 2 bits, window {window}": trellis_side(size, 2, window) for window in Trellis.WINDOWS}
    sides["trellis, 2.1875 bits, window 10"] = trellis_side(size, 2.1875, 10)
    sides["trellis, rates of columns, window 10"] = trellis_side(size, 2, 10, True)
    x, whole = torch.randn(1, size), slice(0, size)
    for what, goal in (("to float32", 1.5), ("to bfloat16", 1.5), ("one token", 1.2)):
        out = torch.empty(size, size, dtype=torch.bfloat16 if what == "to bfloat16" else torch.float32)
        calls = {}
        for name, (stored, spec) in sides.items():
            kernel = cpu if name == LLOYD else trellis_cpu
            if what == "one token":
                calls[name] = lambda k=kernel, t=stored, s=spec: k.linear(x, t, s, size)
            else:
                calls[name] = lambda k=kernel, t=stored, s=spec, o=out: k.multiplicand(t, s, size).decode(whole, o)
        case = f"{what}, {size} x {size}"
        versus = [Versus(name, LLOYD, round(1 / goal, 3) if name == MAIN else None) for name in sides if name != LLOYD]
        bench.compare(case, calls, versus, repeats=7, number=1 if bench.quick else 3)


def encoding(bench: Bench, rows: int, columns: int) -> None:
    weight = torch.randn(rows, columns)
    specs = {LLOYD: QuantSpec(bits=2, code="lloyd")}
    for bits in (1.5, 2, 2.1875, 3):
        for window in Trellis.WINDOWS if bits == 2 else (10,):
            specs[f"trellis, {bits} bits, window {window}"] = QuantSpec(bits=bits, code="trellis", window=window)
    calls = {}
    for name, spec in specs.items():
        kernel = cpu if name == LLOYD else trellis_cpu
        calls[name] = lambda k=kernel, s=spec: k.quantize_residual(weight, weight, s, fitted=True)
    case = f"one pass with fitted scales, {rows} x {columns}"
    seconds = bench.compare(case, calls, repeats=3)
    for name, values in seconds.items():
        bench.record(case, f"{name}: a weight", [v / weight.numel() * 1e9 for v in values], "ns")


def main() -> None:
    bench = Bench(__file__, __doc__)
    torch.set_flush_denormal(True)
    shape, tokens = ((256, 2, 256), 64) if bench.quick else ((1024, 2, 1024), 512)
    versus = (Versus(TRELLIS2, DENSE, 0.85), Versus(LOFTQ2, DENSE))
    bench.part(lambda: decoding(bench, 384 if bench.quick else 2048), "decoding")
    bench.part(lambda: one_step(bench, (*shape, "float32", "cpu"), tokens, versus), "a training step")
    bench.part(lambda: encoding(bench, 128, 64 if bench.quick else 512), "encoding")
    bench.finish()


if __name__ == "__main__":
    main()
