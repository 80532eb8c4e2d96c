"""JSON that a stranger sent: read in bounded time and memory, and refused if parsers could read it differently.

Python takes 40 bytes and more for each value of a document, and reads a document in one go, so what bounds both is the
number of values. It is counted before anything is parsed.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

MAX_VALUES = 200_000
"""Values of a document. 4 MiB of the shortest usual descriptors have 112,000, and take 20 ms."""

MAX_DEPTH = 64
"""Levels of nested objects and arrays. Manifests have five."""

# A string that does not end matches too, so that the expression never tries again from within it.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_AS_ARRAYS = bytes.maketrans(b"{}", b"[]")


class JSONInvalid(ValueError):
    """The content is no JSON, or exceeds a bound. The message continues a sentence that begins with the document."""


def parse_json(
    content: bytes, *, max_values: int = MAX_VALUES, max_depth: int = MAX_DEPTH, lenient: bool = False
) -> Any:
    """Return the value of the JSON text `content`, in UTF-8. Raise `JSONInvalid`.

    If `lenient`, the last of equal fields counts, and invalid UTF-8 is replaced, as in Go's `encoding/json`.

    Blocks for up to 100 ms; read long content in a thread. A number may be infinite, and a string may contain half of a
    surrogate pair: JSON can write both.
    """
    _check_bounds(content, max_values, max_depth)
    try:
        return json.loads(
            content.decode("utf-8", "replace" if lenient else "strict"),
            object_pairs_hook=dict if lenient else _unique_fields,
            parse_constant=_refuse_constant,
        )
    except JSONInvalid:
        raise
    except (ValueError, RecursionError):
        raise JSONInvalid("is not JSON") from None


def _check_bounds(content: bytes, max_values: int, max_depth: int) -> None:
    openings = content.count(b"[") + content.count(b"{")
    if openings <= max_depth and openings + content.count(b",") < max_values:
        return  # also if all of them are in strings
    structure = _without_strings(content, max_values)
    brackets = structure.translate(_AS_ARRAYS, _NO_BRACKETS)
    # Each opening bracket begins a value, and each comma stands before another one.
    if structure.count(b",") + brackets.count(b"[") >= max_values:
        raise _too_many(max_values)
    for _ in range(max_depth):
        if not brackets:
            return
        brackets = brackets.replace(b"[]", b"")
    if brackets:
        raise JSONInvalid(f"has more than {max_depth} levels of nested objects and arrays, or is not JSON")


def _without_strings(content: bytes, max_values: int) -> bytes:
    """Return `content` without its strings. It may be no JSON."""
    parts, end = [], 0
    for match in _STRING.finditer(content):
        parts.append(content[end : match.start()])
        end = match.end()
        if len(parts) > 2 * max_values:  # each value has at most a name and a string
            raise _too_many(max_values)
    parts.append(content[end:])
    return b"".join(parts)


def _too_many(max_values: int) -> JSONInvalid:
    return JSONInvalid(f"has more than {max_values} values")


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise JSONInvalid("contains a field twice")
    return document


def _refuse_constant(name: str) -> NoReturn:
    raise JSONInvalid(f"contains {name}, which is not JSON")
