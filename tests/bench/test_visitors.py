"""When a client of the soak may have met with a registry that was away."""

from __future__ import annotations

import time
from typing import Any

from bench.visitors import Upstream

SERVER: Any = None


def test_a_registry_that_never_was_away() -> None:
    assert not Upstream(SERVER).was_away(since=time.monotonic())


def test_a_registry_that_is_away() -> None:
    assert Upstream(SERVER, down=True).was_away(since=time.monotonic())


def test_a_registry_that_came_back() -> None:
    upstream = Upstream(SERVER, back=1000.0)
    assert upstream.was_away(since=990.0)
    assert upstream.was_away(since=1004.0)
    assert not upstream.was_away(since=1006.0)
