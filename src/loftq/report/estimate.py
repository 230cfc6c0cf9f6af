"""The forecast of quantizing and training, for the terminal."""

from typing import Any

from loftq.report.tables import console, plain_table
from loftq.spelled import spell_size, spell_time

PARTS = {
    "weights": "packed weights",
    "scales": "scales",
    "kept": "dense weights",
    "adapter": "adapter",
    "gradients": "its gradients",
    "optimizer": "its optimizer state (AdamW)",
    "decoding": "one decoded matrix",
    "logits": "logits",
    "activations": "activations",
    "activations_with_checkpointing": "activations with checkpointing",
    "total": "total",
    "total_with_checkpointing": "total with checkpointing",
}


def print_estimate(estimate: dict[str, Any]) -> None:
    """Two tables: quantizing, and training."""
    quantize, train, out = estimate["quantize"], estimate["train"], console()
    out.print()
    table = plain_table(("to quantize", "left"), ("", "right"))
    table.add_row("CPU time", spell_time(quantize["cpu_seconds"]))
    table.add_row("CPU time of the largest matrix", spell_time(quantize["largest_matrix_seconds"]))
    for workers, seconds in quantize["seconds"].items():
        here = " (this machine)" if workers == quantize["workers"] else ""
        table.add_row(f"time, {workers} worker{'s' * (workers > 1)}{here}", spell_time(seconds))
    table.add_row("memory of a worker", spell_size(quantize["memory_per_worker"]))
    table.add_row(f"memory with {quantize['workers']} workers, here", spell_size(quantize["memory"]))
    table.add_row("source", spell_size(quantize["source"]))
    table.add_row("output, with the adapter", spell_size(quantize["output"]))
    table.add_row("disk while it is made", spell_size(quantize["disk"]))
    out.print(table)
    out.print()
    table = plain_table((f"memory to train, {train['tokens']:,} tokens a batch", "left"), ("", "right"))
    for part, name in PARTS.items():
        table.add_row(name, spell_size(train[part]))
    out.print(table)
    out.print(
        f"With the constants that benchmarks/constants.py measured on {estimate['measured'].get('cpu', 'a CPU')}."
    )
