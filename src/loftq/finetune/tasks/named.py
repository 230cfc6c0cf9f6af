"""The tasks that come with the package: data set, prompt, classes and metrics of each, as the paper has them."""

import re
from typing import Any

from loftq.finetune.tasks.base import Hub, Limits, Task, plain_splits
from loftq.finetune.tasks.causal_lm import CausalLM
from loftq.finetune.tasks.classification import TextClassification
from loftq.finetune.tasks.instruction import Instruction
from loftq.finetune.tasks.metrics import last_number, numbers
from loftq.finetune.tasks.span_qa import SpanQA
from loftq.finetune.tasks.summarization import Summarization

ENTAILMENT = ("entailment", "not_entailment")
NLI = ("entailment", "neutral", "contradiction")
MARKER = "The final answer is: "


def _classify(name: str, hub: Hub, labels: tuple[str, ...], *text: tuple[str, ...], **more: Any) -> TextClassification:
    """A task on a text, or on a pair, each by the names that its column may have."""
    columns = {**dict(zip(("text", "text_pair"), text, strict=False)), "label": more.pop("label", ("label",))}
    return TextClassification(name=name, hub=hub, columns=columns, labels=labels, limits=Limits(max_length=128), **more)


def _glue(name: str, *splits: str) -> Hub:
    return Hub(path="nyu-mll/glue", config=name, splits=plain_splits("train", *(splits or ("validation",))))


def gsm8k_target(solution: str) -> str:
    """The solution as it is learned: the data set's, with its marker ``####`` in words."""
    return re.sub(r"#### *", lambda _: MARKER, solution).strip()


def gsm8k_answer(text: str) -> float | None:
    """The first number after the marker; without a marker, or a number after it, the last in the text, or None."""
    _, _, after = text.partition(MARKER.strip())
    return next(iter(numbers(after)), last_number(text))


# ANLI (arXiv 1910.14599), its three rounds together: accuracy on the test sets.
ANLI = _classify(
    "anli",
    Hub(
        path="facebook/anli",
        splits={
            ours: tuple(f"{theirs}_r{i}" for i in (1, 2, 3))
            for ours, theirs in (("train", "train"), ("validation", "dev"), ("test", "test"))
        },
    ),
    NLI,
    ("premise", "context"),
    ("hypothesis",),
    reported=("test",),
)

# CNN/DailyMail 3.0.0 (arXiv 1704.04368), highlights of news articles: ROUGE on the test set.
CNN_DAILYMAIL = Summarization(
    name="cnn_dailymail",
    hub=Hub(path="abisee/cnn_dailymail", config="3.0.0", splits=plain_splits("train", "validation", "test")),
    columns={"document": ("article", "document"), "summary": ("highlights", "summary")},
    reported=("test",),
    limits=Limits(max_length=512, max_target_length=128),
)

# CoLA of GLUE, the Corpus of Linguistic Acceptability (arXiv 1805.12471).
COLA = _classify(
    "cola",
    _glue("cola"),
    ("unacceptable", "acceptable"),
    ("sentence", "text"),
    metrics=("matthews_correlation", "accuracy"),
)

# GSM8K (arXiv 2110.14168): share of the test problems whose final number is right. As in the paper's script there are
# no examples, only the question and an instruction, whose wording is ours.
GSM8K = Instruction(
    name="gsm8k",
    hub=Hub(path="openai/gsm8k", config="main", splits=plain_splits("train", "test")),
    columns={"prompt": ("question",), "response": ("answer",)},
    template="{prompt}\nThink step by step first, then give the final number.\n",
    target=gsm8k_target,
    extract=gsm8k_answer,
    reported=("test",),
    generation={"max_new_tokens": 256},
    sampling={"do_sample": True, "temperature": 0.1, "top_k": 40, "top_p": 0.95, "seed": 42},
    limits=Limits(max_length=512),
)

# MultiNLI of GLUE (arXiv 1704.05426): accuracy on the matched and the mismatched development set.
MNLI = _classify(
    "mnli",
    _glue("mnli", "validation_matched", "validation_mismatched"),
    NLI,
    ("premise", "sentence1"),
    ("hypothesis", "sentence2"),
    label=("label", "gold_label"),
    reported=("validation_matched", "validation_mismatched"),
)

# MRPC of GLUE, the Microsoft Research Paraphrase Corpus; F1 is of the paraphrases.
MRPC = _classify(
    "mrpc",
    _glue("mrpc"),
    ("not_equivalent", "equivalent"),
    ("sentence1",),
    ("sentence2",),
    metrics=("accuracy", "f1"),
)

# QNLI of GLUE (arXiv 1804.07461), questions and sentences of SQuAD.
QNLI = _classify("qnli", _glue("qnli"), ENTAILMENT, ("question",), ("sentence",))

# QQP of GLUE, Quora's question pairs; F1 is of the duplicates.
QQP = _classify(
    "qqp",
    _glue("qqp"),
    ("not_duplicate", "duplicate"),
    ("question1",),
    ("question2",),
    label=("label", "is_duplicate"),
    metrics=("accuracy", "f1"),
)

# RTE of GLUE (arXiv 1804.07461).
RTE = _classify("rte", _glue("rte"), ENTAILMENT, ("sentence1", "premise"), ("sentence2", "hypothesis"))

# SQuAD v1.1 (arXiv 1606.05250): F1 and exact match on the development set.
SQUAD = SpanQA(
    name="squad",
    hub=Hub(path="rajpurkar/squad", splits=plain_splits("train", "validation")),
    columns={"context": ("context",), "question": ("question",), "answers": ("answers",)},
    limits=Limits(max_length=384, doc_stride=128),
)

# SST-2 of GLUE, the Stanford Sentiment Treebank.
SST2 = _classify("sst2", _glue("sst2"), ("negative", "positive"), ("sentence", "text"))

# STS-B of GLUE, likeness of sentences from 0 to 5.
STSB = _classify(
    "stsb",
    _glue("stsb"),
    (),
    ("sentence1",),
    ("sentence2",),
    label=("label", "score"),
    metrics=("pearson", "spearman"),
)

# WikiText-2, raw (arXiv 1609.07843), in blocks of 1024 tokens: perplexity on the validation set.
WIKITEXT2 = CausalLM(
    name="wikitext2",
    hub=Hub(path="Salesforce/wikitext", config="wikitext-2-raw-v1", splits=plain_splits("train", "validation", "test")),
    columns={"text": ("text",)},
    rows="lines",
    limits=Limits(max_length=1024),
)

# XSum (arXiv 1808.08745), one-sentence summaries of BBC articles: ROUGE on the test set.
XSUM = Summarization(
    name="xsum",
    hub=Hub(
        path="EdinburghNLP/xsum",
        revision="refs/convert/parquet",  # its main branch holds a script, which datasets 4 does not run
        splits=plain_splits("train", "validation", "test"),
    ),
    columns={"document": ("document", "article"), "summary": ("summary", "highlights")},
    reported=("test",),
    limits=Limits(max_length=512, max_target_length=128),
)

TASKS: dict[str, Task] = {
    task.name: task
    for task in (ANLI, CNN_DAILYMAIL, COLA, GSM8K, MNLI, MRPC, QNLI, QQP, RTE, SQUAD, SST2, STSB, WIKITEXT2, XSUM)
}
