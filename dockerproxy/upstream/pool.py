"""Idle connections, kept for the next request to the same place."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from dockerproxy.upstream.connection import UpstreamConnection

_MAX_PER_KEY = 32
_MAX_TOTAL = 256
_IDLE_TIMEOUT = 60.0


class Pool:
    """Idle connections by key: at most 32 a key and 256 in all, none for longer than 60 s; the oldest have to go.

    The last one to become idle is the first to be used again: it is the least likely to be closed at the other end.
    """

    def __init__(self, clock: Any) -> None:
        self._clock = clock
        self._idle: dict[UpstreamConnection, Any] = {}  # each with its timer, the oldest first

    def take(self, key: Hashable) -> UpstreamConnection | None:
        """Return an idle connection for `key`, or None."""
        for connection in reversed(self._idle):
            if connection.key == key and connection.alive:
                self.remove(connection)
                return connection
        return None

    def put(self, connection: UpstreamConnection) -> None:
        """Keep a connection for another request with its key."""
        same_key = [other for other in self._idle if other.key == connection.key]
        if len(same_key) >= _MAX_PER_KEY:
            self._evict(same_key[0])
        elif len(self._idle) >= _MAX_TOTAL:
            self._evict(next(iter(self._idle)))
        self._idle[connection] = self._clock.callLater(_IDLE_TIMEOUT, self._evict, connection)

    def remove(self, connection: UpstreamConnection) -> None:
        """Forget a connection: it is in use, or no more."""
        timer = self._idle.pop(connection, None)
        if timer is not None and timer.active():
            timer.cancel()

    def _evict(self, connection: UpstreamConnection) -> None:
        self.remove(connection)
        connection.abort()
