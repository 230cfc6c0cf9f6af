"""What Qwen3-30B-A3B takes, by `loftq plan --estimate`: packed experts of several widths and ranks, for one card.

    python benchmarks/forecast.py --output docs/data/forecast.json

A checkpoint with its shapes, whose files have headers and nothing behind them (a sparse file of 61 GB that takes no
room), is all that a plan reads. Nothing is measured here: see `tests/plan/test_estimate.py` for how far forecasts were
off where they were compared with measured memory.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import loftq
from loftq.formats.tensorfile import Entry, encode_header

TOKENS = 512
TWO = {"bits": "experts=2,4", "double_quant": True}
WAYS: dict[str, dict[str, Any]] = {
    "4 bits, rank 16": {"bits": "4", "rank": "16", "double_quant": True},
    "experts in 2 bits, rank 16": {**TWO, "rank": "16"},
    "experts in 2 bits, of rank 2": {**TWO, "rank": "experts=2,16"},
    "experts in 1.9375 bits, of rank 2": {"bits": "experts=1.9375,4", "rank": "experts=2,16", "code": "trellis"},
}


def write(directory: Path) -> int:
    """The headers of the checkpoint; its size."""
    config = Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_experts=128,
        num_experts_per_tok=8, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
        norm_topk_prob=True, tie_word_embeddings=False, dtype="bfloat16", architectures=["Qwen3MoeForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(directory)
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config)
    entries = [Entry(name, "BF16", tuple(tensor.shape)) for name, tensor in model.state_dict().items()]
    header = encode_header(entries, {"format": "pt"})
    size = len(header) + sum(entry.nbytes for entry in entries)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(size)
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as place:
        size = write(Path(place))
        for name, options in WAYS.items():
            plan = loftq.plan(place, estimate=True, tokens=TOKENS, progress=False, **options)
            found[name] = plan.estimate
            train = plan.estimate["train"]
            print(f"{name}: {json.dumps({k: round(v / 1e9, 2) for k, v in train.items() if k != 'tokens'})}")
    if given.output:
        given.output.write_text(json.dumps({"bytes": size, "tokens": TOKENS, "ways": found}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
