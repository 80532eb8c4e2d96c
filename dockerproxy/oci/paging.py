"""Pagination of lists (distribution-spec 1.1, "Listing Tags"): the requested page, and the link to the next one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import islice
from urllib.parse import urlencode

from attrs import frozen

from dockerproxy.errors import PaginationInvalid
from dockerproxy.oci.lists import TOKEN
from dockerproxy.oci.routes import parse_query

# RFC 8288, section 3: `<URL>; rel="next"; title="a, b"`, of which a field may have several.
_PARAMETER = re.compile(rf'[ \t]*+;[ \t]*+({TOKEN})?[ \t]*+(?:=[ \t]*+({TOKEN}|"(?:[^"\\]++|\\.)*+"))?')
_LINK = re.compile(rf"[ \t,]*+<([^<>]*+)>((?:{_PARAMETER.pattern})*+)[ \t]*+(?=,|$)")


def sort_key(name: str) -> tuple[str, str]:
    """Return the key of the order of tags: "lexical order (i.e. case-insensitive alphanumeric order)".

    Names that differ only in case are in the order of ASCII.
    """
    return name.lower(), name


@frozen
class Page:
    """A requested page: at most `limit` entries after `last` (None: from the start)."""

    limit: int
    last: str | None

    @classmethod
    def parse(cls, query: str, max_entries: int) -> Page:
        """Return the page that a URL's query requests, of at most `max_entries`. Raise `PaginationInvalid`."""
        parameters = dict(parse_query(query))
        text = parameters.get("n", "")  # an empty one counts as none, as in CNCF distribution
        if text and not (text.isascii() and text.isdigit() and len(text) <= 18):
            raise PaginationInvalid("n is not a valid number of entries")
        return cls(min(int(text), max_entries) if text else max_entries, parameters.get("last"))


@frozen
class NamePage:
    """A page of tags or repositories. `more` is true if others follow the last of `names`."""

    names: list[str]
    more: bool


def take_page(names: Iterable[str], limit: int) -> NamePage:
    """Return the first `limit` of `names`.

    A page without entries has no next page, because its Link would not advance.
    """
    page = list(islice(names, limit + 1)) if limit else []
    return NamePage(page[:limit], len(page) > limit)


def next_link(path: str, parameters: Mapping[str, str]) -> tuple[str, str]:
    """Return the Link field (RFC 8288) to the next page, at `path` with the query `parameters`."""
    return "Link", f'<{path}?{urlencode(parameters)}>; rel="next"'


def next_query(fields: Iterable[str]) -> str | None:
    """Return the query of the URL of the next page, by another registry's Link `fields`; None without one.

    A URL without a query would lead to the first page again.
    """
    for value in fields:
        position = 0
        while match := _LINK.match(value, position):
            position = match.end()
            query = match[1].partition("#")[0].partition("?")[2].strip()
            if query and "next" in _relations(match[2]):
                return query
    return None


def _relations(parameters: str) -> list[str]:
    """Return the relation types of a link. Only its first `rel` counts."""
    for match in _PARAMETER.finditer(parameters):
        if (match[1] or "").lower() == "rel":
            return (match[2] or "").strip("\"'").lower().split()
    return []
