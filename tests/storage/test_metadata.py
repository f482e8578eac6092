"""Metadata as JSON text: what may be written, and what somebody else may have written."""

import math

import msgspec
import pytest

from storage.errors import BadFrame
from storage.metadata import NO_META, pack_meta, require_meta, scalar_columns, unpack_meta

DEEP: dict = {}
for _ in range(50):
    DEEP = {"a": DEEP}


@pytest.mark.parametrize(
    "meta",
    [{}, {"a": 1}, {"b": [1, {"c": None}], "a": "ä"}, {"null": "null"}, {"big": 2**80}, {"a": -0.0, "x": 1e300}],
    ids=str,
)
def test_metadata_come_back_as_they_went(meta):
    text = pack_meta(meta)
    require_meta(text)
    assert unpack_meta(text) == meta


def test_not_a_number_comes_back():
    text = pack_meta({"b": math.nan, "a": [math.inf, -math.inf]})
    require_meta(text)
    found = unpack_meta(text)
    assert math.isnan(found["b"])
    assert found["a"] == [math.inf, -math.inf]


@pytest.mark.parametrize(
    "metas",
    [
        [{"a": 1, "b": "x"}, {}, {"a": None, "c": [1, 2]}, {"b": {"d": 1}, "a": 2.5, "c": 3}],
        [{"a": math.inf, "c": [1]}, {"a": 1, "b": None}],
        [{"n": 2**80}, {"n": -1}],
        [{}],
        [],
    ],
    ids=["usual", "odd", "large", "nothing", "none"],
)
def test_columns_are_what_single_frames_have(metas):
    found = dict(scalar_columns([pack_meta(meta) for meta in metas]))
    firsts = {key: next(m[key] for m in metas if key in m) for meta in metas for key in meta}
    expected = {key for key, first in firsts.items() if not isinstance(first, dict | list)}
    assert found == {key: [meta.get(key) for meta in metas] for key in expected}
    assert list(found) == sorted(found)


def test_invented_nested_keys_are_not_all_looked_for():
    texts = [pack_meta({f"k{row}-{number}": [1] for number in range(500)}) for row in range(40)]
    assert dict(scalar_columns(texts)) == {}
    assert len(dict(scalar_columns([pack_meta({f"k{n}": n for n in range(3000)})]))) == 1000


def test_equal_metadata_are_equal_bytes():
    assert pack_meta({"b": {"d": 1, "c": None}, "a": 2}) == pack_meta({"a": 2, "b": {"c": None, "d": 1}})
    assert pack_meta({}) == NO_META == b""


@pytest.mark.parametrize(
    ("meta", "why"),
    [
        ({"a": b"x"}, "metadata"),
        ({"a": {1, 2}}, "metadata"),
        ({"a": msgspec.Raw(b"")}, "metadata"),
        ({"a": [{3: 4}]}, "key is not text"),
        ({"a": "x" * (5 << 20)}, "larger than"),
        (DEEP, "nested deeper"),
    ],
    ids=["bytes", "set", "raw", "key", "5 MB", "deep"],
)
def test_only_plain_json_is_metadata(meta, why):
    with pytest.raises(BadFrame, match=why):
        pack_meta(meta)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"[1]", "list instead of an object"),
        (b"null", "NoneType instead"),
        (b"{", "plain JSON"),
        (b'{"a":1}}', "plain JSON"),
        (b'{"a":"\xff"}', "plain JSON"),
        (b'{"a":["\xff"]}', "plain JSON"),
        (b'{"a":"\\ud800"}', "plain JSON"),
        (b'{"a":"\xed\xa0\x80","a":1}', "plain JSON"),
        ('{"a":1}'.encode("utf-16"), "plain JSON"),
        ('{"a":1}'.encode("utf-16-le"), "plain JSON"),
        (b'\xef\xbb\xbf{"a":1}', "plain JSON"),
        (b'{"\\ud800":1}', "plain JSON"),
        (b'{"a":' + b"9" * 5000 + b"}", "plain JSON"),
        (b'{"a":' * 50 + b"1" + b"}" * 50, "nested deeper"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested deeper|plain JSON"),
        (b'{"a":NaN,"b":' + b"[" * 40 + b"]" * 40 + b"}", "nested deeper"),
        (b'{"a":"' + b"x" * (5 << 20) + b'"}', "larger than"),
    ],
    ids=[
        "list",
        "null",
        "cut",
        "more",
        "not UTF-8",
        "not UTF-8 inside",
        "half a character",
        "half a hidden one",
        "UTF-16",
        "UTF-16 without a mark",
        "UTF-8 with a mark",
        "half a key",
        "5000 digits",
        "deep",
        "very deep",
        "deep, odd",
        "5 MB",
    ],
)
def test_what_cannot_be_read_is_refused(text, why):
    with pytest.raises(BadFrame, match=why):
        require_meta(text)
