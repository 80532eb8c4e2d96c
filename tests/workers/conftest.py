"""Fixtures for the tests of the workers. They use real sockets with a `DescriptorReactor`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from twisted.logger import LogEvent, globalLogPublisher


@pytest.fixture
def log_events() -> Iterator[list[LogEvent]]:
    """Return the list of events that are logged during the test."""
    events: list[LogEvent] = []
    globalLogPublisher.addObserver(events.append)
    yield events
    globalLogPublisher.removeObserver(events.append)
