"""A `ContentParser` for tests that have a reactor of their own."""

from __future__ import annotations

from typing import Any

from dockerproxy.thread_pool import PARSE_LIMITS, BoundedThreadPool, ContentParser


def make_parser(reactor: Any) -> ContentParser:
    """Return a parser with a thread of the pool of `reactor`."""
    return ContentParser(BoundedThreadPool(reactor, "long documents", PARSE_LIMITS, reactor.getThreadPool()))
