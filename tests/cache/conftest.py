"""Fixtures for the tests of the cache. They use a scripted upstream, a manual reactor, and a store on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from twisted.logger import formatEvent, globalLogPublisher

from tests.cache.support.harness import CacheHarness


@pytest.fixture
def make_harness(tmp_path: Path) -> Iterator[Callable[..., CacheHarness]]:
    """Return a function that makes a cache in the test's directory. A second one acts as the cache after a restart.

    At the end, check that no cache has open descriptors, active downloads or pinned blobs.
    """
    harnesses: list[CacheHarness] = []

    def make(**settings: Any) -> CacheHarness:
        harnesses.append(CacheHarness(tmp_path, **settings))
        return harnesses[-1]

    yield make
    for harness in harnesses:
        harness.assert_no_leaks()


@pytest.fixture
def harness(make_harness: Callable[..., CacheHarness]) -> CacheHarness:
    return make_harness()


@pytest.fixture
def log_lines() -> Iterator[list[str]]:
    """Return the list of formatted log lines that the test produces."""
    lines: list[str] = []

    def observe(event: Any) -> None:
        lines.append(formatEvent(event))

    globalLogPublisher.addObserver(observe)
    yield lines
    globalLogPublisher.removeObserver(observe)
