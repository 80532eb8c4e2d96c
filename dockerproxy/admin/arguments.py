"""The arguments of the control API. They are checked here, because any process of the daemon's group may send them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from attrs import frozen

MAX_BODY = 64 * 1024
"""Bytes of a request's body, which are parsed at once."""

_MAX_TEXT = 4096  # characters: the longest path that Linux opens
_MAX_NAMES = 1000
_MAX_SECONDS = 1e9  # 30 years
_SHOWN = 100  # characters of an argument's name in an error


class InvalidArguments(Exception):
    """The arguments are refused. The message is a sentence for the user."""


@frozen
class Argument:
    """The values that an argument may have: `accepts` decides, and `description` tells the user."""

    accepts: Callable[[Any], bool]
    description: str


def _is_number(value: Any) -> bool:
    # NaN compares as false. A comparison converts no integer, however long it is.
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _MAX_SECONDS


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _MAX_TEXT and "\0" not in value and _is_utf8(value)


def _is_utf8(text: str) -> bool:
    # JSON may have lone surrogates. The file system's names have some for bytes that are not UTF-8 (PEP 383).
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def _is_name_list(value: Any) -> bool:
    return isinstance(value, list) and 0 < len(value) <= _MAX_NAMES and all(map(_is_text, value))


FLAG = Argument(lambda value: isinstance(value, bool), "true or false")
SECONDS = Argument(_is_number, f"a number of seconds from 0 to {_MAX_SECONDS:.0f}")
PATH = Argument(lambda value: _is_text(value) and value.startswith("/"), "an absolute path")
NAMES = Argument(_is_name_list, f"a list of 1 to {_MAX_NAMES} names")
NAME = Argument(_is_text, f"a name of 1 to {_MAX_TEXT} characters")


TEXT = Argument(lambda value: value == "" or _is_text(value), f"a text of at most {_MAX_TEXT} characters")


def one_of(*choices: str) -> Argument:
    """Return an argument that is one of these texts."""
    return Argument(lambda value: isinstance(value, str) and value in choices, " or ".join(choices))


def parse_body(content: bytes, known: Mapping[str, Argument], required: str | None = None) -> dict[str, Any]:
    """Return the arguments in `content`, a JSON object or nothing. Raise `InvalidArguments`."""
    try:
        document = json.loads(content or b"{}", parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise InvalidArguments("the request's body is not a JSON object")
    return _check(document, known, required)


def parse_pairs(pairs: Sequence[tuple[str, str]], known: Mapping[str, Argument]) -> dict[str, str]:
    """Return the arguments in the query of a URL. Raise `InvalidArguments`."""
    try:
        document = _unique(pairs)
    except ValueError as error:
        raise InvalidArguments(str(error)) from None
    return _check(document, known, None)


def _check(document: dict[str, Any], known: Mapping[str, Argument], required: str | None) -> dict[str, Any]:
    for name, value in document.items():
        if name not in known:
            raise InvalidArguments(f"the argument {name[:_SHOWN]!r} is unknown")
        if not known[name].accepts(value):
            raise InvalidArguments(f"the argument {name!r} is not {known[name].description}")
    if required is not None and required not in document:
        raise InvalidArguments(f"the argument {required!r} is missing")
    return document


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        raise ValueError("an argument is given twice")
    return document


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
