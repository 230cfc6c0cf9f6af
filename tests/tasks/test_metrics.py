"""Metrics against published implementations, definitions written out, and figures worked out by hand."""

import math
import random

import numpy as np
import pytest
from torch import tensor
from torchmetrics.functional import matthews_corrcoef, pearson_corrcoef, spearman_corrcoef
from torchmetrics.functional.classification import binary_f1_score, multiclass_f1_score
from torchmetrics.functional.text.squad import squad as published_squad

from loftq.finetune.tasks import get_task, metrics
from loftq.finetune.tasks.named import gsm8k_answer as answer
from loftq.finetune.tasks.named import gsm8k_target as target

ANSWERS = [
    ("the cat", ["The cat!", "a dog"]),
    ("cat sat on a mat", ["the cat sat", "on the mat"]),
    ("", ["the"]),
    ("", ["cat"]),
    ("1,000 km", ["1000 km."]),
    ("cat cat cat", ["cat dog cat"]),
    ("Saint-Émilion", ["saint émilion", "SaintÉmilion"]),
    ("an answer", ["another answer altogether", "the answer"]),
    ("dog", ["cat"]),
]


def close(ours, published, tolerance=1e-4):  # torchmetrics computes in float32
    assert float(ours) == pytest.approx(100 * float(published), abs=100 * tolerance)


@pytest.mark.parametrize("seed", range(3))
def test_classification(seed):
    numbers = np.random.default_rng(seed)
    for classes in (2, 4):
        references, predictions = numbers.integers(0, classes, (2, 50))
        ours = metrics.classification(metrics.CLASSIFICATION, predictions, references, classes)
        assert ours["accuracy"] == 100 * np.mean(references == predictions)
        if classes == 2:
            f1 = binary_f1_score(tensor(predictions), tensor(references))
        else:
            f1 = multiclass_f1_score(tensor(predictions), tensor(references), classes, average="macro")
        close(ours["f1"], f1)
        task = "binary" if classes == 2 else "multiclass"
        close(
            ours["matthews_correlation"],
            matthews_corrcoef(tensor(predictions), tensor(references), task, num_classes=classes),
        )


@pytest.mark.parametrize("seed", range(3))
def test_regression(seed):
    numbers = np.random.default_rng(seed)
    references = numbers.integers(0, 6, 60).astype(float)  # with ties, as STS-B has them
    predictions = references + numbers.normal(size=60)
    ours = metrics.regression(predictions, references)
    close(ours["pearson"], pearson_corrcoef(tensor(predictions), tensor(references)))
    close(ours["spearman"], spearman_corrcoef(tensor(predictions), tensor(references)))


