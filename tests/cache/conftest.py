"""What the cache's tests stand on: `stand_ins`, an upstream that does as it is told and a reactor without a clock of
its own, and a cache between them whose store is a real one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from twisted.logger import formatEvent, globalLogPublisher

from tests.cache.support.harness import CacheHarness


@pytest.fixture
def make_harness(tmp_path: Path) -> Iterator[Callable[..., CacheHarness]]:
    """Return a function that makes a cache on the test's folder; another one is the same after a restart.

    No cache may leave a descriptor open, a download that nobody ends, or content pinned.
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
    """What is logged while the test runs."""
    lines: list[str] = []

    def observe(event: Any) -> None:
        lines.append(formatEvent(event))

    globalLogPublisher.addObserver(observe)
    yield lines
    globalLogPublisher.removeObserver(observe)
