"""The keys of a bucket are in the order in which a directory's repositories are."""

from __future__ import annotations

import re

from hypothesis import example, given
from hypothesis import strategies as st

from dockerproxy.bucket import keys
from dockerproxy.oci.names import MAX_REPOSITORY, parse_repository

names = st.from_regex(r"[ab](?:[-._]?[ab0]){0,3}(?:/[ab](?:[-._]?[ab0]){0,3}){0,2}", fullmatch=True).map(
    parse_repository
)
# Marks are in the URL, as any text: parts of names with characters before, between and after those that names may have.
marks = names | st.lists(st.sampled_from([*'ab0./-_!" \x00~A%é', "\ud800", "a" * MAX_REPOSITORY])).map("".join)


@given(st.lists(names), marks)
@example([parse_repository("a/b/c")], "a/b!")
@example([parse_repository("a")], "\ud800")
@example([parse_repository("a" * MAX_REPOSITORY)], "a" * 5000)
@example([parse_repository("b")], "\U0001f600" * 5000)
def test_a_page_begins_where_that_of_a_directory_does(repositories: list[str], mark: str) -> None:
    after_mark = {name for name in repositories if name.split("/") > mark.split("/")}
    start = keys.catalog_mark(mark).encode()
    assert {name for name in repositories if keys.catalog_key(name).encode() > start} == after_mark
    assert re.fullmatch(rb"[!-\x7f]{,400}", start), "keys have 1,024 bytes, and XML does not have all characters"
