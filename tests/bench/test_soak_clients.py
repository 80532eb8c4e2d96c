"""Whether an outage may have affected a request of the soak test's clients."""

from __future__ import annotations

import time
from typing import Any

from bench.soak_clients import FlakyUpstream

SERVER: Any = None


def test_registry_that_was_always_up() -> None:
    assert not FlakyUpstream(SERVER).was_down(started=time.monotonic())


def test_registry_that_is_down() -> None:
    assert FlakyUpstream(SERVER, is_down=True).was_down(started=time.monotonic())


def test_registry_that_came_back_up() -> None:
    upstream = FlakyUpstream(SERVER, up_since=1000.0)
    assert upstream.was_down(started=990.0)
    assert upstream.was_down(started=1004.0)
    assert not upstream.was_down(started=1006.0)
