"""MultiNLI of GLUE (arXiv 1704.05426): accuracy on the matched and the mismatched development set."""

from loftq.finetune.tasks.base import Hub, Limits, plain_splits
from loftq.finetune.tasks.classification import TextClassification

TASK = TextClassification(
    name="mnli",
    version=1,
    hub=Hub(
        path="nyu-mll/glue", config="mnli", splits=plain_splits("train", "validation_matched", "validation_mismatched")
    ),
    columns={
        "text": ("premise", "sentence1"),
        "text_pair": ("hypothesis", "sentence2"),
        "label": ("label", "gold_label"),
    },
    labels=("entailment", "neutral", "contradiction"),
    reported=("validation_matched", "validation_mismatched"),
    limits=Limits(max_length=128),
)
