"""Fine-tuning a small Llama: perplexity on WikiText before and after, at 16 to 2 bits; with --size full also GSM8K.

    python benchmarks/study_decoder.py --data DIR --model SMALL-LLAMA --minutes 60   # until nothing is missing
    python benchmarks/study_decoder.py --data DIR --model SMALL-LLAMA --size full    # for a GPU

examples/pretrain.py makes such a model. Fitted on the beginning of WikiText-103's training set, evaluated on its
validation set, which has the articles of WikiText-2's. The widths are those of the paper's Table 5 and Figure 1, by its
rule: at an average of 3 bits the first half of the layers has 4, at 2.5 the first quarter, at 2.25 the first eighth,
which of six layers is none; there the first layer's MLP, two thirds of its weights, has 4.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import study

WIKITEXT = {"train": "wikitext/wt103.train_prefix.txt.gz", "validation": "wikitext/wt103.valid.txt.gz"}
GSM8K = {"train": "gsm8k/train.jsonl.gz", "test": "gsm8k/test.jsonl.gz"}
WIDTHS = [4, "3.0", 2.5, "layers.0.mlp=4,2", 2]
RATES = {"learning_rates": [1.0e-3, 4.0e-3], "further_rates": [2.5e-4, 1.6e-2]}


def recipe(
    given: argparse.Namespace,
    task: str,
    widths: Sequence[float | str] = WIDTHS,
    *,
    batch_size: int = 8,
    trellis: bool = True,
) -> study.Recipe:
    small = given.size == "small"
    training: dict[str, Any] = {"warmup_steps": 0.1, "lr_scheduler_type": "cosine", "weight_decay": 0.0}
    if task == "wikitext2":
        files, length = WIKITEXT, 256
        training |= {"max_steps": 120 if small else 600, "per_device_train_batch_size": batch_size}
        training["eval_on_start"] = True
    else:
        files, length = GSM8K, 512
        training |= {"max_steps": 1000, "per_device_train_batch_size": 16}
    return study.recipe(
        given,
        task,
        {**files, **({"max_eval_samples": 1000} if small else {})},
        {
            "method": "loftq",
            "quantization": {"bits": 2, "preset": "loftq"},
            "lora": {"rank": 16},
            "training": training,
            "max_length": length,
            "compare": {
                "seeds": [0, 1, 2],
                **RATES,
                "arms": [
                    {"method": "lora"},
                    {"method": ["qlora", "loftq"], "quantization.bits": list(widths)},
                    {"method": "loftq", "quantization.preset": "fitted"},
                    {
                        "method": "loftq",
                        "quantization.preset": "descent",
                        "quantization.calibrate": str(given.data / WIKITEXT["train"]),
                    },
                    *(study.trellis_arms(given.data / WIKITEXT["train"]) if trellis else ()),
                ],
            },
        },
    )


def main() -> None:
    given = study.options(__doc__ or "", model=None, tasks=("wikitext2", "gsm8k"))
    tasks = ["wikitext2"] if given.size == "small" else ["wikitext2", "gsm8k"]
    study.run("decoder", given, [recipe(given, task) for task in tasks])


if __name__ == "__main__":
    sys.exit(main())
