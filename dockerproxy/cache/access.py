"""Access control for cached repositories. Knowing a digest locates a blob but never grants the right to read it.

Only upstream grants access. Grants are stored per (registry, repository) and identity. They are kept on disk so that
clients keep their access if the proxy restarts while upstream is down.

A grant to PUBLIC counts for every identity, but only for public content: content that upstream has sent to a client
without a credential. A repository that was public once may have private content now.

A grant and a denial of one identity are two records, each with its time, and the later one counts. No process modifies
a record that another one may modify as well, so none can overwrite a denial that it has not seen.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from math import inf

from dockerproxy.bounded_dict import BoundedDict
from dockerproxy.cache.best_effort import try_put, try_remove
from dockerproxy.cache.identity import PUBLIC
from dockerproxy.cache.upstream import UpstreamPrincipal, may_be_guard
from dockerproxy.errors import RegistryError
from dockerproxy.store.records import Records

GRANT_TTL = 300.0
"""Seconds for which a grant is used without asking upstream again."""

STALE_GRANT_TTL = 86400.0
"""Seconds for which a grant to a client's own credential stays valid while upstream is down. Grants to the public and
to the proxy's own login stay valid for the whole outage."""

_SAVE_INTERVAL = 60.0  # seconds after which a renewed grant is saved again

_MAX_GRANTS_IN_MEMORY = 50_000

GRANT, DENIAL = "grant", "denial"
"""The kinds of the records. Their keys are the key of the repository and the identity."""


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
        self._grants: BoundedDict[tuple[str, str], float] = BoundedDict(_MAX_GRANTS_IN_MEMORY)

    def state(self, key: str, identity: str, *, public: bool) -> AccessState:
        """Return the access of `identity` to content of the repository `key`. `public` says whether that is public."""
        now = self._clock()
        best = AccessState.UNKNOWN
        for candidate in (identity, PUBLIC) if identity != PUBLIC else (PUBLIC,):
            if candidate == PUBLIC and not public:
                continue
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
        granted_at = max(self._grants.get((key, identity)) or -inf, self._saved_time(GRANT, key, identity))
        return granted_at >= since and granted_at > self._saved_time(DENIAL, key, identity)

    def outage_identity(self, principal: UpstreamPrincipal, error: RegistryError, *, public: bool) -> str | None:
        """Return the identity that lets `principal` read content during an outage, because upstream granted it access.

        Return None if there is none. `public` says whether the content is public. `error` is the outage: if
        something before the registry refuses, or leads to a web page, only the public may read, because that may be
        the registry's guard.
        """
        now = self._clock()
        for identity in (PUBLIC,) if may_be_guard(error) else (principal.identity, principal.fallback_identity, PUBLIC):
            if identity is None or (identity == PUBLIC and not public):
                continue
            granted_at = self._granted_at(principal.repository.key, identity, now)
            if self._evaluate(granted_at, now, identity) is not AccessState.UNKNOWN:
                return identity
        return None

    def now(self) -> float:
        """Return the current time, in the form that `record_grant` expects."""
        return self._clock()

    def record_grant(self, key: str, identity: str, granted_at: float, *, write_through: bool = False) -> None:
        """Record that upstream let `identity` read from `key` at the time `granted_at`.

        `write_through` saves the grant at once if the records are shared, because other processes may wait for it.
        """
        now = self._clock()
        previous = self._grants.get((key, identity))
        if previous is not None and granted_at < previous <= now:
            return
        denied_at = self._saved_time(DENIAL, key, identity)
        if granted_at <= denied_at <= now:
            return  # a denial that arrived while a download was running
        self._grants[key, identity] = granted_at
        save_interval = 0.0 if write_through and self._shared else _SAVE_INTERVAL
        if previous is None or granted_at - self._saved_time(GRANT, key, identity) > save_interval:
            try_put(self._records, {"at": granted_at}, GRANT, key, identity)
        if denied_at > now:  # the clock was set back
            try_remove(self._records, DENIAL, key, identity)

    def record_denial(self, key: str, identity: str) -> None:
        """Record that upstream does not (or no longer) let `identity` read from `key`."""
        self._grants.pop((key, identity))
        if self._saved_time(GRANT, key, identity) > self._saved_time(DENIAL, key, identity):
            saved = try_put(self._records, {"at": self._clock()}, DENIAL, key, identity)
            if not saved:  # removing a file works on a full disk
                try_remove(self._records, GRANT, key, identity)

    def _granted_at(self, key: str, identity: str, now: float) -> float | None:
        granted_at = self._grants.get((key, identity))
        if granted_at is not None and now - granted_at < GRANT_TTL:
            return granted_at
        # Older grants count as saved, because another process may have recorded a denial.
        saved_at = self._saved_time(GRANT, key, identity)
        if saved_at <= self._saved_time(DENIAL, key, identity):
            return None
        if 0 <= now - saved_at < GRANT_TTL:
            self._grants[key, identity] = saved_at  # spares the next request two system calls
        return saved_at

    def _evaluate(self, granted_at: float | None, now: float, identity: str) -> AccessState:
        if granted_at is None:
            return AccessState.UNKNOWN
        age = now - granted_at
        if 0 <= age < GRANT_TTL:
            return AccessState.GRANTED
        if identity.startswith("own:") and not 0 <= age < STALE_GRANT_TTL:
            return AccessState.UNKNOWN
        return AccessState.GRANTED_STALE

    def _saved_time(self, kind: str, key: str, identity: str) -> float:
        """Return the time of a saved grant or denial; -inf if there is none."""
        return _saved_time(self._records, kind, key, identity)


def public_may_read(records: Records, key: str) -> bool:
    """Return whether the records say that the public may read from the repository `key`.

    Upstream has let clients without a credential read from it, and not denied it since. Some of its content may be
    private all the same; see `Visibility`. May be called in any thread.
    """
    return _saved_time(records, GRANT, key, PUBLIC) > _saved_time(records, DENIAL, key, PUBLIC)


def _saved_time(records: Records, kind: str, key: str, identity: str) -> float:
    at = (records.get(kind, key, identity) or {}).get("at")
    return at if isinstance(at, int | float) else -inf
