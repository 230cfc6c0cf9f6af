"""Strict JSON: what is read, what is refused and with which words."""

import json
import math
import os

import pytest
from blobs import put

from loftq.errors import InputError
from loftq.formats import strict_json

REFUSED = [
    pytest.param(b'{"a": 1, "a": 2}', "duplicate name 'a'", id="duplicate"),
    pytest.param(b'{"x": {"a": 1, "b": 2, "a": 1}}', "duplicate name 'a'", id="inner-duplicate"),
    pytest.param(b'{"a": 1, "\\u0061": 2}', "duplicate name 'a'", id="escaped-duplicate"),
    pytest.param(b'{"a": NaN}', "NaN is not a JSON number", id="nan"),
    pytest.param(b'{"a": -Infinity}', "-Infinity is not a JSON number", id="infinity"),
    pytest.param(b'{"a": 1e999}', "number out of range: 1e999", id="overflow"),
    pytest.param(b"\xef\xbb\xbf{}", "byte order mark", id="bom"),
    pytest.param(b'{"a": "\xff"}', "utf-8", id="not-utf8"),
    pytest.param('{"a": 1}'.encode("utf-16"), "utf-8", id="utf16"),
    pytest.param(b'{"a": "\\ud800"}', "surrogates not allowed", id="lone-surrogate"),
    pytest.param(b'{"\\udc00": 1}', "surrogates not allowed", id="lone-surrogate-key"),
    pytest.param(b"[" * 1_000_000, "more than 100 levels", id="deep-open"),
    pytest.param(b"[" * 101 + b"]" * 101, "more than 100 levels", id="deep-101"),
    pytest.param(b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "more than 100 levels", id="deep-objects"),
    pytest.param(b"9" * 5000, "not strict JSON", id="5000-digits"),
    pytest.param(b"[-" + b"9" * 101 + b"]", "number out of range: -999", id="101-digits"),
    pytest.param(b"[" + b"{}," * 1_000_001 + b"0]", "more than 2000000 values", id="two-million-values"),
    pytest.param(b"", "not strict JSON", id="empty"),
    pytest.param(b'{"a": 1} x', "not strict JSON", id="trailing"),
    pytest.param(b'{"a": 1,}', "not strict JSON", id="trailing-comma"),
    pytest.param(b"{'a': 1}", "not strict JSON", id="single-quotes"),
    pytest.param(b'{"a": 01}', "not strict JSON", id="leading-zero"),
    pytest.param(b'{"a": "\n"}', "not strict JSON", id="raw-newline"),
    pytest.param(b'{"a": 1}\0', "not strict JSON", id="trailing-nul"),
]


@pytest.mark.parametrize(("raw", "why"), REFUSED)
def test_refused(raw, why):
    with pytest.raises(InputError, match=why) as caught:
        strict_json.loads(raw, "config.json")
    message = str(caught.value)
    assert message.startswith("config.json: ")
    assert "\n" not in message
    assert len(message) < 300


def test_refused_by_size_before_parsing():
    with pytest.raises(InputError, match=r"x: 9 bytes of JSON, at most 8"):
        strict_json.loads(b"[" * 9, "x", max_bytes=8)


def test_depth_100_is_read():
    assert strict_json.loads(b"[" * 100 + b"]" * 100, "x") is not None


@pytest.mark.parametrize("value", [{}, [], 0, -1, 1.5, "é\U0001f600", None, True, {"a": [1, {"b": "\n"}]}])
def test_accepts_what_json_writes(value):
    assert strict_json.loads(json.dumps(value).encode(), "x") == value
    assert strict_json.loads(strict_json.dumps(value), "x") == value


def test_minus_zero_is_a_float_as_elsewhere():
    values = strict_json.loads(b"[-0, 0, -10]", "x")
    assert values == [0, 0, -10]
    assert [type(v) for v in values] == [float, int, int]


def test_dumps_is_frozen():
    assert strict_json.dumps({"b": [1, 2.5], "a": "é"}) == (
        b'{\n  "a": "\xc3\xa9",\n  "b": [\n    1,\n    2.5\n  ]\n}\n'
    )


def test_dumps_refuses_nan():
    with pytest.raises(ValueError, match=r"not JSON compliant"):
        strict_json.dumps({"a": float("nan")})


def test_load_object(tmp_path):
    assert strict_json.load_object(put(tmp_path / "a.json", b'{"a": [1]}')) == {"a": [1]}


@pytest.mark.parametrize(("raw", "got"), [(b"[]", "list"), (b"null", "NoneType"), (b"3", "int")])
def test_load_object_wants_an_object(tmp_path, raw, got):
    with pytest.raises(InputError, match=f"a.json: wanted a JSON object, got {got}"):
        strict_json.load_object(put(tmp_path / "a.json", raw))


def test_load_object_checks_the_size_before_reading(tmp_path):
    path = tmp_path / "a.json"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InputError, match=r"a.json: 1099511627776 bytes of JSON, at most 67108864"):
        strict_json.load_object(path)


def test_load_object_does_not_wait_for_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(InputError, match=r"not a regular file"):
        strict_json.load_object(tmp_path / "a.json")


def test_bounds_of_what_another_parser_reads(tmp_path):
    path = tmp_path / "a.json"
    for raw in (b'{"a": "[[[[\\"[[[", "b\\\\": 1}', b"[" * 100 + b"]" * 100, b"[]" * 500, b"{", b'"' + b"[" * 500):
        path.write_bytes(raw)
        strict_json.check_bounds(path)
    for raw in (b"[" * 101, b'{"[]]": ' * 101 + b"1"):
        path.write_bytes(raw)
        with pytest.raises(InputError, match="more than 100 levels of nesting"):
            strict_json.check_bounds(path)
    with path.open("wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(InputError, match="67108865 bytes of JSON, at most 67108864 are read"):
        strict_json.check_bounds(path)


@pytest.mark.parametrize("spelling", ["Infinity", '{"__float__": "Infinity"}', "1e999"])
def test_special_floats_are_read_where_they_are_asked_for_and_written_as_transformers_does(spelling):
    raw = f'{{"kept": {{"__float__": "x"}}, "limit": [0.0, {spelling}], "other": [-Infinity, NaN]}}'.encode()
    value = strict_json.loads(raw, "config.json", special=True)
    assert value["limit"] == [0.0, math.inf]
    assert value["other"][0] == -math.inf
    assert math.isnan(value["other"][1])
    assert value["kept"] == {"__float__": "x"}
    written = strict_json.dumps(strict_json.tagged(value))
    assert json.loads(written)["limit"] == [0.0, {"__float__": "Infinity"}]
    again = strict_json.loads(written, "config.json", special=True)
    assert str(again) == str(value)
