"""The rate limits of registries: how many pulls are left, and until when a registry refuses more.

Docker Hub counts each GET of a manifest. Once a registry has answered 429, every further GET would be refused as well,
and may prolong the refusal. So the proxy answers for it, until the time that it named; HEAD and blobs are not counted,
and go on. Then one request asks again.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from attrs import asdict, evolve, frozen
from twisted.logger import Logger

from dockerproxy.bounded_dict import BoundedDict
from dockerproxy.cache.best_effort import try_put
from dockerproxy.cache.identity import LOGIN_PREFIX, PUBLIC
from dockerproxy.errors import NameInvalid, UpstreamFailing
from dockerproxy.http.headers import Headers
from dockerproxy.oci.docker_hub import DOCKER_HUB, registry_label
from dockerproxy.oci.names import Registry
from dockerproxy.store.records import Records
from dockerproxy.upstream.retry import parse_retry_after

LIMIT = "limit"
"""The kind of the records: one for each registry, and one for each login of the administrator's."""

# Seconds that a refusal lasts if the 429 does not say it: 2, and twice as many each time that it is repeated, because
# many registries limit the requests of a second. If no pull is left in a long window, it takes longer.
_FIRST_REFUSAL, _MAX_REFUSAL, _EXHAUSTED_REFUSAL = 2.0, 64.0, 60.0
_PROBE_TIME = 10.0  # seconds for which one request asks whether the refusal has ended
_WRITE_INTERVAL = 30.0  # seconds between two records of what responses to HEAD say
_MAX_REGISTRIES = 1000  # in memory; a wildcard has any number of them
_MAX_LOGINS = 10_000  # logins of clients that have limits of their own
_MAX_AHEAD = 2 * 3600.0  # seconds; the end of a refusal that is farther ahead is of a clock that was wrong

# Docker Hub: ratelimit-limit: 100;w=21600, ratelimit-remaining: 76;w=21600
_QUOTA = re.compile(r"\s*([0-9]{1,9})\s*(?:;\s*w=([0-9]{1,9})\s*)?")

log = Logger()


