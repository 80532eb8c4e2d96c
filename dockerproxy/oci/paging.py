"""Lists in pages (distribution-spec 1.1, "Listing Tags"): how much a client asks for, and where the next part is."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from urllib.parse import urlencode

from attrs import frozen

from dockerproxy.errors import PaginationInvalid
from dockerproxy.oci.routes import parse_query


@frozen
class Page:
    """What a client asks for: at most `limit` entries (None: it does not say) behind `last` (None: from the start)."""

    limit: int | None
    last: str | None

    @classmethod
    def parse(cls, query: str) -> Page:
        """Return the page that a URL's query asks for; raise `PaginationInvalid`."""
        parameters = dict(parse_query(query))
        text = parameters.get("n")
        if text is not None and not (text.isascii() and text.isdigit() and len(text) <= 18):
            raise PaginationInvalid("n is not a number of entries")
        return cls(None if text is None else int(text), parameters.get("last"))

    def slice(self, entries: Sequence[str], max_entries: int) -> tuple[Sequence[str], bool]:
        """Return the page's part of the sorted `entries`, `most` at the most, and whether there is more behind it.

        A page of no entries at all has nothing behind it: its Link would lead nowhere.
        """
        start = 0 if self.last is None else bisect_right(entries, self.last)
        stop = start + (max_entries if self.limit is None else min(self.limit, max_entries))
        return entries[start:stop], start < stop < len(entries)


def next_link(path: str, parameters: Mapping[str, str]) -> tuple[str, str]:
    """Return the Link field (RFC 8288) that leads to the next page, at `path` under `parameters`."""
    return "Link", f'<{path}?{urlencode(parameters)}>; rel="next"'
