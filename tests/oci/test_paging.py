from __future__ import annotations

from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.errors import PaginationInvalid
from dockerproxy.oci.paging import Page, next_link

NAMES = st.lists(st.text("abcXYZ019._-", min_size=1, max_size=4), unique=True).map(sorted)


@given(names=NAMES, size=st.integers(1, 5), most=st.integers(1, 5))
def test_the_pages_make_the_list(names: list[str], size: int, most: int) -> None:
    found: list[str] = []
    page, more = Page(size, None), True
    while more:
        part, more = page.cut(names, most)
        assert len(part) <= min(size, most)
        found += part
        page = Page(size, found[-1] if found else None)
    assert found == names


@given(names=NAMES, last=st.text("abcXYZ019._-", max_size=4))
def test_what_is_behind_a_name_that_need_not_be_there(names: list[str], last: str) -> None:
    assert Page(None, last).cut(names, 1000) == ([name for name in names if name > last], False)


def test_a_page_of_nothing_leads_nowhere() -> None:
    assert Page(0, None).cut(["a", "b"], 10) == ([], False)


def test_parse() -> None:
    assert Page.parse("") == Page(None, None)
    assert Page.parse("n=0") == Page(0, None)
    assert Page.parse("last=a%2Fb&n=10") == Page(10, "a/b")


@pytest.mark.parametrize("n", ["", "-1", "x", "1.0", "1e3", "%D9%A1", "1" * 19])
def test_a_page_size_that_is_none(n: str) -> None:
    with pytest.raises(PaginationInvalid):
        Page.parse(f"n={n}")


def test_link() -> None:
    name, value = next_link("/v2/a/b/tags/list", {"n": "2", "last": "x&y z"})
    assert name == "Link"
    url, _, relation = value.partition("; ")
    assert relation == 'rel="next"'
    parts = urlsplit(url.strip("<>"))
    assert (parts.path, parse_qs(parts.query)) == ("/v2/a/b/tags/list", {"n": ["2"], "last": ["x&y z"]})
