"""Host names to addresses, by the system's resolver in threads of its own.

A look-up blocks for as long as name servers do not answer: 10 to 30 s with a usual resolv.conf. Clients choose the
names of tunnels. So look-ups have their own threads, one look-up of a name serves everyone who asks meanwhile, and
answers and failures are kept briefly.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from dockerproxy.bounded_dict import BoundedDict
from dockerproxy.concurrency import SingleFlight

_MAX_NAMES = 10_000
_ANSWER_TTL = 5.0  # seconds; getaddrinfo does not return the records' own TTL
_FAILURE_TTL = 2.0

Lookup = Callable[..., Sequence[tuple[Any, Any, Any, Any, tuple[Any, ...]]]]


class LookupPool(Protocol):
    """Threads for look-ups; see `BoundedThreadPool`."""

    async def run(self, function: Callable[..., Any], *args: object, client: str = "") -> Any: ...


class NameResolver:
    """Resolves names with `getaddrinfo` in `pool`. `clock` is monotonic, in seconds.

    Without `ipv6`, only IPv4 addresses are asked for.
    """

    def __init__(
        self,
        pool: LookupPool,
        clock: Callable[[], float],
        *,
        ipv6: bool = True,
        getaddrinfo: Lookup = socket.getaddrinfo,
    ) -> None:
        self._pool = pool
        self._family = socket.AF_UNSPEC if ipv6 else socket.AF_INET
        self._getaddrinfo = getaddrinfo
        self._answers: BoundedDict[str, list[str]] = BoundedDict(_MAX_NAMES, ttl=_ANSWER_TTL, clock=clock)
        self._failures: BoundedDict[str, bool] = BoundedDict(_MAX_NAMES, ttl=_FAILURE_TTL, clock=clock)
        self._lookups: SingleFlight[str, list[str]] = SingleFlight(cancel_abandoned=True)

    async def resolve(self, name: str, client: str = "") -> list[str]:
        """Return the addresses of `name` in the resolver's order (RFC 6724); none if it has none.

        `client` is whose request needs it, `""` for the daemon's own. Raise `TooManyRequests` or `ServiceOverloaded` if
        too many look-ups wait.
        """
        answer = self._answers.get(name)
        if answer is not None:
            return answer
        if self._failures.get(name):
            return []
        return await self._lookups.do(name, lambda: self._look_up(name, client))

    @property
    def pending(self) -> list[str]:
        """The names that are being looked up."""
        return list(self._lookups)

    async def _look_up(self, name: str, client: str) -> list[str]:
        try:
            found = await self._pool.run(self._getaddrinfo, name, None, self._family, socket.SOCK_STREAM, client=client)
        except (socket.gaierror, UnicodeError):
            self._failures[name] = True
            return []
        except OSError:  # no descriptors or memory: nothing that the next request must not try
            return []
        addresses = list(dict.fromkeys(str(sockaddr[0]) for _, _, _, _, sockaddr in found))
        self._answers[name] = addresses
        return addresses
