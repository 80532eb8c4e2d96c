"""The rate limits of registries, as pulls for the administrator spend them: RATE_RESERVE is left to clients."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

from attrs import asdict, frozen
from twisted.internet.task import deferLater

from dockerproxy.cache.pull_counts import HOUR, PullCounts
from dockerproxy.cache.rate_limits import RateLimit, RateLimits
from dockerproxy.concurrency import LocalKeyedLock
from dockerproxy.errors import RegistryError
from dockerproxy.http.headers import Headers
from dockerproxy.oci.docker_hub import registry_label
from dockerproxy.oci.names import Registry
from dockerproxy.upstream.retry import parse_retry_after

_POLL = 300.0  # seconds between two questions whether the window has turned; HEAD is not counted
_MIN_POLL = 1.0
_POLLS = 20  # in a window that is short
_DEFAULT_WAIT = 60.0  # seconds to wait if a registry says nothing about its limit but 429
_TOP = 10  # repositories in a report

T = TypeVar("T")


@frozen
class _Wait:
    until: float
    sentence: str


class PullBudget:
    """Lets one pull at a time through to a registry that counts them, while more than the reserve is left.

    `limits` are those that this process knows, `counts` the pulls of all processes. `clock` returns POSIX time.
    """

    def __init__(
        self, reactor: Any, limits: RateLimits, counts: PullCounts, clock: Callable[[], float], reserve: int
    ) -> None:
        self._reactor = reactor
        self._limits = limits
        self._counts = counts
        self._clock = clock
        self._turns = LocalKeyedLock()
        self._waiting: dict[Registry, _Wait] = {}
        self._queued: set[int] = set()  # pulls that wait for their turn, by `id`
        self.reserve = reserve
        """RATE_RESERVE, in percent of the limit."""

    def is_limited(self, registry: Registry, identity: str) -> bool:
        """Return whether `registry` counts the pulls of `identity`."""
        limit = self._limits.get(registry, identity)
        return limit.remaining is not None or self._clock() < limit.refused_until

    def row(self, registry: Registry, identity: str) -> dict[str, Any]:
        """Return the rest of the limit for pulls of `identity`, as a JSON value."""
        limit = self._limits.get(registry, identity)
        return {
            "registry": registry_label(registry),
            "remaining": limit.remaining,
            "limit": limit.limit,
            "reserve": limit.reserved(self.reserve) if limit.limit is not None else None,
        }

    def waits_until(self, pull: object) -> float | None:
        """Return the time until which `pull` waits at the latest; None if it does not."""
        if id(pull) not in self._queued:
            return None
        wait = self._waiting.get(pull.registry)  # type: ignore[attr-defined]
        return None if wait is None else wait.until

    def sentence(self, registry: Registry) -> str:
        """Return why pulls from `registry` wait."""
        wait = self._waiting.get(registry)
        return "" if wait is None else wait.sentence

    def rows(self, limits: Iterable[tuple[Registry, RateLimit]], *, repositories: bool) -> list[dict[str, Any]]:
        """Return what is known of `limits`, as JSON values; with their uses if `repositories` may be named.

        ``gone_in`` are the seconds that the rest lasts at the rate of the last hour, ``turns`` the time by which more
        pulls are allowed.
        """
        return [self._row(registry, limit, repositories) for registry, limit in limits]

    def _row(self, registry: Registry, limit: RateLimit, repositories: bool) -> dict[str, Any]:
        host, now = str(registry.host), self._clock()
        last_hour = self._counts.by_repository(host, HOUR).total()
        turns_at = limit.turns_at(now)
        top = self._counts.by_repository(host, limit.window or HOUR).most_common(_TOP) if repositories else []
        return {
            "registry": registry_label(registry),
            **asdict(limit),
            "reserved": None if limit.limit is None else limit.reserved(self.reserve),
            "last_hour": last_hour,
            "gone_in": limit.remaining / last_hour * HOUR if limit.remaining and last_hour else None,
            "turns": turns_at if turns_at is not None and turns_at > now else None,
            "top": [{"repository": name, "pulls": count} for name, count in top],
        }

    async def spend(
        self, pull: Any, identity: str, get: Callable[[], Awaitable[T]], ask: Callable[[], Awaitable[object]]
    ) -> T:
        """Return the result of `get`, a GET of a manifest. Wait while the registry allows no more pulls.

        `ask` sends a HEAD, whose response says how many are left. Raise the errors of `get`, except that of the limit.
        """
        registry: Registry = pull.registry
        if not self.is_limited(registry, identity):
            try:
                return await get()
            except RegistryError as error:
                if error.status != 429:
                    raise
        self._queued.add(id(pull))
        try:
            async with self._turns.hold(str(registry)):
                return await self._spend_in_turn(registry, identity, get, ask)
        finally:
            self._queued.discard(id(pull))

    async def _spend_in_turn(
        self, registry: Registry, identity: str, get: Callable[[], Awaitable[T]], ask: Callable[[], Awaitable[object]]
    ) -> T:
        try:
            while True:
                now, limit = self._clock(), self._limits.get(registry, identity)
                if not self._is_spent(limit, now):
                    try:
                        return await get()
                    except RegistryError as error:
                        if error.status != 429:
                            raise
                        retry_after = parse_retry_after(Headers(error.headers), now) or _DEFAULT_WAIT
                        limit = self._limits.get(registry, identity)
                        until = max(now + retry_after, limit.refused_until)
                else:
                    until = limit.turns_at(now) or now + _POLL
                until = max(until, now + _MIN_POLL)
                self._waiting[registry] = _Wait(until, self._describe(registry, limit, until))
                await deferLater(self._reactor, min(until - now, self._poll_interval(limit)), lambda: None)
                await self._ask(ask)
        finally:
            self._waiting.pop(registry, None)

    def _is_spent(self, limit: RateLimit, now: float) -> bool:
        if now < limit.refused_until:
            return True
        has_turned = limit.window is not None and not now < limit.since + limit.window
        return not has_turned and limit.remaining is not None and limit.remaining <= limit.reserved(self.reserve)

    async def _ask(self, ask: Callable[[], Awaitable[object]]) -> None:
        try:
            await ask()
        except RegistryError:
            pass  # the GET will say why

    def _poll_interval(self, limit: RateLimit) -> float:
        return max(_MIN_POLL, min(_POLL, (limit.window or _POLL * _POLLS) / _POLLS))

    def _describe(self, registry: Registry, limit: RateLimit, until: float) -> str:
        name = registry_label(registry)
        if limit.remaining is None:
            reason = f"{name} refuses pulls now"
        else:
            of_all = "" if limit.limit is None else f" of {limit.limit}"
            kept = ", which RATE_RESERVE keeps for clients" if limit.remaining else ""
            reason = f"{limit.remaining}{of_all} pulls are left at {name}{kept}"
        return f"{reason}; this goes on by {time.strftime('%H:%M:%S', time.gmtime(until))} UTC"
