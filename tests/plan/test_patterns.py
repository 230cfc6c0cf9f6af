"""``PATTERN=VALUE,…,DEFAULT``: what a pattern matches, which one decides, what is refused."""

import pytest

from loftq.errors import UsageError
from loftq.planning import parse_rules
from loftq.planning.patterns import matches


def rules(text):
    return parse_rules("--bits", text, int)


@pytest.mark.parametrize(
    ("pattern", "module", "expected"),
    [
        ("layers", "model.layers.0.mlp", True),
        ("layer", "model.layers.0.mlp", False),
        ("layers.0", "model.layers.0.mlp.up_proj", True),
        ("layers.0", "model.layers.10.mlp.up_proj", False),
        ("layers.1", "model.layers.11", False),
        ("0.mlp", "model.layers.0.mlp.up_proj", True),
        ("0.up_proj", "model.layers.0.mlp.up_proj", False),
        ("layers.0-3", "model.layers.3.mlp", True),
        ("layers.0-3", "model.layers.4.mlp", False),
        ("layers.0-3", "model.layers.30.mlp", False),
        ("layers.08-10", "model.layers.9.mlp", True),
        ("layers.3-0", "model.layers.2.mlp", False),
        ("*_proj", "model.layers.0.self_attn.q_proj", True),
        ("*_proj", "model.layers.0.self_attn.q_proj_norm", False),
        ("[qk]_proj", "model.layers.0.self_attn.q_proj", True),
        ("[qk]_proj", "model.layers.0.self_attn.v_proj", False),
        ("layers.*.mlp", "model.layers.0.mlp", True),
        ("layers.*.mlp", "model.layers.0.self_attn.mlp", False),
        ("q?proj", "q_proj", True),
        ("Q_PROJ", "model.q_proj", False),
        ("a.b.c.d", "a.b.c", False),
        ("a-b", "x.a-b.y", True),
        ("1-b", "x.1-b", True),
        ("", "model", False),
    ],
)
def test_a_pattern_is_a_run_of_the_parts_of_a_name(pattern, module, expected):
    assert matches(pattern, module) is expected


def test_the_first_match_decides():
    bits = rules("layers.0-3=4,q_proj=8,2")
    assert bits("model.layers.0.q_proj") == 4
    assert bits("model.layers.4.q_proj") == 8
    assert bits("model.layers.4.v_proj") == 2
    assert rules("q_proj=8,layers.0-3=4,2")("model.layers.0.q_proj") == 8


def test_a_default_may_stand_anywhere_and_spaces_do_not_count():
    assert rules("2, layers.0 = 4 ").rules == (("layers.0", 4),)
    assert rules("2, layers.0 = 4 ").default == 2
    assert rules("4").rules == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layers.0-3=4", r"--bits: layers.0-3=4 needs exactly one value without a pattern"),
        ("4,2", "needs exactly one value without a pattern"),
        ("=4,2", "=4 has nothing before the '='"),
        (" =4,2", "=4 has nothing before the '='"),
    ],
)
def test_texts_that_cannot_be_meant(text, message):
    with pytest.raises(UsageError, match=message):
        rules(text)


def test_a_pattern_that_matches_nothing_names_the_nearest():
    modules = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(12) for p in "qkvo"]
    with pytest.raises(UsageError, match=r"--bits: layers.0.self_atn.q_proj matches no module; the nearest are model"):
        rules("layers.0.self_atn.q_proj=4,2").refuse_unmatched("--bits", modules)
    rules("layers.0.self_attn=4,2").refuse_unmatched("--bits", modules)
    with pytest.raises(UsageError) as refused:
        rules("nonsense\x1b[31m=4,2").refuse_unmatched("--bits", modules)
    assert "\x1b" not in str(refused.value)
    assert str(refused.value).count("model.layers") <= 5
