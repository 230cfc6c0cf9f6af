"""STS-B of GLUE, likeness of sentences from 0 to 5: Pearson's and Spearman's correlation."""

from loftq.finetune.tasks.base import Hub, Limits, plain_splits
from loftq.finetune.tasks.classification import TextClassification

TASK = TextClassification(
    name="stsb",
    version=1,
    hub=Hub(path="nyu-mll/glue", config="stsb", splits=plain_splits("train", "validation")),
    columns={"text": ("sentence1",), "text_pair": ("sentence2",), "label": ("label", "score")},
    labels=(),
    metrics=("pearson", "spearman"),
    limits=Limits(max_length=128),
)
