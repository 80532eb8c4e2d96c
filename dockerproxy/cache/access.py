"""Access control for cached repositories. Knowing a digest locates a blob but never grants the right to read it.

Only upstream grants access. Grants are stored per (registry, repository) and identity. They are kept on disk so that
clients keep their access if the proxy restarts while upstream is down.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from enum import Enum
from math import inf

from dockerproxy.cache.best_effort import try_put
from dockerproxy.cache.identity import PUBLIC
from dockerproxy.cache.upstream import UpstreamPrincipal
from dockerproxy.store.records import Records

GRANT_TTL = 300.0
"""Seconds for which a grant is used without asking upstream again."""

STALE_GRANT_TTL = 86400.0
"""Seconds for which a grant to a client's own credential stays valid while upstream is down. Grants to the public and
to the proxy's own login stay valid for the whole outage."""

_SAVE_INTERVAL = 60.0  # seconds after which a renewed grant is saved again

_MAX_IDENTITIES = 200
_MAX_GRANTS_IN_MEMORY = 50_000


class AccessState(Enum):
    """Access of one identity to one repository, as far as the cache knows."""

    GRANTED = "upstream granted access less than GRANT_TTL seconds ago"
    GRANTED_STALE = "upstream granted access earlier; sufficient during an outage"
    UNKNOWN = "upstream must be asked"


class Access:
    """Grants by upstream. `clock` returns POSIX time. `shared` is true if other processes use the same records."""

    def __init__(self, records: Records, clock: Callable[[], float], shared: bool = False) -> None:
        self._records = records
        self._clock = clock
        self._shared = shared
        self._grants: OrderedDict[tuple[str, str], float] = OrderedDict()

    def state(self, key: str, identity: str) -> AccessState:
        """Return the access of `identity` to the repository `key`. A grant to PUBLIC counts for every identity."""
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
        """Return whether any process recorded a grant of `key` to `identity` at the time `since` or later.

        Grants of other processes are reliably visible only if they were recorded with `write_through`.
        """
        return max(self._grants.get((key, identity), -inf), self._saved_grant_time(key, identity)) >= since

    def had_access(self, principal: UpstreamPrincipal) -> bool:
        """Return whether upstream has granted access before. This is sufficient during an outage."""
        identities = (
            [principal.identity]
            if principal.fallback_identity is None
            else [principal.identity, principal.fallback_identity]
        )
        return any(self.state(principal.repository.key, identity) is not AccessState.UNKNOWN for identity in identities)

    def now(self) -> float:
        """Return the current time, in the form that `record_grant` expects."""
        return self._clock()

    def record_grant(self, key: str, identity: str, granted_at: float, *, write_through: bool = False) -> None:
        """Record that upstream let `identity` read from `key` at the time `granted_at`.

        `write_through` saves the grant at once if the records are shared, because other processes may wait for it.
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
        """Record that upstream does not (or no longer) let `identity` read from `key`."""
        self._grants.pop((key, identity), None)
        if self._saved_grant_time(key, identity) > -inf:
            self._save(key, identity, None)

    def _granted_at(self, key: str, identity: str, now: float) -> float | None:
        granted_at = self._grants.get((key, identity))
        if granted_at is not None and now - granted_at < GRANT_TTL:
            return granted_at
        record = self._records.get("access", key) or {}
        if identity in record:  # a grant, or a denial that another process may have recorded
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
        """Persist a grant, or a denial if `granted_at` is None.

        Keep at most _MAX_IDENTITIES entries: shared grants first, then the newest grants, then denials.
        """
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
    """Return the time of a saved grant; -inf for a denial or an invalid value."""
    return value if isinstance(value, int | float) else -inf
