"""Pagination: pages of a list, the query, and the link to the next page."""

from __future__ import annotations

from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.errors import PaginationInvalid
from dockerproxy.oci.paging import NamePage, Page, next_link, next_query, sort_key, take_page

NAMES = st.lists(st.text("abcXYZ019._-", min_size=1, max_size=4), unique=True)


@given(names=NAMES, limit=st.integers(1, 5))
def test_a_page(names: list[str], limit: int) -> None:
    assert take_page(iter(names), limit) == NamePage(names[:limit], len(names) > limit)


def test_empty_page_has_no_next() -> None:
    assert take_page(iter(["a", "b"]), 0) == NamePage([], False)


def test_a_page_takes_one_more_entry_only() -> None:
    names = iter("abcdef")
    assert take_page(names, 2) == NamePage(["a", "b"], True)
    assert list(names) == ["d", "e", "f"]


def test_the_order_ignores_case() -> None:
    """distribution-spec 1.1, "Listing Tags": "in lexical order (i.e. case-insensitive alphanumeric order)"."""
    tags = ["v2.0", "Zeta", "v1", "V1", "beta", "Alpha", "V2", "_x", "1.0"]
    assert sorted(tags, key=sort_key) == ["1.0", "_x", "Alpha", "beta", "V1", "v1", "V2", "v2.0", "Zeta"]


@given(names=NAMES)
def test_the_order_is_total(names: list[str]) -> None:
    assert len({sort_key(name) for name in names}) == len(names)


def test_parse() -> None:
    assert Page.parse("", 100) == Page(100, None)
    assert Page.parse("n=", 100) == Page.parse("n", 100) == Page(100, None)
    assert Page.parse("n=&last=a", 100) == Page(100, "a")
    assert Page.parse("n=0", 100) == Page(0, None)
    assert Page.parse("n=101", 100) == Page(100, None)
    assert Page.parse("last=a%2Fb&n=10", 100) == Page(10, "a/b")


@pytest.mark.parametrize("n", ["%20", "+", "-1", "x", "1.0", "1e3", "%D9%A1", "1" * 19])
def test_invalid_page_size(n: str) -> None:
    with pytest.raises(PaginationInvalid):
        Page.parse(f"n={n}", 100)


def test_link() -> None:
    name, value = next_link("/v2/a/b/tags/list", {"n": "2", "last": "x&y z"})
    assert name == "Link"
    url, _, relation = value.partition("; ")
    assert relation == 'rel="next"'
    parts = urlsplit(url.strip("<>"))
    assert (parts.path, parse_qs(parts.query)) == ("/v2/a/b/tags/list", {"n": ["2"], "last": ["x&y z"]})


@pytest.mark.parametrize(
    ("field", "query"),
    [
        ('</v2/a/tags/list?n=2&last=b>; rel="next"', "n=2&last=b"),
        ('<https://elsewhere.example:8443/v2/a?last=b#x>; rel="next"', "last=b"),
        ("<?last=b>;rel=next", "last=b"),
        ('</v2/a?last=b>; rel="next"; title="a, <b>; c"', "last=b"),
        ('</v2/a?last=b>; title="x\\"y, z" ; REL = "NEXT last"', "last=b"),
        ('</v2/a?last=a>; rel="prev", </v2/a?last=b,c>; rel="next"', "last=b,c"),
        ("</v2/a?last=b>; rel='next'", "last=b"),
        ('< /v2/a?last=b >; rel="next";', "last=b"),
        ('</v2/a?last=a>; rel="prev next"; rel=x', "last=a"),
        ('</v2/a/page/2>; rel="next"', None),
        ('</v2/a?last=b>; rel="prev"; rel="next"', None),
        ("</v2/a?last=b>", None),
        ('</v2/a?last=b>; rev="next"', None),
        ("/v2/a?last=b", None),
        ('</v2/a?last=b>; rel="next', None),
        ("", None),
    ],
)
def test_query_of_the_next_page(field: str, query: str | None) -> None:
    assert next_query([field]) == query
    assert next_query(["</x>; rel=preload", field]) == query


@given(st.text('<>;,"=? relnxta\\/', max_size=60))
def test_any_link(field: str) -> None:
    query = next_query([field])
    assert query is None or not set("<># ") & set(query[:1] + query[-1:])


def test_long_links_cost_little() -> None:
    for field in ("<" * 30_000, "<?a>;" * 6_000, '<?a>; a="' + "\\" * 30_000, ",".join(["<?a>"] * 6_000)):
        assert next_query([field]) is None
