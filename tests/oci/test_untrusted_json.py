"""JSON of strangers: the bounds, what they do not refuse, and that no content costs more than a bounded time."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.oci.untrusted_json import MAX_DEPTH, MAX_VALUES, JSONInvalid, parse_json

MIB = 1024 * 1024

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
)  # fmt: skip


def count_values(value: Any) -> int:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(count_values, children))


def depth(value: Any) -> int:
    if not isinstance(value, dict | list):
        return 0
    return 1 + max(map(depth, value.values() if isinstance(value, dict) else value), default=0)


@given(JSON_VALUES, st.booleans())
def test_json_is_read_as_it_was_written(value: Any, ascii_only: bool) -> None:
    assert parse_json(json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")) == value


@given(JSON_VALUES, st.integers(1, 6), st.integers(1, 12))
def test_bounds_are_exact(value: Any, max_depth: int, max_values: int) -> None:
    content = json.dumps(value).encode()
    # An empty object or array counts twice: its bracket, and the value that it does not contain.
    if depth(value) <= max_depth and 2 * count_values(value) <= max_values:
        assert parse_json(content, max_depth=max_depth, max_values=max_values) == value
    if depth(value) > max_depth or count_values(value) > max_values:
        with pytest.raises(JSONInvalid, match="more than"):
            parse_json(content, max_depth=max_depth, max_values=max_values)


@given(st.text('[]{}",:\\1a ', max_size=30))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        expected = json.loads(text)
    except ValueError:
        with pytest.raises(JSONInvalid):
            parse_json(text.encode(), max_depth=3, max_values=5)
    else:
        try:
            assert parse_json(text.encode(), max_depth=30, max_values=60) == expected
        except JSONInvalid as error:
            assert "twice" in str(error)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not JSON"),
        (b"\xff", "not JSON"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b"\x00{}", "not JSON"),
        ('{"a":1}'.encode("utf-16"), "not JSON"),
        (b'{"a":1,"a":2}', "twice"),
        (b"NaN", "NaN"),
        (b'{"a":-Infinity}', "-Infinity"),
        (b"1" * 5000, "not JSON"),  # Python's limit for integers
        (b'"\xed\xa0\x80"', "not JSON"),
        (b"[" * 100_000, f"{MAX_DEPTH} levels"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, f"{MAX_DEPTH} levels"),
        (b"[}" * 1000, "not JSON"),
        (b"[" * 1000 + b"}", "not JSON"),
        (b"[" + b"1," * MAX_VALUES + b"1]", f"{MAX_VALUES} values"),
        (b"[" + b'{"a":1},' * (MIB // 2) + b"1]", f"{MAX_VALUES} values"),
        (b"[" + b"[]," * MAX_VALUES + b"1]", f"{MAX_VALUES} values"),
        (b'["' + b'","' * MIB + b'"]', f"{MAX_VALUES} values"),
        (b'"' + b'\\"' * (2 * MIB), "not JSON"),
        (b'["' + b'\\",' * MIB, "not JSON"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[:12].decode("latin-1"),
)
def test_refused(content: bytes, reason: str) -> None:
    with pytest.raises(JSONInvalid, match=reason):
        parse_json(content)


@pytest.mark.parametrize(
    ("content", "value"),
    [
        (b'"\\ud800"', "\ud800"),
        (b"1e400", float("inf")),
        (b"9" * 400, int("9" * 400)),
        (b"[" * MAX_DEPTH + b"]" * MAX_DEPTH, None),
        (b'{"a":"' + b"[{,:" * MIB + b'"}', {"a": "[{,:" * MIB}),  # brackets and commas in a string count for nothing
        (b'["' + b'[,\\"' * MIB + b'"]', ['[,"' * MIB]),
    ],
    ids=lambda value: "",
)
def test_accepted(content: bytes, value: Any) -> None:
    result = parse_json(content)
    assert value is None or result == value


def test_the_largest_index_is_read() -> None:
    """distribution-spec 1.1 wants 4 MiB of manifest to be possible; the bound of values leaves that to descriptors."""
    descriptor = {"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": "sha256:" + "0" * 64, "size": 1}
    content = json.dumps({"manifests": [descriptor] * 28_000}, separators=(",", ":")).encode()
    assert 4 * MIB - 200_000 < len(content)
    assert len(parse_json(content)["manifests"]) == 28_000
