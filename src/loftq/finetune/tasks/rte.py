"""RTE of GLUE (arXiv 1804.07461): accuracy."""

from loftq.finetune.tasks.base import Hub, Limits, plain_splits
from loftq.finetune.tasks.classification import TextClassification

TASK = TextClassification(
    name="rte",
    version=1,
    hub=Hub(path="nyu-mll/glue", config="rte", splits=plain_splits("train", "validation")),
    columns={"text": ("sentence1", "premise"), "text_pair": ("sentence2", "hypothesis"), "label": ("label",)},
    labels=("entailment", "not_entailment"),
    limits=Limits(max_length=128),
)
