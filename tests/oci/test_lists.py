"""Splitting of comma-separated fields."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.oci.lists import elements

plain = st.from_regex(r"[a-z;=]{1,5}", fullmatch=True)
quoted = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=8).map(
    lambda text: 'a="' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
)
commas = st.sampled_from([",", ", ", " ,", ",,", "\t,\t", ", ,"])


@given(st.lists(st.one_of(plain, quoted), max_size=6), commas)
def test_round_trip(texts: list[str], comma: str) -> None:
    assert list(elements(comma.join(texts))) == texts


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("", []),
        (" ,, ", []),
        ('a="x,y", b', ['a="x,y"', "b"]),
        ('a, b="x, c', ["a"]),
        ('a, b="x\\", c', ["a"]),
        ('a="x"y"z,w",b', ['a="x"y"z,w"', "b"]),
        ("a\\,b", ["a\\", "b"]),
    ],
)
def test_elements(field: str, expected: list[str]) -> None:
    assert list(elements(field)) == expected


def test_bounded() -> None:
    assert list(elements("a," * 16384)) == ["a"] * 16384
    assert list(elements("a," * 16384 + "a")) == []
    assert list(elements('a,"' + "\\" * 32000)) == ["a"]
    assert list(elements('"' * 32001)) == []
