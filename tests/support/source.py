"""The prose of a Python file, read by a regular expression: Python's own parsers need five seconds for this project."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

# Comments and strings are found together, because each may have the beginning of the other in it. A docstring has three
# quotation marks at the beginning of a line, which ruff makes sure.
_COMMENT_OR_STRING = re.compile(
    r'(?P<comment>#.*)|^ *r?"""(?P<docstring>(?s:\\.|[^\\])*?)"""'
    r'|"""(?s:\\.|[^\\])*?"""|"(?:\\.|[^"\\])*"|' + r"'''(?s:\\.|[^\\])*?'''|'(?:\\.|[^'\\])*'",
    re.MULTILINE,
)


@cache
def prose(path: Path) -> list[tuple[int, str]]:
    """Return every docstring and block of comments of a file with its line number, each as one line."""
    return list(_iter_prose(path.read_text("utf-8")))


def module_docstring(source: str) -> str:
    found = _COMMENT_OR_STRING.match(source)
    return found["docstring"] or "" if found else ""


def _iter_prose(source: str) -> Iterator[tuple[int, str]]:
    block: list[str] = []
    first = last = line = end = 0
    for found in _COMMENT_OR_STRING.finditer(source):
        line, end = line + source.count("\n", end, found.start()), found.start()
        if found["docstring"]:
            yield line + 1, " ".join(found["docstring"].split())
        elif found["comment"]:
            if block and line != last + 1:
                yield first + 1, " ".join(block)
                block = []
            first = first if block else line
            last = line
            block.append(found["comment"].lstrip("# "))
    if block:
        yield first + 1, " ".join(block)
