"""Tests for the XML of a store's answers: real ones, and ones that no store should send."""

from __future__ import annotations

from xml.sax.saxutils import escape

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.bucket.s3_xml import parse_answer

LIST = b"""<?xml version="1.0" encoding="UTF-8"?>
<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>b</Name><IsTruncated>true</IsTruncated>
<Contents><Key>a&amp;b</Key><Size>1</Size><Owner><ID>x</ID></Owner></Contents><CommonPrefixes><Prefix>c/</Prefix>
</CommonPrefixes></ListBucketResult>"""


def test_a_list() -> None:
    answer = parse_answer(LIST)
    assert answer.root == "ListBucketResult"
    assert answer.texts == {"Name": "b", "IsTruncated": "true"}
    assert [(kind, texts["Key" if kind == "Contents" else "Prefix"]) for kind, texts in answer.items] == [
        ("Contents", "a&b"),
        ("CommonPrefixes", "c/"),
    ]
    assert answer.error is None


def test_an_error() -> None:
    answer = parse_answer(b"<Error><Code>SlowDown</Code><Message>Please &lt;wait&gt;</Message></Error>")
    assert answer.error == ("SlowDown", "Please <wait>")
    assert parse_answer(b"<Error/>").error == ("", "")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<a>",
        b"<a></b>",
        b"\xff\xfe",
        b'<!DOCTYPE a SYSTEM "file:///etc/passwd"><a/>',
        b'<!DOCTYPE a [<!ENTITY b "c"><!ENTITY d "&b;&b;">]><a>&d;</a>',
        '<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>'.encode("utf-16"),
        b"<a>" * 100 + b"</a>" * 100,
        b"<a>" + b"<b/>" * 30_000 + b"<c><d/></c>" * 30_000 + b"</a>",
        b"<a><b>" + b"<c/>" * 200_000 + b"</b></a>",
    ],
    ids=["empty", "open", "crossed", "binary", "external", "entities", "utf-16", "deep", "long", "wide"],
)
def test_content_that_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError):
        parse_answer(content)


@given(st.binary(max_size=200))
def test_any_content_is_parsed_or_refused(content: bytes) -> None:
    try:
        parse_answer(content)
    except ValueError:
        pass


TEXT = st.text(st.characters(blacklist_categories=["Cs", "Cc"], blacklist_characters="\ufffe\uffff"))


@given(st.lists(st.tuples(TEXT, TEXT)))
def test_texts_survive(pairs: list[tuple[str, str]]) -> None:
    items = "".join(f"<C><K>{escape(key)}</K><V>{escape(value)}</V></C>" for key, value in pairs)
    answer = parse_answer(f"<R>{items}</R>".encode())
    assert answer.items == [("C", {"K": key, "V": value}) for key, value in pairs]
