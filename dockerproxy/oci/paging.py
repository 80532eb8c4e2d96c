"""Pagination of lists (distribution-spec 1.1, "Listing Tags"): the requested page, and the link to the next one."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from urllib.parse import urlencode

from attrs import frozen

from dockerproxy.errors import PaginationInvalid
from dockerproxy.oci.routes import parse_query


@frozen
class Page:
    """A requested page: at most `limit` entries (None: not specified) after `last` (None: from the start)."""

    limit: int | None
    last: str | None

    @classmethod
    def parse(cls, query: str) -> Page:
        """Return the page that a URL's query requests. Raise `PaginationInvalid`."""
        parameters = dict(parse_query(query))
        text = parameters.get("n")
        if text is not None and not (text.isascii() and text.isdigit() and len(text) <= 18):
            raise PaginationInvalid("n is not a valid number of entries")
        return cls(None if text is None else int(text), parameters.get("last"))

    def slice(self, entries: Sequence[str], max_entries: int) -> tuple[Sequence[str], bool]:
        """Return this page of the sorted `entries`, `max_entries` at most, and whether more entries follow.

        A page without entries has no next page, because its Link would not advance.
        """
        start = 0 if self.last is None else bisect_right(entries, self.last)
        stop = start + (max_entries if self.limit is None else min(self.limit, max_entries))
        return entries[start:stop], start < stop < len(entries)


def next_link(path: str, parameters: Mapping[str, str]) -> tuple[str, str]:
    """Return the Link field (RFC 8288) to the next page, at `path` with the query `parameters`."""
    return "Link", f'<{path}?{urlencode(parameters)}>; rel="next"'
