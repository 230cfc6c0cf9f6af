"""When a run has not converged: the rule behind the ``N.A.`` in a table of results."""

import math
from collections import Counter
from typing import Any

from datasets import Dataset

from loftq.finetune.tasks import Task


def constant_answer(task: Task, examples: Dataset, tokenizer: Any) -> tuple[str, float]:
    """The metric a run is judged by, and its value for the best answer that does not look at the input.

    ======================================  ====================================================================
    accuracy                                share of the most frequent class
    perplexity                              exp of the entropy of the tokens' frequencies, both of these very rows
    F1, exact match, ROUGE, correlations    0
    ======================================  ====================================================================

    A task that measures the perplexity of its answers too is judged by that: a small model may have learned much and
    still solve no problem.
    """
    if task.kind in ("causal-lm", "instruction"):
        rows = task.prepare(examples, tokenizer, train=False)["labels"]
        counts = Counter(label for row in rows for label in row if label >= 0)
        total = sum(counts.values())
        return "perplexity", math.exp(sum(-n / total * math.log(n / total) for n in counts.values()))
    if task.main_metric == "accuracy":
        labels = examples["label"]
        return "accuracy", 100 * max(Counter(labels).values()) / len(labels)
    return task.main_metric, 0.0


def failure(metrics: dict[str, float], judged_by: str, constant: float) -> str | None:
    """Why a finished run counts as not converged; None if it does converge."""
    odd = [name for name, value in metrics.items() if not math.isfinite(value)]
    if odd:
        return f"{odd[0]} is {metrics[odd[0]]}"
    value = metrics[judged_by]
    if value >= constant if judged_by == "perplexity" else value <= constant:
        return f"{judged_by} {value:.5g} is no better than {constant:.5g}, what the best constant answer has"
    return None