@frozen
class RateLimit:
    """The word of a registry: `source` may pull `limit` times in `window` seconds, and `remaining` pulls are left.

    Each is None if it has not said so. It said it at `seen`, and refuses pulls until `refused_until` (POSIX times). It
    has refused `refusals` times in succession. The number of pulls that are left has only fallen since `since`, so the
    window turns within `window` seconds of that. `login` is the name of the administrator's login that it is about.
    """

    limit: int | None = None
    window: int | None = None
    remaining: int | None = None
    source: str | None = None
    seen: float = 0.0
    refused_until: float = 0.0
    refusals: int = 0
    since: float = 0.0
    login: str | None = None

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> RateLimit:
        """Return the limit that `asdict` turned into `record`. Raise ValueError if it is another document."""
        try:
            limit = cls(**record)
        except TypeError:
            raise ValueError("not a rate limit") from None
        numbers = (limit.limit, limit.window, limit.remaining, limit.refusals)
        times = (limit.seen, limit.refused_until, limit.since)
        is_valid = all(number is None or isinstance(number, int) for number in numbers)
        if not is_valid or not all(isinstance(moment, int | float) for moment in times):
            raise ValueError("not a rate limit")
        return limit

    def after(self, headers: Headers, now: float) -> RateLimit:
        """Return the limit after a response with `headers`."""
        limit, remaining = _quota(headers.get("ratelimit-limit")), _quota(headers.get("ratelimit-remaining"))
        if limit is None and remaining is None:
            return self
        source = (headers.get("docker-ratelimit-source") or "")[:64]
        window = (limit and limit[1]) or (remaining and remaining[1]) or self.window
        has_risen = remaining is not None and (self.remaining is None or remaining[0] > self.remaining)
        has_turned = window is not None and not 0 <= now - self.since < window
        return evolve(
            self,
            since=now if has_risen or has_turned else self.since,
            limit=limit[0] if limit else self.limit,
            window=window,
            remaining=remaining[0] if remaining else self.remaining,
            source=source if source.isascii() and source.isprintable() and source else self.source,
            seen=now,
        )

    def plausible_at(self, now: float) -> RateLimit:
        """Return the limit with the times that are impossible at `now`, because the clock was wrong, replaced by it."""
        if self.refused_until <= now + _MAX_AHEAD and self.since <= now and self.seen <= now:
            return self
        refused_until = now if self.refused_until > now + _MAX_AHEAD else self.refused_until
        return evolve(self, refused_until=refused_until, since=min(self.since, now), seen=min(self.seen, now))

    def reserved(self, percent: int) -> int:
        """Return how many pulls `percent` of the limit are, which are kept for clients."""
        return -(-(self.limit or 0) * percent // 100)

    def turns_at(self, now: float) -> float | None:
        """Return the time by which more pulls are allowed; None if that is not known."""
        if now < self.refused_until:
            return self.refused_until
        return None if self.window is None else self.since + self.window

    @property
    def usual_refusal(self) -> float:
        """The seconds that a refusal lasts if its response does not say it."""
        doubled = min(_MAX_REFUSAL, _FIRST_REFUSAL * (1 << min(self.refusals, 10)))
        return max(_EXHAUSTED_REFUSAL, doubled) if self.remaining == 0 else doubled

    @property
    def fields(self) -> list[tuple[str, str]]:
        """The header fields that say what is left, as Docker Hub writes them."""
        quotas = (("RateLimit-Limit", self.limit), ("RateLimit-Remaining", self.remaining))
        window = "" if self.window is None else f";w={self.window}"
        return [(name, f"{quota}{window}") for name, quota in quotas if quota is not None]

    def describe(self, registry: Registry) -> str:
        """Return the sentence that a client gets in place of its pull."""
        name = "Docker Hub" if registry == DOCKER_HUB else str(registry)
        if self.limit is None:
            allowed = f"{name} limits the rate of pulls"
        else:
            window = f" in {_format_window(self.window)}" if self.window else ""
            allowed = f"{name} allows {self.limit} pulls{window}" + (f" for {self.source}" if self.source else "")
        until = time.strftime("%H:%M:%S", time.gmtime(self.refused_until))
        advice = (
            "a login for auth.docker.io in AUTH_REGISTRIES raises the limit"
            if registry == DOCKER_HUB and self.login is None
            else ""
        )
        return "; ".join(
            filter(None, (allowed, f"it refuses more until about {until} UTC", "what is cached goes on", advice))
        )


class RateLimits:
    """The limits of all registries, as every process knows them, also after a restart.

    `identity` is that of the client. Clients without a credential share one limit, and so do those that a login of the
    administrator's serves; records hold these. A client's own login has its own, which is known to this process only.
    `on_refused` is called with the registry of each pull that is refused here.
    """

    def __init__(
        self,
        records: Records,
        clock: Callable[[], float],
        on_refused: Callable[[Registry], object] = lambda registry: None,
    ) -> None:
        self._records = records
        self._clock = clock
        self._on_refused = on_refused
        self._of_logins: BoundedDict[tuple[str, str], RateLimit] = BoundedDict(_MAX_LOGINS)
        # By the key of the record, newer than it by `_WRITE_INTERVAL` at most.
        self._current: BoundedDict[tuple[str, ...], RateLimit] = BoundedDict(_MAX_REGISTRIES)

    def get(self, registry: Registry, identity: str = PUBLIC) -> RateLimit:
        """Return what is known."""
        key = _record_key(registry, identity)
        if key is None:
            return self._of_logins.get((str(registry.host), identity)) or RateLimit()
        record, now = self._records.get(*key), self._clock()
        try:
            stored = RateLimit() if record is None else RateLimit.from_record(record)
        except ValueError:
            stored = RateLimit()
        current = self._current.get(key)
        is_newer = current is not None and (current.seen > stored.seen or stored.seen > now)
        return (current if current is not None and is_newer else stored).plausible_at(now)

    def check(self, registry: Registry, identity: str) -> None:
        """Raise `UpstreamFailing` (429) if `registry` refuses pulls now.

        After that time, the first caller asks whether it still does, and the others wait for the answer.
        """
        limit, now = self.get(registry, identity), self._clock()
        if now < limit.refused_until:
            self._on_refused(registry)
            retry_after = "Retry-After", str(int(limit.refused_until - now) + 1)
            raise UpstreamFailing(limit.describe(registry), 429, headers=[retry_after, *limit.fields])
        if limit.refused_until:
            self._set(registry, identity, evolve(limit, refused_until=now + _PROBE_TIME, seen=now))

    def note(
        self,
        registry: Registry,
        identity: str,
        method: str,
        status: int,
        headers: Headers,
        login: str | None = None,
    ) -> None:
        """Note what the response to a request for a manifest says. GET is a pull, HEAD only tells what is left.

        `login` is the name of the administrator's login with which it was sent.
        """
        if method != "GET" and "ratelimit-remaining" not in headers:
            return
        known, now = self.get(registry, identity), self._clock()
        limit = known.after(headers, now)
        if method != "GET":
            pass
        elif status == 429:
            seconds = parse_retry_after(headers, now) or limit.usual_refusal
            limit = evolve(limit, refused_until=now + seconds, refusals=known.refusals + 1, seen=now)
            if not known.refusals:
                log.warn("{sentence}", sentence=limit.describe(registry))
        elif known.refused_until:
            limit = evolve(limit, refused_until=0.0, refusals=0, seen=now)
            log.info("{registry} accepts pulls again", registry=registry_label(registry))
        if limit is not known and limit.login != login:
            limit = evolve(limit, login=login)
        if limit is not known:
            self._set(registry, identity, limit, is_pull=method == "GET")

    def _set(self, registry: Registry, identity: str, limit: RateLimit, *, is_pull: bool = True) -> None:
        key = _record_key(registry, identity)
        if key is None:
            self._of_logins[str(registry.host), identity] = limit
            return
        stored = self._records.get(*key) or {}
        self._current[key] = limit
        is_new = any(stored.get(name) != getattr(limit, name) for name in ("refused_until", "limit", "since"))
        if is_pull or is_new or not 0 <= limit.seen - float(stored.get("seen") or 0.0) < _WRITE_INTERVAL:
            try_put(self._records, asdict(limit), *key)


def _record_key(registry: Registry, identity: str) -> tuple[str, ...] | None:
    """Return the key of the record; None if the limit is a client's own."""
    if identity == PUBLIC:
        return LIMIT, str(registry.host)
    return (LIMIT, str(registry.host), identity) if identity.startswith(LOGIN_PREFIX) else None


def stored_limits(records: Records, now: float) -> list[tuple[Registry, RateLimit]]:
    """Return what is recorded: registries, and their limits for clients without a credential or with a shared login.

    A torn record is left out. `now` is POSIX time. Blocks.
    """
    limits = []
    for entry in records.walk(LIMIT):
        record = records.read(entry)
        with suppress(ValueError, NameInvalid):
            if record is not None:
                limits.append((Registry.parse(entry.key[1]), RateLimit.from_record(record).plausible_at(now)))
    return sorted(limits, key=lambda limit: (str(limit[0]), limit[1].login or "", -limit[1].seen))


def _quota(value: str | None) -> tuple[int, int | None] | None:
    match = _QUOTA.fullmatch(value or "")
    return None if match is None else (int(match[1]), int(match[2]) if match[2] else None)


def _format_window(seconds: int) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length and not seconds % length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"
