"""MRPC of GLUE, the Microsoft Research Paraphrase Corpus: accuracy and F1 of the paraphrases."""

from loftq.finetune.tasks.base import Hub, Limits, plain_splits
from loftq.finetune.tasks.classification import TextClassification

TASK = TextClassification(
    name="mrpc",
    version=1,
    hub=Hub(path="nyu-mll/glue", config="mrpc", splits=plain_splits("train", "validation")),
    columns={"text": ("sentence1",), "text_pair": ("sentence2",), "label": ("label",)},
    labels=("not_equivalent", "equivalent"),
    metrics=("accuracy", "f1"),
    limits=Limits(max_length=128),
)
