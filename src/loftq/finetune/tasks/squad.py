"""SQuAD v1.1 (arXiv 1606.05250): F1 and exact match on the development set."""

from loftq.finetune.tasks.base import Hub, Limits, plain_splits
from loftq.finetune.tasks.span_qa import SpanQA

TASK = SpanQA(
    name="squad",
    version=1,
    hub=Hub(path="rajpurkar/squad", splits=plain_splits("train", "validation")),
    columns={"context": ("context",), "question": ("question",), "answers": ("answers",)},
    limits=Limits(max_length=384, doc_stride=128),
)
