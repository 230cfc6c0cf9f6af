"""A second reader of LoftQ checkpoints, from docs/format.md alone: numpy and the standard library, none of our code."""

import base64
import json
import math
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from safetensors import safe_open

QUANTILE = 0.9677083
LLOYD = {
    2: [-0.7643, -0.1683, 0.347, 1.0],
    3: [-0.7998, -0.4859, -0.2539, -0.0516, 0.1443, 0.3541, 0.6087, 1.0],
    4: [
        *(-0.9163, -0.7046, -0.5496, -0.4214, -0.3097, -0.2088, -0.1148, -0.0244),
        *(0.065, 0.1554, 0.2484, 0.3477, 0.4572, 0.5847, 0.7472, 1.0),
    ],
}


def tensors(directory: Path) -> dict[str, np.ndarray]:
    """All tensors, 16-bit floats widened."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # not a dict
                tensor = opened.get_tensor(name)
                found[name] = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    return found


def levels(code: str, bits: int) -> np.ndarray:
    if code == "lloyd":
        return np.array(LLOYD[bits])
    if code == "nf":
        half = 2 ** (bits - 1)
        quantile = NormalDist().inv_cdf
        right = [quantile(p) for p in np.linspace(QUANTILE, 0.5, half + 1)[:-1]]
        left = [-quantile(p) for p in np.linspace(QUANTILE, 0.5, half)[:-1]]
        values = np.array(sorted([*left, 0.0, *right]))
        return values / values.max()
    if code == "fp4":
        half = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
        return np.array([-v for v in reversed(half)] + half)
    if code == "iq4nl":
        return np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113.0])
    if code == "int":
        half = 2 ** (bits - 1)
        return np.arange(1.0 - half, half + 1) if bits < 8 else np.concatenate([np.arange(-127.0, 1), np.arange(128.0)])
    return np.linspace(-1, 1, 2**bits) if code == "uniform" else np.arange(2.0**bits)


def codes(packed: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """One little-endian bit stream a row."""
    rows = packed.reshape(packed.shape[0], -1).astype(np.uint8)
    stream = np.unpackbits(rows, axis=1, bitorder="little")[:, : columns * bits]
    return (stream.reshape(len(rows), columns, bits) * (1 << np.arange(bits))).sum(-1)


def trellis(stored: dict[str, np.ndarray], module: str, group: dict[str, Any], tables: dict[str, str]) -> np.ndarray:
    """Windows into the circular string of every column of a group of rows."""
    window, packed = group["window"], stored[f"{module}.weight"].astype(np.uint8)
    scale = stored[f"{module}.weight_scale"].astype(np.float64)
    levels = np.frombuffer(base64.b64decode(tables[f"trellis-{window}"]), dtype="<f2").astype(np.float64)
    units = math.ceil(len(scale) / 16)
    sizes = range(6, 13) if units >= 6 else [units]
    length = 16 * min(sizes, key=lambda size: (math.ceil(units / size) * size, abs(size - 8), size))
    columns = len(packed[0]) * 8 // round(length * group["bits"])  # the last byte is not filled by a column
    rates = stored.get(f"{module}.weight_rate", np.full(columns, round(16 * group["bits"]))).astype(int)
    places = np.arange(length)[:, None] * np.arange(65) // 16  # where the windows begin, by rate
    values = np.zeros((len(packed) * length, len(rates)))
    for g, stream in enumerate(np.unpackbits(packed, axis=1, bitorder="little")):
        first = 0
        for column, rate in enumerate(rates):
            n = length * rate // 16
            if n:
                string = stream[first : first + n]
                bits = string[(places[:, rate, None] + np.arange(window)) % n]
                values[g * length : (g + 1) * length, column] = levels[(bits * (1 << np.arange(window))).sum(1)]
            first += n
    return values[: len(scale)] * scale


def backbone(stored: dict[str, np.ndarray], module: str, group: dict[str, Any], columns: int) -> np.ndarray:
    """``(levels[code] - zero) * scale``; scales stored plainly."""
    values = levels(group["code"], group["bits"])[codes(stored[f"{module}.weight"], group["bits"], columns)]
    size = columns if group["code"] == "uniform-tensor" else group["block_size"]

    def spread(suffix: str) -> np.ndarray:
        scale = stored[f"{module}.{suffix}"].astype(np.float64)
        return np.repeat(scale, size, axis=1)[:, :columns]

    zero = spread("weight_zero") if f"{module}.weight_zero" in stored else 0.0
    return (values - zero) * spread("weight_scale")


def matrices(directory: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """module -> Q and s·BA, both ``(out, in)``, of a packed checkpoint with Linear layers."""
    model = json.loads((directory / "config.json").read_text())
    config = model["quantization_config"]
    adapter = json.loads((directory / "loftq_init" / "adapter_config.json").read_text())
    stored, factors = tensors(directory), tensors(directory / "loftq_init")
    found = {}
    for group in config["groups"]:
        for module in group["modules"]:
            a = factors[f"base_model.model.{module}.lora_A.weight"].astype(np.float64)
            b = factors[f"base_model.model.{module}.lora_B.weight"].astype(np.float64)
            rank = a.shape[0]
            scaling = adapter["lora_alpha"] / (math.sqrt(rank) if adapter["use_rslora"] else rank)
            if group["code"] == "trellis":
                found[module] = trellis(stored, module, group, config["levels"]), scaling * b @ a
            else:
                found[module] = backbone(stored, module, group, a.shape[1]), scaling * b @ a
        for stack in group.get("parameters", []):
            last = f"{stack.rsplit('.', 1)[0]}.down_proj"
            inside = stack != last and any(last in g.get("parameters", []) for g in config["groups"])
            is_llama4 = model["model_type"].startswith("llama4")
            found |= experts(stored, factors, adapter, stack, inside, group, is_llama4)
    return found


def experts(
    stored: dict[str, np.ndarray],
    factors: dict[str, np.ndarray],
    adapter: dict[str, Any],
    stack: str,
    inside: bool,
    group: Any,
    is_llama4: bool,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """``stack.e`` -> Q and s·BA of expert e; A is stored expert after expert, B rank after rank."""
    root = f"base_model.model.{stack.rsplit('.', 1)[0]}{'.base_layer' if inside else ''}"
    a, b = (factors[f"{root}.lora_{x}.weight"].astype(np.float64) for x in "AB")
    count, found = len(stored[stack]), {}
    rank = len(a) // count
    scaling = adapter["lora_alpha"] / (math.sqrt(rank) if adapter["use_rslora"] else rank)
    suffixes = ("", "_scale", "_zero")
    for e in range(count):
        one = {f"m.weight{s}": stored[stack + s][e] for s in suffixes if stack + s in stored}
        product = scaling * b.reshape(len(b), rank, count)[:, :, e] @ a[e * rank : (e + 1) * rank]
        product = product.T if is_llama4 else product  # whose class hides that it has (in, out)
        found[f"{stack}.{e}"] = backbone(one, "m", group, product.shape[1]), product
    return found
