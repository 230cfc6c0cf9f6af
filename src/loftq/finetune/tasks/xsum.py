"""XSum (arXiv 1808.08745), one-sentence summaries of BBC articles: ROUGE on the test set."""

from loftq.finetune.tasks.base import Hub, Limits, plain_splits
from loftq.finetune.tasks.summarization import Summarization

TASK = Summarization(
    name="xsum",
    version=1,
    hub=Hub(
        path="EdinburghNLP/xsum",
        revision="refs/convert/parquet",  # its main branch holds a script, which datasets 4 does not run
        splits=plain_splits("train", "validation", "test"),
    ),
    columns={"document": ("document", "article"), "summary": ("summary", "highlights")},
    reported=("test",),
    limits=Limits(max_length=512, max_target_length=128),
)
