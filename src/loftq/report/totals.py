"""What a LoftQ checkpoint costs and how close it is, from the plan and the reports of its matrices."""

import math
from typing import Any

from loftq.planning import NO_PARAMETER, Plan


def totals(plan: Plan, matrices: list[dict[str, Any]], file_sizes: dict[str, int]) -> dict[str, Any]:
    """Sums over a checkpoint.

    Returns:
        ``bits_per_weight``: stored bits per quantized weight, scales included.
        ``disk_bytes``: all files but card and manifest, which show it; ``adapter_bytes``: the adapter among them.
        ``dense_16bit_bytes``: all parameters at 16 bits; ``compression``: that over ``disk_bytes``.
        ``largest``: the part that takes the most bytes: ``what``, ``bytes``, and the option that makes it smaller.
        ``trainable_share``: the adapter's parameters over the model's.
        ``error``, ``qlora_error``: relative error of all matrices together, sqrt(sum ||W-Q-s·BA||² / sum ||W||²).
        ``output_error``, ``qlora_output_error``: the same of the outputs, where a calibration had them measured.
    """
    quantized = sum(m.numel for m in plan.matrices)
    kept = sum(math.prod(k.shape) for k in plan.kept)
    factors = file_sizes["loftq_init/adapter_model.safetensors"]
    adapter = sum(m.adapter_numel for m in plan.matrices)
    disk = sum(file_sizes.values())
    dense = 2 * (quantized + kept)
    measured = [m for m in matrices if "output_errors" in m]
    outputs = {
        "output_error": _together(measured, lambda m: m["output_errors"][m["kept"]], "output_norm"),
        "qlora_output_error": _together(measured, lambda m: m["output_errors"][0], "output_norm"),
    }
    return {
        "matrices": len(matrices),
        "quantized_weights": quantized,
        "parameters": quantized + kept,
        "coverage": plan.coverage,
        "bits_per_weight": 8 * sum(m["bytes"] for m in matrices) / quantized,
        "backbone_bytes": sum(n for name, n in file_sizes.items() if name.endswith(".safetensors") and "/" not in name),
        "adapter_bytes": factors,
        "disk_bytes": disk,
        "dense_16bit_bytes": dense,
        "compression": dense / disk,
        "largest": _largest(plan, sum(m["bytes"] for m in matrices), factors),
        "trainable_share": adapter / (quantized + kept),
        "error": _together(matrices, lambda m: m["errors"][m["kept"]]),
        "qlora_error": _together(matrices, lambda m: m["qlora_error"]),
        **(outputs if measured else {}),
    }


def _largest(plan: Plan, packed: int, adapter: int) -> dict[str, Any]:
    tables = sum(k.bytes for k in plan.kept if k.reason.startswith("an embedding ("))
    others = sum(k.bytes for k in plan.kept) - tables
    narrowed = [k for k in plan.kept if len(k.shape) > 1 and k.reason != NO_PARAMETER]  # by the option
    narrow = "--dtype bfloat16" if any(k.dtype in ("F32", "F64") for k in narrowed) else ""
    parts = [
        (packed, "quantized matrices", "fewer --bits"),
        (adapter, "the adapter", "a lower --rank"),
        (tables, "embedding tables", "--embeddings"),
        (others, "other tensors that are kept", narrow),
    ]
    size, what, option = max(parts)
    return {"what": what, "bytes": size, "option": option}


def _together(matrices: list[dict[str, Any]], error: Any, norm: str = "norm") -> float:
    whole = sum(m[norm] ** 2 for m in matrices)
    return math.sqrt(sum((error(m) * m[norm]) ** 2 for m in matrices) / whole) if whole else 0.0
