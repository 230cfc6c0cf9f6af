"""CoLA of GLUE, the Corpus of Linguistic Acceptability (arXiv 1805.12471): Matthews' correlation."""

from loftq.finetune.tasks.base import Hub, Limits, plain_splits
from loftq.finetune.tasks.classification import TextClassification

TASK = TextClassification(
    name="cola",
    version=1,
    hub=Hub(path="nyu-mll/glue", config="cola", splits=plain_splits("train", "validation")),
    columns={"text": ("sentence", "text"), "label": ("label",)},
    labels=("unacceptable", "acceptable"),
    metrics=("matthews_correlation", "accuracy"),
    limits=Limits(max_length=128),
)
