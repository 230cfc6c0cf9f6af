"""Metrics. Shares and correlations are in percent, as the paper prints them.

Accuracy, F1 and Matthews' correlation are scikit-learn's, Pearson's and Spearman's are SciPy's, ROUGE is Google's
rouge-score. SQuAD's two, a few lines, follow the definitions of arXiv 1606.05250, section 6.1.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

ROUGE = ("rouge2", "rouge1", "rougeL", "rougeLsum")
CLASSIFICATION = ("accuracy", "f1", "matthews_correlation")
REGRESSION = ("pearson", "spearman")


def classification(
    names: Sequence[str], predictions: ArrayLike, references: ArrayLike, classes: int
) -> dict[str, float]:
    """The metrics named: ``accuracy``; ``f1``, of class 1 if there are two, else the mean over all classes that occur;
    ``matthews_correlation``, 0 for a model that always says the same.
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    average = "binary" if classes == 2 else "macro"
    functions: dict[str, Callable[[], Any]] = {
        "accuracy": lambda: accuracy_score(references, predictions),
        "f1": lambda: f1_score(references, predictions, average=average, zero_division=0.0),  # type: ignore[arg-type]
        "matthews_correlation": lambda: matthews_corrcoef(references, predictions),
    }
    return {name: 100 * float(functions[name]()) for name in names}


def regression(predictions: ArrayLike, references: ArrayLike) -> dict[str, float]:
    """Pearson's and Spearman's correlation; 0 where one side is constant, which correlates with nothing."""
    from scipy.stats import pearsonr, spearmanr

    x, y = np.asarray(predictions, np.float64), np.asarray(references, np.float64)
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return dict.fromkeys(REGRESSION, 0.0)
    functions: dict[str, Any] = {"pearson": pearsonr, "spearman": spearmanr}
    return {name: 100 * float(functions[name](x, y).statistic) for name in REGRESSION}


def perplexity(nats: float, tokens: int) -> dict[str, float]:
    """``exp`` of the mean loss and that mean, in nats per token. Infinite where ``exp`` overflows."""
    mean = nats / tokens
    return {"perplexity": math.exp(mean) if mean < 700 else math.inf, "log_perplexity": mean, "tokens": tokens}


def normalized(answer: str) -> str:
    """An answer as SQuAD compares it: lower case, without punctuation, articles and superfluous blanks."""
    answer = "".join(c for c in answer.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", answer).split())


def _overlap(prediction: str, truth: str) -> float:
    """F1 of the words of two answers, as bags."""
    predicted, true = normalized(prediction).split(), normalized(truth).split()
    if not predicted or not true:
        return float(predicted == true)
    common = sum((Counter(predicted) & Counter(true)).values())
    return 2 * common / (len(predicted) + len(true))


def squad(predictions: Sequence[str], truths: Sequence[Sequence[str]]) -> dict[str, float]:
    """F1 and exact match of answers, each against whichever of its true answers fits best."""
    pairs = list(zip(predictions, truths, strict=True))
    f1 = sum(max(_overlap(p, t) for t in true) for p, true in pairs)
    exact = sum(any(normalized(p) == normalized(t) for t in true) for p, true in pairs)
    return {"f1": 100 * f1 / len(pairs), "exact_match": 100 * exact / len(pairs)}


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean F-measures with Porter's stemmer; ``rougeLsum`` is ROUGE-L of whole summaries, sentence by sentence."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    totals = dict.fromkeys(ROUGE, 0.0)
    for prediction, reference in zip(predictions, references, strict=True):
        scores = scorer.score("\n".join(sentences(reference)), "\n".join(sentences(prediction)))
        for name in ROUGE:
            totals[name] += scores[name].fmeasure
    return {name: 100 * total / len(predictions) for name, total in totals.items()}


_TITLES = r"(?<!\b(?:Mr|Dr|Ms|St|Jr|Sr|vs|Lt)\.)(?<!\b(?:Mrs|Gov|Sen|Rep|Gen|Col|Sgt)\.)"
_CLOSING, _OPENING = "[\"'\u201d\u2019)\\]]*", "[\"'\u201c\u2018(\\[]*"
_END = re.compile(rf"(?<=[.!?])(?<!\b[A-Z]\.){_TITLES}{_CLOSING}(\s+)(?={_OPENING}[A-Z0-9£$])")


def sentences(text: str) -> list[str]:
    """Sentences: lines, cut where a full stop, not of an initial or a title, is followed by a capital or a digit."""
    found = []
    for line in text.splitlines():
        start = 0
        for end in _END.finditer(line):
            found.append(line[start : end.start(1)])
            start = end.end()
        found.append(line[start:])
    return [sentence for sentence in map(str.strip, found) if sentence]


def lead3(document: str) -> str:
    """The baseline for summaries of news: the first three sentences."""
    return "\n".join(sentences(document)[:3])


def exact_match(predictions: Sequence[object], references: Sequence[object]) -> float:
    """Share of predictions equal to their reference; None, no answer found, is never right."""
    return 100 * sum(p is not None and p == r for p, r in zip(predictions, references, strict=True)) / len(references)


_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d+)?|\.\d+)")


def numbers(text: str) -> list[float]:
    """The signed decimals of a text, commas taken out first (1,000 is a thousand)."""
    return [float(match) for match in _NUMBER.findall(text.replace(",", ""))]


def last_number(text: str) -> float | None:
    """The last number of a text, or None."""
    found = numbers(text)
    return found[-1] if found else None
