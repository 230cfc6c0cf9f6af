"""ANLI (arXiv 1910.14599), its three rounds together: accuracy on the test sets."""

from loftq.finetune.tasks.base import Hub, Limits
from loftq.finetune.tasks.classification import TextClassification

TASK = TextClassification(
    name="anli",
    version=1,
    hub=Hub(
        path="facebook/anli",
        splits={
            "train": ("train_r1", "train_r2", "train_r3"),
            "validation": ("dev_r1", "dev_r2", "dev_r3"),
            "test": ("test_r1", "test_r2", "test_r3"),
        },
    ),
    columns={"text": ("premise", "context"), "text_pair": ("hypothesis",), "label": ("label",)},
    labels=("entailment", "neutral", "contradiction"),
    reported=("test",),
    limits=Limits(max_length=128),
)
