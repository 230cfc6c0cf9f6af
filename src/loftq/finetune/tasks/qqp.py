"""QQP of GLUE, Quora's question pairs: accuracy and F1 of the duplicates."""

from loftq.finetune.tasks.base import Hub, Limits, plain_splits
from loftq.finetune.tasks.classification import TextClassification

TASK = TextClassification(
    name="qqp",
    version=1,
    hub=Hub(path="nyu-mll/glue", config="qqp", splits=plain_splits("train", "validation")),
    columns={"text": ("question1",), "text_pair": ("question2",), "label": ("label", "is_duplicate")},
    labels=("not_duplicate", "duplicate"),
    metrics=("accuracy", "f1"),
    limits=Limits(max_length=128),
)
