"""QNLI of GLUE (arXiv 1804.07461), questions and sentences of SQuAD: accuracy."""

from loftq.finetune.tasks.base import Hub, Limits, plain_splits
from loftq.finetune.tasks.classification import TextClassification

TASK = TextClassification(
    name="qnli",
    version=1,
    hub=Hub(path="nyu-mll/glue", config="qnli", splits=plain_splits("train", "validation")),
    columns={"text": ("question",), "text_pair": ("sentence",), "label": ("label",)},
    labels=("entailment", "not_entailment"),
    limits=Limits(max_length=128),
)
