"""A few rows for every task, as the hub has them, and as people have them who downloaded them elsewhere."""

TEXT = "the cat sat. the dog ran."
ENTAILED = {"premise": "a cat sat", "hypothesis": "an animal sat", "label": 0}
SAME = {"sentence1": "the cat sat", "sentence2": "the cat was sitting"}
ANSWERED = {
    "id": "q1",
    "title": "cats",
    "context": "the cat sat on the mat",
    "question": "where?",
    "answers": {"text": ["the mat", "on the mat"], "answer_start": [15, 12]},
}
NEWS = "The cat sat. The dog ran! Was it 3 pm? Nobody knew."
SOLVED = {"question": "What is 2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}

# task -> rows of the hub, other rows that mean the same
ROWS: dict[str, tuple[list[dict], list[dict]]] = {
    "anli": (
        [{"uid": "x", "reason": "", **ENTAILED, "label": label} for label in (0, 1, 2)],
        [
            {"context": "a cat sat", "hypothesis": "an animal sat", "label": name}
            for name in ("entailment", "neutral", "contradiction")
        ],
    ),
    "mnli": (
        [{**ENTAILED, "label": label, "idx": label} for label in (0, 1, 2)],
        [
            {"sentence1": "a cat sat", "sentence2": "an animal sat", "gold_label": name}
            for name in ("entailment", "neutral", "contradiction")
        ],
    ),
    "qnli": (
        [{"question": "who?", "sentence": "a cat", "label": label} for label in (0, 1)],
        [{"question": "who?", "sentence": "a cat", "label": name} for name in ("entailment", "not_entailment")],
    ),
    "rte": (
        [{**SAME, "label": label} for label in (0, 1)],
        [
            {"premise": "the cat sat", "hypothesis": "the cat was sitting", "label": name}
            for name in ("entailment", "not_entailment")
        ],
    ),
    "sst2": (
        [{"sentence": "a fine cat", "label": label} for label in (0, 1)],
        [{"text": "a fine cat", "label": name} for name in ("negative", "positive")],
    ),
    "mrpc": (
        [{**SAME, "label": label} for label in (0, 1)],
        [{**SAME, "label": name} for name in ("not_equivalent", "equivalent")],
    ),
    "cola": (
        [{"sentence": "cat the sat", "label": label} for label in (0, 1)],
        [{"sentence": "cat the sat", "label": name} for name in ("unacceptable", "acceptable")],
    ),
    "qqp": (
        [{"question1": "who?", "question2": "which?", "label": label} for label in (0, 1)],
        [{"question1": "who?", "question2": "which?", "is_duplicate": digit} for digit in ("0", "1")],
    ),
    "stsb": (
        [{**SAME, "label": label} for label in (0.0, 5.0)],
        [{**SAME, "score": score} for score in ("0", "5.0")],
    ),
    "squad": (
        [ANSWERED, {**ANSWERED, "id": "q2"}],
        [{k: v for k, v in ANSWERED.items() if k != "id"} for _ in range(2)],
    ),
    "xsum": ([{"document": NEWS, "summary": "a cat sat", "id": "1"}], [{"article": NEWS, "highlights": "a cat sat"}]),
    "cnn_dailymail": (
        [{"article": NEWS, "highlights": "a cat sat", "id": "1"}],
        [{"document": NEWS, "summary": "a cat sat"}],
    ),
    "wikitext2": (
        [{"text": ""}, {"text": " = Cats = \n"}, {"text": " The cat sat . \n"}],
        [{"text": t} for t in (" ", " = Cats = ", " The cat sat . ")],
    ),
    "gsm8k": ([SOLVED], [SOLVED]),
}
