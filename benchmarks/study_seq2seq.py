"""Fine-tuning a small BART to summarize: ROUGE on XSum and CNN/DailyMail against Lead-3, at 16, 4 and 2 bits.

    python benchmarks/study_seq2seq.py --data DIR --model SMALL-BART --minutes 60    # until nothing is missing
    python benchmarks/study_seq2seq.py --data DIR --model SMALL-BART --size full     # for a GPU

examples/pretrain.py --architecture bart makes such a model; of the articles, give it only those fitted on here. The
data are not the official training sets (MANIFEST.md of the data directory): XSum is fitted on 926 articles and
evaluated on other ones, CNN/DailyMail on 500 of the validation set and evaluated on 500 of the test set. T = 1, as the
paper has it for BART.
"""

import argparse
import sys
from typing import Any

import study

TASKS = {
    "xsum": {"train": "xsum/part_b_dedup.jsonl.gz", "test": "xsum/part_a_1000.jsonl.gz"},
    "cnn_dailymail": {
        "train": "cnn_dailymail/validation_subset.jsonl.gz",
        "test": "cnn_dailymail/test_subset.jsonl.gz",
    },
}
RATES = {"learning_rates": [1.0e-3, 4.0e-3], "further_rates": [2.5e-4, 8.0e-3]}
FULL_RATES = {"learning_rates": [2.0e-4, 1.0e-3], "further_rates": [5.0e-5, 2.0e-3]}


def recipe(given: argparse.Namespace, task: str) -> study.Recipe:
    small = given.size == "small"
    limits: dict[str, Any] = {"max_eval_samples": 200} if small else {}
    both = ["qlora", "loftq"]
    arms: list[dict[str, Any]] = [
        {"method": "full", **FULL_RATES, "seeds": [0]},
        {"method": "lora"},
        {"method": both, "quantization.bits": [4, 2]},
    ]
    if not small:
        arms += [{"method": both, "quantization.bits": 4, "quantization.code": "uniform-tensor"}]
        arms += [{"method": "loftq", "quantization.steps": [5, 10], "quantization.bits": [4, 2]}]
    return study.recipe(
        given,
        task,
        {**TASKS[task], **limits},
        {
            "method": "loftq",
            "quantization": {"bits": 4, "preset": "loftq", "steps": 1},
            "lora": {"rank": 16},
            "training": {
                "max_steps": 200 if small else 2000,
                "per_device_train_batch_size": 8 if small else 16,
                "per_device_eval_batch_size": 32,
                "warmup_steps": 0.1,
                "bf16": True,
            },
            "generation": {"num_beams": 1 if small else 4, "max_new_tokens": 48 if task == "xsum" else 64},
            "max_length": 256,
            "max_target_length": 64,
            "compare": {"seeds": [0, 1, 2], **RATES, "arms": arms},
        },
    )


def main() -> None:
    given = study.options(__doc__ or "", model=None, tasks=tuple(TASKS))
    study.run("seq2seq", given, [recipe(given, task) for task in TASKS])


if __name__ == "__main__":
    sys.exit(main())
