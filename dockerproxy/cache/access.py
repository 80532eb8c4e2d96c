"""Who may read which cached repository. The digest is where the bytes are, never the right to read them.

What counts is upstream's word, remembered by (registry, repository) and the identity it was given to. It is on disk, so
that a restart while upstream is gone still serves what it served before.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from enum import Enum
from math import inf

from dockerproxy.cache.identity import PUBLIC
from dockerproxy.cache.notes import remember
from dockerproxy.cache.origin import Visitor
from dockerproxy.store.records import Records

FRESH = 300.0
"""Seconds for which upstream's yes is not asked for again."""

OUTAGE = 86400.0
"""Seconds for which a client's own yes is believed while upstream cannot be asked. What is public, or what our own
credential reads, is believed for as long as upstream is gone."""

_SAVE_EVERY = 60.0  # seconds after which a yes that is known is written down again

_MAX_IDENTITIES = 200
_MAX_REMEMBERED = 50_000


class Standing(Enum):
    """What is known of an identity before a repository."""

    PROVEN = "upstream said yes a moment ago"
    STALE = "upstream said yes once: enough while it cannot be asked"
    UNKNOWN = "upstream has to be asked"


class Access:
    """Upstream's yeses; `clock` is POSIX time. `shared`: other processes use the records, too."""

    def __init__(self, records: Records, clock: Callable[[], float], shared: bool = False) -> None:
        self._records = records
        self._clock = clock
        self._shared = shared
        self._recent: OrderedDict[tuple[str, str], float] = OrderedDict()

    def standing(self, key: str, identity: str) -> Standing:
        """Return how `identity` stands before the repository `key`; what all may read, each may."""
        now = self._clock()
        best = Standing.UNKNOWN
        for who in (identity, PUBLIC) if identity != PUBLIC else (PUBLIC,):
            standing = self._judge(self._when(key, who, now), now, who)
            if standing is Standing.PROVEN:
                return standing
            if standing is Standing.STALE:
                best = standing
        return best

    def is_proven_since(self, key: str, identity: str, since: float) -> bool:
        """Whether upstream, asked by whatever process, let `identity` read from `key` at `since` or later.

        Only what was `proven` as `awaited` is sure to be known of another process.
        """
        return max(self._recent.get((key, identity), -inf), self._saved_at(key, identity)) >= since

    def was_admitted(self, visitor: Visitor) -> bool:
        """Whether upstream let the visitor in once, which has to do while it cannot be asked."""
        identities = [visitor.identity] if visitor.voucher is None else [visitor.identity, visitor.voucher]
        return any(self.standing(visitor.origin.key, identity) is not Standing.UNKNOWN for identity in identities)

    def now(self) -> float:
        """Return the time, as `proven` takes it."""
        return self._clock()

    def proven(self, key: str, identity: str, when: float, *, awaited: bool = False) -> None:
        """Note that upstream let `identity` read from `key` at the time `when`.

        `awaited`: other processes may wait to hear just that, so it is written down at once.
        """
        known = self._recent.get((key, identity))
        if known is not None and when < known <= self._clock():
            return
        self._recent[key, identity] = when
        self._recent.move_to_end((key, identity))
        if len(self._recent) > _MAX_REMEMBERED:
            self._recent.popitem(last=False)
        age = 0.0 if awaited and self._shared else _SAVE_EVERY
        if known is None or when - self._saved_at(key, identity) > age:
            self._save(key, identity, when)

    def refused(self, key: str, identity: str) -> None:
        """Note that upstream does not let `identity` read from `key` (any more)."""
        self._recent.pop((key, identity), None)
        if self._saved_at(key, identity) > -inf:
            self._save(key, identity, None)

    def _when(self, key: str, identity: str, now: float) -> float | None:
        when = self._recent.get((key, identity))
        if when is not None and now - when < FRESH:
            return when
        record = self._records.get("access", key) or {}
        if identity in record:  # with a yes, or with a no, which another process may have heard
            when = _moment(record[identity])
        return when if when is not None and when > -inf else None

    def _judge(self, when: float | None, now: float, identity: str) -> Standing:
        if when is None:
            return Standing.UNKNOWN
        age = now - when
        if 0 <= age < FRESH:
            return Standing.PROVEN
        if identity.startswith("own:") and not 0 <= age < OUTAGE:
            return Standing.UNKNOWN
        return Standing.STALE

    def _saved_at(self, key: str, identity: str) -> float:
        return _moment((self._records.get("access", key) or {}).get(identity))

    def _save(self, key: str, identity: str, when: float | None) -> None:
        """Write down a yes, or None for a no; the latest yeses stay, those for all first, and noes if there is room."""
        yeses: dict[str, float] = {identity: when} if when is not None else {}
        noes: dict[str, None] = {identity: None} if when is None else {}
        for name, saved in (self._records.get("access", key) or {}).items():
            if name != identity and isinstance(saved, int | float):
                yeses[name] = saved
            elif name != identity and saved is None:
                noes[name] = None
        newest = sorted(yeses.items(), key=lambda item: (item[0].startswith("own:"), -item[1]))
        remember(self._records, dict([*newest, *noes.items()][:_MAX_IDENTITIES]), "access", key)


def _moment(saved: object) -> float:
    """Return when a yes was heard, as it was written down; -inf for a no, or for what is neither."""
    return saved if isinstance(saved, int | float) else -inf
