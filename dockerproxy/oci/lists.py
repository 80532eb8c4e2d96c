"""The syntax of header fields: tokens, and comma-separated lists whose elements may contain quoted strings.

RFC 9110, section 5.6.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
"""A token (RFC 9110, section 5.6.2), as the text of a regular expression."""

# Possessive, so that an unmatched quotation mark costs a single pass.
_ELEMENT = re.compile(r'(?:[^",]++|"(?:[^"\\]++|\\.)*+")*+', re.DOTALL)
_MAX_FIELD = 32 * 1024


def elements(field: str) -> Iterator[str]:
    """Yield the non-empty elements of `field` without surrounding whitespace.

    A comma within a quoted string does not separate elements. Everything after an unclosed quotation mark is left out,
    because it cannot be split reliably. A field over 32 KiB yields nothing.
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
