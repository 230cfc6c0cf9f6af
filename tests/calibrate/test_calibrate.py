"""``loftq calibrate`` as a command, and ``loftq.calibrate`` as a call."""

import json
import re

import datasets  # noqa: F401  # imported once, before the first fork
import pytest
import small
import torch

import loftq
import loftq.report.calibration
from harness import cli, refused, tree
from loftq.architecture.loading import load_tokenizer
from loftq.calibration.calibrate import length_for, open_statistics
from loftq.errors import InputError, UsageError


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("calibrate")
    small.checkpoint(directory / "bert")
    small.checkpoint(directory / "llama", "llama")
    small.text(directory)
    return directory


@pytest.fixture(scope="module")
def made(place):
    command = ("calibrate", place / "bert", "-o", place / "made", "--data", place / "text.txt", "--max-length", "10")
    return (*command, "--samples", "12"), cli(*command, "--samples", "12")


def test_what_is_made_and_said(place, made):
    _, ended = made
    assert ended.code == 0, ended.err
    assert "13 in 9" in ended.out
    assert "90 + 30" in ended.out
    assert "--samples" in ended.out, "too few tokens: how many would be enough"
    lines = [line for line in re.split(r"[\r\n]+", ended.err) if line]
    assert all(line.startswith("calibrate:") for line in lines), ended.err
    assert "100%" in lines[-1]
    assert set(tree(place / "made")) == {"statistics.json", *(f"block-0000{i}.safetensors" for i in range(3))}
    assert len(open_statistics(place / "made").modules) == 13


def test_the_same_command_again(place, made):
    before = tree(place / "made")
    ended = cli(*made[0])
    assert ended.code == 0
    assert "already done" in ended.out
    assert tree(place / "made") == before
    refused(cli(*made[0], "--kind", "diagonal"), 5, "statistics of another call", "options.kind: full -> diagonal")
    assert tree(place / "made") == before


def test_json_has_tokens_matrices_and_bytes(place, made):
    ended = cli(*made[0], "--json")
    assert ended.code == 0
    told = json.loads(ended.out)
    assert (told["tokens_fit"], told["tokens_held"], told["matrices"], told["groups"]) == (90, 30, 13, 9)
    assert told["bytes"] == sum(len(raw) for name, raw in tree(place / "made").items() if name.startswith("block"))


@pytest.mark.parametrize("kind", ["diagonal", "fisher"])
def test_diagonal_and_fisher_statistics_have_vectors(place, kind, tmp_path):
    out = tmp_path / "out"
    ended = cli(
        "calibrate", place / "llama", "-o", out, "--data", place / "text.txt", "--max-length", "10", "--kind", kind
    )
    assert ended.code == 0, ended.err
    statistics = open_statistics(out)
    moments = statistics.moments("model.layers.0.mlp.down_proj")
    assert moments is not None
    assert moments.fit.columns.shape == (40,)
    assert (moments.fit.rows is not None) == (kind == "fisher")
    assert moments.held is not moments.fit


def test_refusals(place, made, tmp_path):
    data = ("--data", place / "text.txt")
    out = ("-o", tmp_path / "out")
    bert = ("calibrate", place / "bert")
    refused(cli(*bert, *out), 2, "--data")
    refused(cli(*bert, *data), 2, "--output")
    refused(cli(*bert, *out, *data, "--kind", "half"), 2, "--kind")
    refused(cli(*bert, *out, *data, "--samples", "3"), 2, "--samples")
    refused(cli(*bert, *out, *data, "--max-length", "-1"), 2, "--max-length")
    refused(cli(*bert, *out, *data, "--max-length", "41"), 2, "more than the 40 that the model takes")
    refused(cli(*bert, *out, *data, "--kind", "fisher"), 2, "BertModel has none")
    refused(cli(*bert, *out, "--data", tmp_path / "none.txt"), 3, "none.txt: no such file")
    refused(cli("calibrate", tmp_path / "none", *out, *data), 3, "no such directory")
    refused(cli("calibrate", place / "made", *out, *data), 3, "config.json")
    refused(cli(*bert, "-o", place / "bert" / "in", *data), 2, "lies in the model")
    refused(cli(*bert, "-o", place, *data), 5, "holds what loftq did not put there")
    refused(cli(*bert, "-o", place / "text.txt", *data), 5, "not a directory")
    assert tree(tmp_path) == {}


def test_no_tokenizer(place, tmp_path):
    for path in (place / "bert").iterdir():
        if not path.name.startswith("token"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    asked = ("calibrate", tmp_path, "-o", tmp_path.parent / "x", "--data", place / "text.txt")
    refused(cli(*asked), 3, "no tokenizer that can be read: none of tokenizer.json, vocab.txt exists")
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    refused(cli(*asked), 3, "does not know 95% of the text's tokens")


def test_a_model_without_any_tokenizer(tmp_path):
    """transformers would advise to install sentencepiece."""
    small.models.tiny("llama").save_pretrained(tmp_path / "llama")
    with pytest.raises(InputError, match="no tokenizer that can be read: no file of one is there"):
        load_tokenizer(tmp_path / "llama")


@pytest.mark.parametrize(
    ("name", "asked", "length"), [("bert", 0, 40), ("roberta", 0, 38), ("llama", 0, 64), ("t5", 0, 512), ("gpt2", 9, 9)]
)
def test_the_length_that_a_model_takes(name, asked, length):
    """RoBERTa's 40 positions begin after that of padding."""
    model = small.models.tiny(name)
    assert length_for(model, None, asked) == length
    if length < 512:
        with pytest.raises(UsageError, match="more than the"):
            length_for(model, None, 65)


def test_a_loaded_model(place):
    model, tokenizer = small.models.tiny("bert"), small.tokenizer()
    lines = (place / "text.txt").read_text().splitlines()
    by_file = loftq.calibrate(model, place / "text.txt", tokenizer, samples=12, max_length=10, progress=False)
    stored = open_statistics(place / "made")
    module = "encoder.layer.1.intermediate.dense"
    assert small.away(by_file.moments(module).fit.columns, stored.moments(module).fit.columns) < 1e-6
    by_text = loftq.calibrate(model, lines, tokenizer, samples=12, progress=False)
    padded = tokenizer(lines[:12], padding="max_length", max_length=15, return_tensors="pt")
    by_batch = loftq.calibrate(model, [padded], samples=12, kind="diagonal", progress=False)
    torch.testing.assert_close(
        by_text.moments(module).fit.columns.diagonal(), by_batch.moments(module).fit.columns, rtol=1e-5, atol=0
    )
    assert by_text.moments(module).tokens == by_batch.moments(module).tokens == 9 * 8


def test_what_a_loaded_model_needs():
    model = small.models.tiny("bert")
    with pytest.raises(UsageError, match="texts need a tokenizer"):
        loftq.calibrate(model, ["w1 w2"] * 5, progress=False)
    with pytest.raises(InputError, match="the data given: too little text: 0 samples"):
        loftq.calibrate(model, [], progress=False)
    with pytest.raises(UsageError, match=r"^kind must be one of .*, got 'both'"):
        loftq.calibrate(model, [], kind="both", progress=False)
