"""YAML as it is read: small files that would hang or fill the memory, and the schema."""

import math
import os

import pytest
from blobs import put

from loftq.errors import InputError
from loftq.formats import strict_yaml

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefghij", "bcdefghijk", strict=True)
)
REFUSED = [
    pytest.param(LAUGHS, "more than 10000 values, with those that aliases stand for", id="nested-anchors"),
    pytest.param("a: &a [*a]", r"\*a stands for what it is a part of", id="recursive-list"),
    pytest.param("&a {b: {c: *a}}", r"\*a stands for what it is a part of", id="recursive-mapping"),
    pytest.param("[" * 5000 + "]" * 5000, "more than 100 levels", id="brackets"),
    pytest.param("{a: " * 5000, "more than 100 levels", id="braces"),
    pytest.param("- " * 5000, "more than 100 levels", id="dashes"),
    pytest.param("? " * 5000, "more than 100 levels", id="keys-of-keys"),
    pytest.param("a: " + "9" * 6000, "number out of range: 9999", id="digits"),
    pytest.param("".join(f"k{i}: 1\n" for i in range(20_000)), "more than 10000 values", id="keys"),
    pytest.param("- &a x\n" * 9000, "duplicate anchor", id="anchors"),
    pytest.param("#" * (strict_yaml.MAX_BYTES + 1), "262145 bytes of YAML, at most 262144", id="bytes"),
    pytest.param("a: 1\nb: 2\na: 3", "key 'a' is given twice", id="key-twice"),
    pytest.param('a: "\\uD800"', "surrogates not allowed", id="surrogate"),
    pytest.param('a: "\\U00110000"', "not YAML", id="no-character"),
    pytest.param("a: \0", "not YAML", id="nul"),
    pytest.param("!!python/object/apply:os.system [true]", "could not determine a constructor", id="python"),
    pytest.param("a: !!timestamp x", "could not determine a constructor", id="timestamp"),
    pytest.param("a: !!binary x", "could not determine a constructor", id="binary"),
    pytest.param("a: !!int x", "no int: x", id="no-int"),
    pytest.param("a: !!bool perhaps", "no bool: perhaps", id="no-bool"),
    pytest.param("{[1]: 2}", "a key that is no word", id="list-as-key"),
    pytest.param("--- 1\n--- 2", "expected a single document", id="two-documents"),
]


@pytest.mark.parametrize(("text", "why"), REFUSED)
def test_refused(text, why):
    with pytest.raises(InputError, match=why) as caught:
        strict_yaml.loads(text, "recipe.yaml")
    message = str(caught.value)
    assert message.startswith("recipe.yaml: ")
    assert "\n" not in message
    assert len(message) < 500


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("012", 12),
        ("08", 8),
        ("-7", -7),
        ("1_000", "1_000"),
        ("0x1F", "0x1F"),
        ("12:30", "12:30"),
        ("no", "no"),
        ("True", True),
        ("~", None),
        ("", None),
        (".inf", math.inf),
        ("-.Inf", -math.inf),
        ("2001-01-01", "2001-01-01"),
        ("!!str 5", "5"),
        ("<<: {a: 1}", {"<<": {"a": 1}}),
        ("a: &x [1, 2]\nb: *x", {"a": [1, 2], "b": [1, 2]}),
    ],
)
def test_the_core_schema(text, value):
    found = strict_yaml.loads(text, "x")
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_only_regular_files_are_read(tmp_path, make):
    make(tmp_path / "recipe.yaml")
    with pytest.raises(InputError, match=r"recipe.yaml: not a regular file"):
        strict_yaml.load_file(tmp_path / "recipe.yaml")


def test_a_large_file_is_not_read(tmp_path):
    with open(put(tmp_path / "recipe.yaml", b""), "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InputError, match=r"1099511627776 bytes of YAML"):
        strict_yaml.load_file(tmp_path / "recipe.yaml")
