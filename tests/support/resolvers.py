"""Resolvers for dialers in tests."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from twisted.internet.defer import Deferred

from dockerproxy.net.resolver import NameResolver
from dockerproxy.thread_pool import BoundedThreadPool, PoolLimits


class StaticResolver:
    """A resolver with fixed addresses. It returns at once, except that `slow.example` never returns."""

    def __init__(self, addresses: Mapping[str, Sequence[str]] | None = None) -> None:
        self.addresses = addresses or {}
        self.queries: list[tuple[str, str]] = []
        """Every name that was asked for, with the client that it counts for."""

    async def resolve(self, name: str, client: str = "") -> list[str]:
        self.queries.append((name, client))
        if name == "slow.example":
            await Deferred()
        return list(self.addresses.get(name, []))


def system_resolver(reactor: Any, **options: Any) -> NameResolver:
    """Return a resolver that asks the system, in threads of its own."""
    return NameResolver(
        BoundedThreadPool.start(reactor, "name look-ups", PoolLimits(2, 2, 10, 10)), time.monotonic, **options
    )
