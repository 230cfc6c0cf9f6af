"""CNN/DailyMail 3.0.0 (arXiv 1704.04368), highlights of news articles: ROUGE on the test set."""

from loftq.finetune.tasks.base import Hub, Limits, plain_splits
from loftq.finetune.tasks.summarization import Summarization

TASK = Summarization(
    name="cnn_dailymail",
    version=1,
    hub=Hub(
        path="abisee/cnn_dailymail",
        config="3.0.0",
        splits=plain_splits("train", "validation", "test"),
    ),
    columns={"document": ("article", "document"), "summary": ("highlights", "summary")},
    reported=("test",),
    limits=Limits(max_length=512, max_target_length=128),
)
