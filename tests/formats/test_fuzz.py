"""Whatever our safetensors reader accepts, the safetensors library accepts too, with equal bytes."""

import json
import random
import struct

import pytest
import safetensors
from blobs import HONEST, blob, honest, put
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loftq.errors import InputError
from loftq.formats import tensorfile as tf

pytestmark = pytest.mark.slow

MUTANTS = 4000
TOKENS = [
    *(b"0", b"1", b"16", b"22", b"23", b"-1", b"-0", b"1e1", b"1.0", b"true", b"null", b"NaN", b"1099511627777"),
    *(b"[]", b"{}", b'""', b'"a"', b'"F32"', b'"U8"', b'"F4"', b'"BOOL"', b'"shape"', b'"dtype"', b'"data_offsets"'),
    *(b",", b":", b"[", b"]", b"{", b"}", b'"', b" ", b"\n", b"\0", b"\xff", b"\xef\xbb\xbf", b"\\u0061", b"\\ud800"),
]


def verdict(path):
    """Name -> bytes for an accepted file, None for a refused one; anything else escapes and fails the test."""
    try:
        file = tf.read_header(path)
        return {name: b"".join(tf.read_chunks(info, file.stamp)) for name, info in file.tensors.items()}
    except InputError:
        return None


def check(path, raw):
    """Compare both readers on ``raw``; whether we accepted it."""
    ours = verdict(put(path, raw))
    if ours is None:
        return False
    theirs = {name: bytes(fields["data"]) for name, fields in safetensors.deserialize(raw)}
    assert ours == theirs
    return True


def mutant(rng):
    """An honest file after a few small accidents to its header, its length or its tail."""
    length, text, data = honest()[:8], bytearray(honest()[8:-23]), bytearray(honest()[-23:])
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(len(text))
        match rng.randrange(6):
            case 0:
                text[at] = rng.randrange(256)
            case 1:
                text[at : at + rng.randrange(4)] = rng.choice(TOKENS)
            case 2:
                del text[at : at + rng.randrange(1, 12)]
            case 3:
                text[at:at] = text[rng.randrange(len(text)) :][: rng.randrange(40)]
            case 4:
                text[at:at] = b" " * rng.randrange(4)
            case _:
                data = data[: rng.randrange(30)] + bytes(rng.randrange(2))
    if rng.random() < 0.9:
        length = struct.pack("<Q", len(text))
    return bytes(length + text + data)


def test_mutants(tmp_path):
    rng = random.Random(20260101)
    accepted = sum(check(tmp_path / "x", mutant(rng)) for _ in range(MUTANTS))
    assert 100 < accepted < MUTANTS // 2, "the mutants have become too tame or too wild to tell anything"


values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 30) | st.floats() | st.sampled_from(["F32", "U8", "BF16", "x", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
fields = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "BF16", "F32", "F64", "BOOL", "F4", "F8_E4M3", "C64"]) | values,
        "shape": st.lists(st.integers(0, 3) | st.sampled_from([2**31, 2**40, 2**63, -1]), max_size=9) | values,
        "data_offsets": st.lists(st.integers(0, 24), min_size=2, max_size=2).map(sorted) | values,
    },
    optional={"extra": values},
)
headers = st.dictionaries(st.text(max_size=4) | st.sampled_from(["a", "__metadata__"]), fields | values, max_size=4)


@given(header=headers, data=st.binary(max_size=24))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_generated_headers(tmp_path, header, data):
    check(tmp_path / "x", blob(json.dumps(header).encode(), data))


@st.composite
def sound_files(draw):
    """Entries, metadata and data that belong together."""
    names = draw(st.lists(st.text(st.characters(exclude_categories=["C"]), min_size=1), unique=True, max_size=5))
    shapes = st.lists(st.integers(0, 3), max_size=4).map(tuple)
    entries = [tf.Entry(n, draw(st.sampled_from(list(tf.DTYPES))), draw(shapes)) for n in names if n != "__metadata__"]
    metadata = draw(st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3))
    return entries, metadata, draw(st.randoms()).randbytes(sum(e.nbytes for e in entries))


@given(case=sound_files())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_all_that_we_write_is_accepted_by_both(tmp_path, case):
    entries, metadata, data = case
    raw = tf.encode_header(entries, metadata) + data
    assert len(raw) == tf.file_size(entries, metadata)
    assert check(tmp_path / "x", raw)
    assert tf.read_header(tmp_path / "x").metadata == metadata


@pytest.mark.parametrize("name", sorted(set(HONEST) - {"__metadata__"}))
def test_a_file_without_one_tensor_has_a_hole(tmp_path, name):
    rest = {key: value for key, value in HONEST.items() if key != name}
    whole = HONEST[name]["data_offsets"][0] == HONEST[name]["data_offsets"][1]
    assert check(tmp_path / "x", blob(rest, bytes(23))) == whole
