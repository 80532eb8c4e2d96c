"""What the cache's tests stand on: `stand_ins`, an upstream that does as it is told and a reactor without a clock of
its own, and a cache between them whose store is a real one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from twisted.logger import formatEvent, globalLogPublisher

from tests.cache.stand_ins.world import World


@pytest.fixture
def make_world(tmp_path: Path) -> Iterator[Callable[..., World]]:
    """Return a function that makes a cache on the test's folder; another one is the same after a restart.

    No cache may leave a descriptor open, a download that nobody ends, or content pinned.
    """
    worlds: list[World] = []

    def make(**settings: Any) -> World:
        worlds.append(World(tmp_path, **settings))
        return worlds[-1]

    yield make
    for world in worlds:
        world.check_ends()


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    return make_world()


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """What is logged while the test runs."""
    lines: list[str] = []

    def observe(event: Any) -> None:
        lines.append(formatEvent(event))

    globalLogPublisher.addObserver(observe)
    yield lines
    globalLogPublisher.removeObserver(observe)
