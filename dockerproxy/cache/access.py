"""Who may read which cached repository. The digest is where the bytes are, never the right to read them.

What counts is upstream's word, remembered by (registry, repository) and the identity it was given to. It is on disk, so
that a restart while upstream is gone still serves what it served before.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from enum import Enum
from math import inf

from dockerproxy.cache.best_effort import try_put
from dockerproxy.cache.identity import PUBLIC
from dockerproxy.cache.upstream import Principal
from dockerproxy.store.records import Records

GRANT_TTL = 300.0
"""Seconds for which upstream's yes is not asked for again."""

STALE_GRANT_TTL = 86400.0
"""Seconds for which a client's own yes is believed while upstream cannot be asked. What is public, or what our own
credential reads, is believed for as long as upstream is gone."""

_SAVE_INTERVAL = 60.0  # seconds after which a yes that is known is written down again

_MAX_IDENTITIES = 200
_MAX_GRANTS_IN_MEMORY = 50_000


class AccessState(Enum):
    """What is known of an identity before a repository."""

    GRANTED = "upstream said yes a moment ago"
    GRANTED_STALE = "upstream said yes once: enough while it cannot be asked"
    UNKNOWN = "upstream has to be asked"


class Access:
    """Upstream's yeses; `clock` is POSIX time. `shared`: other processes use the records, too."""

    def __init__(self, records: Records, clock: Callable[[], float], shared: bool = False) -> None:
        self._records = records
        self._clock = clock
        self._shared = shared
        self._grants: OrderedDict[tuple[str, str], float] = OrderedDict()

    def state(self, key: str, identity: str) -> AccessState:
        """Return how `identity` stands before the repository `key`; what all may read, each may."""
        now = self._clock()
        best = AccessState.UNKNOWN
        for candidate in (identity, PUBLIC) if identity != PUBLIC else (PUBLIC,):
            state = self._evaluate(self._granted_at(key, candidate, now), now, candidate)
            if state is AccessState.GRANTED:
                return state
            if state is AccessState.GRANTED_STALE:
                best = state
        return best

    def granted_since(self, key: str, identity: str, since: float) -> bool:
        """Whether upstream, asked by whatever process, let `identity` read from `key` at `since` or later.

        Only what was `proven` as `awaited` is sure to be known of another process.
        """
        return max(self._grants.get((key, identity), -inf), self._saved_grant_time(key, identity)) >= since

    def had_access(self, principal: Principal) -> bool:
        """Whether upstream let the visitor in once, which has to do while it cannot be asked."""
        identities = (
            [principal.identity]
            if principal.fallback_identity is None
            else [principal.identity, principal.fallback_identity]
        )
        return any(self.state(principal.repository.key, identity) is not AccessState.UNKNOWN for identity in identities)

    def now(self) -> float:
        """Return the time, as `proven` takes it."""
        return self._clock()

    def record_grant(self, key: str, identity: str, granted_at: float, *, write_through: bool = False) -> None:
        """Note that upstream let `identity` read from `key` at the time `when`.

        `awaited`: other processes may wait to hear just that, so it is written down at once.
        """
        previous = self._grants.get((key, identity))
        if previous is not None and granted_at < previous <= self._clock():
            return
        self._grants[key, identity] = granted_at
        self._grants.move_to_end((key, identity))
        if len(self._grants) > _MAX_GRANTS_IN_MEMORY:
            self._grants.popitem(last=False)
        save_interval = 0.0 if write_through and self._shared else _SAVE_INTERVAL
        if previous is None or granted_at - self._saved_grant_time(key, identity) > save_interval:
            self._save(key, identity, granted_at)

    def record_denial(self, key: str, identity: str) -> None:
        """Note that upstream does not let `identity` read from `key` (any more)."""
        self._grants.pop((key, identity), None)
        if self._saved_grant_time(key, identity) > -inf:
            self._save(key, identity, None)

    def _granted_at(self, key: str, identity: str, now: float) -> float | None:
        granted_at = self._grants.get((key, identity))
        if granted_at is not None and now - granted_at < GRANT_TTL:
            return granted_at
        record = self._records.get("access", key) or {}
        if identity in record:  # with a yes, or with a no, which another process may have heard
            granted_at = _grant_time(record[identity])
        return granted_at if granted_at is not None and granted_at > -inf else None

    def _evaluate(self, granted_at: float | None, now: float, identity: str) -> AccessState:
        if granted_at is None:
            return AccessState.UNKNOWN
        age = now - granted_at
        if 0 <= age < GRANT_TTL:
            return AccessState.GRANTED
        if identity.startswith("own:") and not 0 <= age < STALE_GRANT_TTL:
            return AccessState.UNKNOWN
        return AccessState.GRANTED_STALE

    def _saved_grant_time(self, key: str, identity: str) -> float:
        return _grant_time((self._records.get("access", key) or {}).get(identity))

    def _save(self, key: str, identity: str, granted_at: float | None) -> None:
        """Write down a yes, or None for a no; the latest yeses stay, those for all first, and noes if there is room."""
        grants: dict[str, float] = {identity: granted_at} if granted_at is not None else {}
        denials: dict[str, None] = {identity: None} if granted_at is None else {}
        for name, saved in (self._records.get("access", key) or {}).items():
            if name != identity and isinstance(saved, int | float):
                grants[name] = saved
            elif name != identity and saved is None:
                denials[name] = None
        newest = sorted(grants.items(), key=lambda item: (item[0].startswith("own:"), -item[1]))
        try_put(self._records, dict([*newest, *denials.items()][:_MAX_IDENTITIES]), "access", key)


def _grant_time(value: object) -> float:
    """Return when a yes was heard, as it was written down; -inf for a no, or for what is neither."""
    return value if isinstance(value, int | float) else -inf
