"""The pool of idle connections to upstreams."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from dockerproxy.upstream.connection import UpstreamConnection

_MAX_PER_KEY = 32
_MAX_TOTAL = 256
_IDLE_TIMEOUT = 60.0


class Pool:
    """Idle connections by key: at most 32 per key and 256 in all, each for at most 60 s. The oldest is evicted first.

    The connection that became idle last is reused first, because the server is least likely to have closed it.
    """

    def __init__(self, clock: Any) -> None:
        self._clock = clock
        self._idle: dict[UpstreamConnection, Any] = {}  # connection to timer, oldest first

    def __len__(self) -> int:
        """Return the number of idle connections."""
        return len(self._idle)

    def take(self, key: Hashable) -> UpstreamConnection | None:
        """Remove and return an idle connection for `key`, or return None."""
        for connection in reversed(self._idle):
            if connection.key == key and connection.alive:
                self.remove(connection)
                return connection
        return None

    def put(self, connection: UpstreamConnection) -> None:
        """Add an idle connection. Evict the oldest one if a limit is exceeded."""
        same_key = [other for other in self._idle if other.key == connection.key]
        if len(same_key) >= _MAX_PER_KEY:
            self._evict(same_key[0])
        elif len(self._idle) >= _MAX_TOTAL:
            self._evict(next(iter(self._idle)))
        self._idle[connection] = self._clock.callLater(_IDLE_TIMEOUT, self._evict, connection)

    def close_all(self, authority: str) -> None:
        """Close all idle connections to the host and port `authority`."""
        for connection in [one for one in self._idle if one.authority == authority]:
            self._evict(connection)

    def remove(self, connection: UpstreamConnection) -> None:
        """Remove a connection, because it is in use or closed."""
        timer = self._idle.pop(connection, None)
        if timer is not None and timer.active():
            timer.cancel()

    def _evict(self, connection: UpstreamConnection) -> None:
        self.remove(connection)
        connection.abort()
