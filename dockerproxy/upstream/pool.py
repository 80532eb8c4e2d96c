"""Idle connections, kept for the next request to the same place."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from dockerproxy.upstream.connection import Connection

_PER_KEY = 32
_ALL = 256
_SECONDS = 60.0


class Pool:
    """Idle connections by key: at most 32 a key and 256 in all, none for longer than 60 s; the oldest have to go.

    The last one to become idle is the first to be used again: it is the least likely to be closed at the other end.
    """

    def __init__(self, clock: Any) -> None:
        self._clock = clock
        self._idle: dict[Connection, Any] = {}  # each with its timer, the oldest first

    def take(self, key: Hashable) -> Connection | None:
        """Return an idle connection for `key`, or None."""
        for connection in reversed(self._idle):
            if connection.key == key and connection.alive:
                self.remove(connection)
                return connection
        return None

    def put(self, connection: Connection) -> None:
        """Keep a connection for another request with its key."""
        same = [other for other in self._idle if other.key == connection.key]
        if len(same) >= _PER_KEY:
            self._drop(same[0])
        elif len(self._idle) >= _ALL:
            self._drop(next(iter(self._idle)))
        self._idle[connection] = self._clock.callLater(_SECONDS, self._drop, connection)

    def remove(self, connection: Connection) -> None:
        """Forget a connection: it is in use, or no more."""
        timer = self._idle.pop(connection, None)
        if timer is not None and timer.active():
            timer.cancel()

    def _drop(self, connection: Connection) -> None:
        self.remove(connection)
        connection.abort()