def test_a_model_that_always_says_the_same():
    constant = metrics.classification(metrics.CLASSIFICATION, [0, 0, 0, 0], [0, 1, 1, 0], 2)
    assert constant == {"accuracy": 50.0, "f1": 0.0, "matthews_correlation": 0.0}
    assert metrics.regression([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) == {"pearson": 0.0, "spearman": 0.0}
    assert metrics.regression([1.0], [1.0]) == {"pearson": 0.0, "spearman": 0.0}


def test_squad_against_torchmetrics():
    predictions = [{"prediction_text": p, "id": str(i)} for i, (p, _) in enumerate(ANSWERS)]
    truths = [{"id": str(i), "answers": {"text": t, "answer_start": [0] * len(t)}} for i, (_, t) in enumerate(ANSWERS)]
    published = published_squad(predictions, truths)
    ours = metrics.squad([p for p, _ in ANSWERS], [t for _, t in ANSWERS])
    assert ours == pytest.approx({key: float(value) for key, value in published.items()}, abs=1e-4)
    for prediction, true in ANSWERS:
        one = published_squad(
            [{"prediction_text": prediction, "id": "0"}],
            [{"id": "0", "answers": {"text": true, "answer_start": [0] * len(true)}}],
        )
        ours = metrics.squad([prediction], [true])
        assert ours == pytest.approx({key: float(value) for key, value in one.items()}, abs=1e-4), prediction


def test_squad_by_hand():
    assert metrics.squad(["the cat sat"], [["a cat sat down"]]) == {"f1": pytest.approx(80.0), "exact_match": 0.0}
    assert metrics.squad(["The  Cat."], [["dog", "cat"]]) == {"f1": 100.0, "exact_match": 100.0}


def ngrams(text, n):
    tokens = text.split()
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def rouge_n(prediction, reference, n):
    """ROUGE-N as Lin (2004) defines it, F-measure, for words that no stemmer changes."""
    a, b = ngrams(prediction, n), ngrams(reference, n)
    common = sum(min(a.count(gram), b.count(gram)) for gram in set(a))
    return 2 * common / (len(a) + len(b)) if a or b else 0.0


def longest(a, b):
    """Length of the longest common subsequence."""
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return 1 + longest(a[:-1], b[:-1])
    return max(longest(a[:-1], b), longest(a, b[:-1]))


@pytest.mark.parametrize("seed", range(5))
def test_rouge_by_its_definition(seed):
    choose = random.Random(seed)
    prediction, reference = (" ".join(choose.choices(["cat", "dog", "mat", "hat", "sun"], k=7)) for _ in range(2))
    ours = metrics.rouge([prediction], [reference])
    assert ours["rouge1"] == pytest.approx(100 * rouge_n(prediction, reference, 1))
    assert ours["rouge2"] == pytest.approx(100 * rouge_n(prediction, reference, 2))
    common = longest(prediction.split(), reference.split())
    assert ours["rougeL"] == ours["rougeLsum"] == pytest.approx(100 * common / 7)  # one sentence each


def test_rouge_against_torchmetrics():
    """Its ROUGE-1, -2 and -L do not need the NLTK data that its sentences need."""
    from torchmetrics.functional.text.rouge import rouge_score

    pairs = [
        ("The cats were sitting on the mat.", "A cat sat on mats"),
        ("Police killed the gunman", "The gunman was killed by police, they said"),
        ("nothing alike", "something else altogether"),
    ]
    predictions, references = map(list, zip(*pairs, strict=True))
    keys = ("rouge1", "rouge2", "rougeL")
    published = rouge_score(predictions, references, use_stemmer=True, rouge_keys=keys)
    ours = metrics.rouge(predictions, references)
    for key in keys:
        close(ours[key], published[f"{key}_fmeasure"])


def test_rouge_of_whole_summaries():
    """The order of sentences does not matter to ROUGE-Lsum, and does to ROUGE-L."""
    ours = metrics.rouge(["The dog ran. The cat sat."], ["The cat sat.\nThe dog ran."])
    assert ours["rougeLsum"] == pytest.approx(100)
    assert ours["rougeL"] == pytest.approx(50)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("Mr. Smith met J. R. Ewing. They spoke.", ["Mr. Smith met J. R. Ewing.", "They spoke."]),
        ('He said: "No." She left.', ['He said: "No."', "She left."]),
        ("It cost 3.5 million. About £2 each.", ["It cost 3.5 million.", "About £2 each."]),
        ("first line\n\nsecond line.", ["first line", "second line."]),
        ("e.g. this one", ["e.g. this one"]),
        ("", []),
    ],
)
def test_sentences(text, sentences):
    assert metrics.sentences(text) == sentences


def test_lead3():
    assert metrics.lead3("One. Two. Three. Four.") == "One.\nTwo.\nThree."
    assert metrics.lead3("One.") == "One."


def test_perplexity():
    assert metrics.perplexity(3 * math.log(8), 3) == pytest.approx(
        {"perplexity": 8, "log_perplexity": math.log(8), "tokens": 3}
    )
    assert metrics.perplexity(1e6, 10)["perplexity"] == math.inf


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2 + 3 = 5\nThe final answer is: 5", 5.0),
        ("The final answer is: $1,234.50 for 3 men", 1234.5),
        ("The final answer is: -7", -7.0),
        ("The final answer is 9, of 10", 10.0),  # not the marker
        ("It is 4. The final answer is: unknown", 4.0),
        ("so 3 and then 12.", 12.0),
        ("no number", None),
        ("", None),
    ],
)
def test_answers_of_gsm8k(text, number):
    assert answer(text) == number


def test_targets_of_gsm8k():
    solution = "Half is 48/2 = <<48/2=24>>24.\n#### 1,024"
    assert target(solution) == "Half is 48/2 = <<48/2=24>>24.\nThe final answer is: 1,024"
    assert answer(target(solution)) == 1024.0
    assert get_task("gsm8k").target is target  # type: ignore[attr-defined]


def test_exact_match():
    assert metrics.exact_match([1.0, None, 2.5, 3.0], [1, 2, 2.5, 4]) == 50.0
    assert metrics.exact_match([None], [None]) == 0.0
