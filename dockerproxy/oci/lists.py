"""Comma-separated header fields (RFC 9110, section 5.6.1), for the fields whose elements may hold quoted strings."""

from __future__ import annotations

import re
from collections.abc import Iterator

# Possessive, so that a quotation mark without its fellow costs one pass and no more.
_ELEMENT = re.compile(r'(?:[^",]++|"(?:[^"\\]++|\\.)*+")*+', re.DOTALL)
_MAX_FIELD = 32 * 1024


def elements(field: str) -> Iterator[str]:
    """Yield the elements of `field` without surrounding whitespace, the empty ones left out.

    A comma within a quoted string separates nothing. What follows a quotation mark that is never closed cannot be told
    apart and is left out, as is all of a field over 32 KiB.
    """
    if len(field) > _MAX_FIELD:
        return
    position = 0
    while match := _ELEMENT.match(field, position):
        stop = match.end()
        if field[stop : stop + 1] not in ("", ","):
            return
        if element := match[0].strip(" \t"):
            yield element
        if stop == len(field):
            return
        position = stop + 1
