"""Questions with long contexts: pieces, positions, and the span that is chosen."""

import numpy as np
import pytest
from datasets import Dataset

from loftq.errors import InputError, UsageError
from loftq.finetune.tasks import get_task, span_qa

CONTEXT = "".join(chr(97 + i % 26) for i in range(60))  # a letter a token: a token's offset is its number


def task_and_rows(*answers, max_length=30, doc_stride=10):
    rows = [
        {
            "id": str(i),
            "context": CONTEXT,
            "question": "  why",
            "answers": {"text": [CONTEXT[a:b]], "answer_start": [a]},
        }
        for i, (a, b) in enumerate(answers)
    ]
    return get_task("squad", max_length=max_length, doc_stride=doc_stride), Dataset.from_list(rows)


def test_pieces_overlap_by_the_stride(words):
    """[CLS] w h y [SEP], then 24 letters of which 10 are those of the piece before, then [SEP]."""
    task, rows = task_and_rows((20, 25))
    prepared = task.prepare(rows, words, train=False)
    assert [len(ids) for ids in prepared["input_ids"]] == [30, 30, 30, 24]
    covered = [[o for o in offsets if o[0] >= 0] for offsets in prepared["offsets"]]
    assert [(piece[0][0], piece[-1][1]) for piece in covered] == [(0, 24), (14, 38), (28, 52), (42, 60)]
    assert prepared["row"][:] == [0, 0, 0, 0]
    for ids, offsets in zip(prepared["input_ids"], prepared["offsets"], strict=True):
        letters = words.convert_ids_to_tokens([i for i, o in zip(ids, offsets, strict=True) if o[0] >= 0])
        assert "".join(letters) == CONTEXT[covered_of(offsets)]


def covered_of(offsets):
    inside = [o for o in offsets if o[0] >= 0]
    return slice(inside[0][0], inside[-1][1])


def test_only_a_piece_with_the_whole_answer_has_its_position(words):
    """Only a piece with the whole answer has its tokens; the others point at their first token."""
    task, rows = task_and_rows((20, 25), (0, 1), (59, 60), (10, 40))
    prepared = task.prepare(rows, words, train=True)
    assert set(prepared.column_names) == {
        "input_ids",
        "token_type_ids",
        "attention_mask",
        "start_positions",
        "end_positions",
    }
    found = list(zip(prepared["start_positions"], prepared["end_positions"], strict=True))
    assert found[:4] == [(0, 0), (5 + 6, 5 + 10), (0, 0), (0, 0)]
    assert found[4:8] == [(5, 5), (0, 0), (0, 0), (0, 0)]
    assert found[8:12] == [(0, 0), (0, 0), (0, 0), (5 + 17, 5 + 17)]
    assert found[12:] == [(0, 0)] * 4  # longer than any piece


def test_positions_within_tokens(letters):
    """An answer that begins or ends inside a token takes in the whole token."""
    offsets = [[-1, -1], [0, 4], [5, 9], [10, 12]]
    assert span_qa._token_span(offsets, {"text": ["ca"], "answer_start": [6]}) == (2, 2)
    assert span_qa._token_span(offsets, {"text": ["at x"], "answer_start": [7]}) == (2, 3)
    assert span_qa._token_span(offsets, {"text": ["beyond"], "answer_start": [11]}) == (0, 0)


def logits_for(prepared, spans, noise=0.0):
    """Outputs that prefer the given tokens ``(piece, first, last)``, ten above everything else."""
    generator = np.random.default_rng(0)
    starts = [noise * generator.normal(size=len(ids) + 3) for ids in prepared["input_ids"]]  # padded by three
    ends = [noise * generator.normal(size=len(ids) + 3) for ids in prepared["input_ids"]]
    for piece, first, last in spans:
        starts[piece][first] += 10
        ends[piece][last] += 10
    return starts, ends


def answers(task, rows, words, spans, noise=0.0):
    prepared = task.prepare(rows, words, train=False)
    starts, ends = logits_for(prepared, spans, noise)
    return span_qa.best_answers(list(rows["context"]), prepared["row"], prepared["offsets"], starts, ends)


def test_the_best_span_over_all_pieces(words):
    task, rows = task_and_rows((20, 25), (3, 6))
    assert answers(task, rows, words, [(1, 11, 15), (4, 8, 10)], 0.1) == [CONTEXT[20:25], CONTEXT[3:6]]


def test_what_is_never_an_answer(words):
    """The question, padding, an end before its start, more than 30 tokens, and nothing at all."""
    task, rows = task_and_rows((0, 1), max_length=100, doc_stride=10)
    assert answers(task, rows, words, [(0, 0, 0), (0, 2, 2), (0, 7, 9)], 0.1) != [""]
    prepared = task.prepare(rows, words, train=False)
    starts, ends = logits_for(prepared, [(0, 0, 0), (0, 2, 3), (0, 67, 67)])
    starts[0][10], ends[0][12] = 5, 5
    starts[0][40], ends[0][8] = 6, 6
    best = span_qa.best_answers([CONTEXT], prepared["row"], prepared["offsets"], starts, ends)
    assert best == [CONTEXT[5:8]]
    starts, ends = logits_for(prepared, [(0, 5, 36)])  # 32 tokens
    assert len(span_qa.best_answers([CONTEXT], prepared["row"], prepared["offsets"], starts, ends)[0]) <= 30


def brute_force(offsets, start, end):
    """The best span of a piece among all of them, for random logits."""
    inside = [i for i, o in enumerate(offsets) if o[0] >= 0]
    return max(
        ((start[i] + end[j], offsets[i][0], offsets[j][1]) for i in inside for j in inside if 0 <= j - i < 30),
    )


@pytest.mark.parametrize("seed", range(5))
def test_the_best_span_against_all_spans(seed, words):
    """With no more tokens than are looked at, the choice is the best of all spans."""
    generator = np.random.default_rng(seed)
    offsets = [[-1, -1]] * 4 + [[i, i + 1] for i in range(18)] + [[-1, -1]]
    starts, ends = generator.normal(size=(2, 3, len(offsets)))
    chosen = span_qa.best_answers([CONTEXT, CONTEXT], [0, 1, 1], [offsets] * 3, starts, ends)
    pieces = [brute_force(offsets, s, e) for s, e in zip(starts, ends, strict=True)]
    for row, (_, a, b) in enumerate((pieces[0], max(pieces[1:]))):
        assert chosen[row] == CONTEXT[a:b]


def test_a_trainer_gets_the_same_figures(words):
    task, rows = task_and_rows((20, 25), (3, 6))
    prepared = task.prepare(rows, words, train=False)
    starts, ends = logits_for(prepared, [(1, 11, 15), (4, 8, 12)])
    width = max(map(len, starts))
    padded = [np.stack([np.pad(x, (0, width - len(x)), constant_values=-100) for x in each]) for each in (starts, ends)]

    class Evaluated:
        predictions = tuple(padded)

    assert task.trainer_metrics(rows, prepared, words)(Evaluated) == {"f1": 50.0, "exact_match": 50.0}


def test_refusals(words):
    task, rows = task_and_rows((0, 1), max_length=18, doc_stride=12)
    with pytest.raises(
        InputError, match=r"row 1: its question of 3 tokens leaves too little of max_length 18 for .* 12"
    ):
        task.prepare(rows, words, train=True)
    task, rows = task_and_rows((0, 1), max_length=300)
    with pytest.raises(UsageError, match="max_length: 300 tokens are more than the model's 256; set max_length: 256"):
        task.prepare(rows, words, train=True)
