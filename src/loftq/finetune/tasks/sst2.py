"""SST-2 of GLUE, the Stanford Sentiment Treebank: accuracy."""

from loftq.finetune.tasks.base import Hub, Limits, plain_splits
from loftq.finetune.tasks.classification import TextClassification

TASK = TextClassification(
    name="sst2",
    version=1,
    hub=Hub(path="nyu-mll/glue", config="sst2", splits=plain_splits("train", "validation")),
    columns={"text": ("sentence", "text"), "label": ("label",)},
    labels=("negative", "positive"),
    limits=Limits(max_length=128),
)
