"""What quantizing and training would take: by headers, configuration and measured laws; no weight is read.

The laws are those of :mod:`loftq.solver.cost`. Times are of one CPU like that of ``measured``; memory of training is
for LoRA in float32 on all that is quantized, with AdamW.
"""

import heapq
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from loftq.architecture.configuration import dtype_of, read_config
from loftq.numerics.machine import cpus
from loftq.planning import Matrix
from loftq.solver.cost import constants, memory, seconds
from loftq.sources.checkpoint import Source
from loftq.spec import ITEM_BYTES, stored_tensors

MANY = (1, 8, 64, 1024)  # workers for which the time is told, beside those of this machine
# How configurations call the number of experts that a token is sent to.
PER_TOKEN = (
    *("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "num_selected_experts", "moe_topk"),
    *("moe_top_k", "moe_k", "top_k_experts", "top_k"),
)
SHARD = 1 << 30  # bytes of a shard, whose part of the adapter waits in memory
FACTOR = 4  # bytes of a number that is trained, of its gradient, and of each of the optimizer's two for it


def estimate(source: Source, tokens: int, workers: int = 0, calibrated: bool = False) -> dict[str, Any]:
    """CPU time, memory, disk and wall time of quantizing; memory of training.

    Args:
        tokens: of a batch, all sequences together.
        workers: 0: as many as this machine has CPUs.

    Returns: ``quantize`` and ``train``, plain values: seconds, bytes; and ``measured``, where the constants come from.
    """
    return {
        "quantize": _quantizing(source, workers or cpus(), calibrated),
        "train": _training(source, tokens),
        "measured": constants()["measured"],
    }


def _quantizing(source: Source, workers: int, calibrated: bool) -> dict[str, Any]:
    plan = source.plan
    each = [(seconds(*m.shape, plan.solve, m.quant, calibrated), m.count) for m in plan.matrices]
    jobs = [time for time, count in each for _ in range(count)]
    largest = max(memory(*m.shape, plan.solve, m.quant, calibrated) for m in plan.matrices)
    adapter = sum(m.adapter_numel * ITEM_BYTES[m.factors] for m in plan.matrices)
    backbone = sum(t.bytes for t in (*plan.matrices, *plan.kept))
    waiting = max(_beside_codes(m) for m in plan.matrices) + adapter * min(1, SHARD / backbone)
    base = constants()["bytes_of_process"] + round(waiting)
    output = backbone + adapter
    return {
        "cpu_seconds": sum(jobs),
        "largest_matrix_seconds": max(jobs),
        "seconds": {n: _wall(jobs, n) for n in sorted({workers, *MANY})},
        "workers": workers,
        "memory_per_worker": largest,
        "memory": base + workers * largest,
        "source": sum(file.size for file in source.checkpoint.files),
        "output": output,
        "disk": output + adapter,  # its pieces lie beside it until the end
    }


def _wall(jobs: list[float], workers: int) -> float:
    """Seconds until all is done, where each worker takes the next matrix when it is free."""
    free = [0.0] * min(workers, len(jobs))
    for job in jobs:
        heapq.heapreplace(free, free[0] + job)
    return max(free)


def _training(source: Source, tokens: int) -> dict[str, Any]:
    config = read_config(source.directory, quantized=True)
    item = ITEM_BYTES[dtype_of(config)]
    plan, found = source.plan, constants()
    own = [k for k in plan.kept if source.roles[k.name].module]
    trained = sum(m.adapter_numel for m in plan.matrices)
    active = _first(config, PER_TOKEN)
    features: Counter[Any] = Counter()
    for m in plan.matrices:
        times = min(active, m.experts) if active and m.experts else m.count
        place = source.roles[m.name].stack
        kept = found["floats_per_feature"] * sum(m.shape) * item
        kept += m.shape[1] * FACTOR if item < FACTOR else 0  # the input, in the dtype of the factors
        features[place and (place.name, place.index)] += round(times * kept * tokens)
    blocks = [kept for place, kept in features.items() if place]
    hidden = Counter(m.shape[1] for m in plan.matrices).most_common(1)[0][0]
    words = _first(config, ("vocab_size",)) if source.task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM") else 0
    parts = {
        "weights": sum(m.bytes - _beside_codes(m) for m in plan.matrices),
        "scales": sum(_beside_codes(m) for m in plan.matrices),
        "kept": sum(math.prod(k.shape) * item for k in own),
        "adapter": trained * FACTOR,
        "gradients": trained * FACTOR,
        "optimizer": 2 * trained * FACTOR,
        "decoding": max(m.shape[0] * m.shape[1] for m in plan.matrices) * item,
        "logits": round(tokens * words * found["bytes_per_logit"]),
    }
    everything = sum(features.values())
    again = max(0, max(blocks, default=0) - parts["logits"])  # a block is run again when the logits are gone
    saving = len(blocks) * tokens * hidden * item + again + everything - sum(blocks)
    fixed = sum(parts.values())
    return {
        "tokens": tokens,
        **parts,
        "activations": everything,
        "activations_with_checkpointing": min(everything, saving),
        "total": fixed + everything,
        "total_with_checkpointing": fixed + min(everything, saving),
    }


def _beside_codes(matrix: Matrix) -> int:
    """Bytes of all that is stored of a matrix but its codes."""
    _, codes = stored_tensors(matrix.quant, *matrix.shape)["weight"]
    return matrix.bytes - matrix.count * math.prod(codes)


def _first(config: dict[str, Any], names: tuple[str, ...]) -> int:
    """The first whole number that a configuration, or one nested in it, has under one of the names; 0 if none has."""
    for level in _levels(config):
        for name in names:
            if type(level.get(name)) is int:
                return level[name]
    return 0


def _levels(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from _levels(value)
