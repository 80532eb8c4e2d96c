"""Pagination: pages of a list, the query, and the link to the next page."""

from __future__ import annotations

from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.errors import PaginationInvalid
from dockerproxy.oci.paging import Page, next_link

NAMES = st.lists(st.text("abcXYZ019._-", min_size=1, max_size=4), unique=True).map(sorted)


@given(names=NAMES, size=st.integers(1, 5), max_entries=st.integers(1, 5))
def test_pages_cover_the_list(names: list[str], size: int, max_entries: int) -> None:
    collected: list[str] = []
    page, more = Page(size, None), True
    while more:
        part, more = page.slice(names, max_entries)
        assert len(part) <= min(size, max_entries)
        collected += part
        page = Page(size, collected[-1] if collected else None)
    assert collected == names


@given(names=NAMES, last=st.text("abcXYZ019._-", max_size=4))
def test_last_need_not_exist(names: list[str], last: str) -> None:
    assert Page(None, last).slice(names, 1000) == ([name for name in names if name > last], False)


def test_empty_page_has_no_next() -> None:
    assert Page(0, None).slice(["a", "b"], 10) == ([], False)


def test_parse() -> None:
    assert Page.parse("") == Page(None, None)
    assert Page.parse("n=0") == Page(0, None)
    assert Page.parse("last=a%2Fb&n=10") == Page(10, "a/b")


@pytest.mark.parametrize("n", ["", "-1", "x", "1.0", "1e3", "%D9%A1", "1" * 19])
def test_invalid_page_size(n: str) -> None:
    with pytest.raises(PaginationInvalid):
        Page.parse(f"n={n}")


def test_link() -> None:
    name, value = next_link("/v2/a/b/tags/list", {"n": "2", "last": "x&y z"})
    assert name == "Link"
    url, _, relation = value.partition("; ")
    assert relation == 'rel="next"'
    parts = urlsplit(url.strip("<>"))
    assert (parts.path, parse_qs(parts.query)) == ("/v2/a/b/tags/list", {"n": ["2"], "last": ["x&y z"]})
