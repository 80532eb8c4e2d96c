"""The members of a fleet, and the order in which they are asked for content. PURE.

The order is rendezvous hashing: each member has a score for each key, and the one with the highest owns the key. If a
member comes or goes, only its own keys move, and the former owner of a key is then the second in the order. The order
is a hint. Any member can do any work, so that lists that differ cost a second transfer and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from hashlib import blake2b

from attrs import define, field

RETRY_DELAYS = (1.0, 2.0, 5.0, 10.0, 30.0)
"""Seconds for which a member is left alone after its first failure, the second in succession, and so on."""


_MAX_SCORES = 50_000  # in a second; they take 40 ms
_MAX_OWNERS = 20_000


def blob_key(digest: object) -> str:
    """Return the key of a blob, which all registries share."""
    return str(digest)


def repository_key(host: object, name: object) -> str:
    """Return the key of the manifests and tags of a repository, so that one member answers for a tag."""
    return f"{host}/{name}"


@lru_cache(512)  # each of a thousand members takes 8 KB
def ordered(key: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """Return `names` in the order of their scores for `key`, the owner first."""
    return tuple(sorted(names, key=lambda name: _score(name, key), reverse=True))


def _score(name: str, key: str) -> tuple[bytes, str]:
    return blake2b(f"{name}\n{key}".encode(), digest_size=8).digest(), name


@define
class _MemberFailures:
    """The failures of a member in succession, and until when it is left alone."""

    count: int
    until: float
    reason: str


@define
class Members:
    """The members as one process sees them. `now` returns seconds of a clock that is never set.

    `me` is this daemon's own name, `""` if it is not in the list. Each process learns of failures by its own requests.
    """

    _now: Callable[[], float]
    me: str = ""
    _names: tuple[str, ...] = ()
    changed_at: float = 0.0
    """When the list changed last."""
    _failures: dict[str, _MemberFailures] = field(factory=dict, init=False)
    _owners: dict[str, bool] = field(factory=dict, init=False)
    """Whether this daemon owns a key. It has those that were looked at since the list changed."""
    _scores_left: int = field(default=_MAX_SCORES, init=False)
    _scored_at: float = field(default=0.0, init=False)

    def use(self, names: Iterable[str], me: str) -> None:
        """Replace the list. Members keep their state, also if they come back while they are left alone."""
        self._names, self.me, self.changed_at = tuple(sorted(set(names))), me, self._now()
        known = {*self._names}
        self._failures = {
            name: failures
            for name, failures in self._failures.items()
            if name in known or self.changed_at < failures.until
        }
        self._owners.clear()

    @property
    def names(self) -> tuple[str, ...]:
        """All members, sorted."""
        return self._names

    def ranked(self, key: str) -> Sequence[str]:
        """Return the members in the order for `key` without those that are down. This daemon is never down."""
        return [name for name in ordered(key, self._names) if not self.is_down(name)]

    def owns(self, key: str) -> bool:
        """Return whether this daemon is the owner of `key` if all members are up."""
        return bool(self._names) and max(self._names, key=lambda name: _score(name, key)) == self.me

    def now(self) -> float:
        """Return the seconds of the clock of these members."""
        return self._now()

    def is_copy(self, key: str) -> bool:
        """Return whether another member is known to own `key`, so that this one may lose it.

        To find out takes a millisecond with a thousand members, and each eviction asks about a thousand keys. So
        only some are looked at in each second, and the rest may stay for now.
        """
        if not self.me:
            return False
        is_owner = self._owners.get(key)
        if is_owner is None:
            now = self._now()
            if now - self._scored_at >= 1:
                self._scored_at, self._scores_left = now, _MAX_SCORES
            if self._scores_left <= 0:
                return False
            self._scores_left -= len(self._names)
            if len(self._owners) >= _MAX_OWNERS:
                self._owners.clear()
            is_owner = self._owners[key] = self.owns(key)
        return not is_owner

    def former_owner(self, key: str) -> str | None:
        """Return the member that owned `key` before this owner came, if it is up; None if this is no owner."""
        ranked = self.ranked(key)
        return ranked[1] if len(ranked) > 1 and ranked[0] == self.me else None

    def successor(self, key: str) -> str | None:
        """Return the member that comes after this one in the order for `key`, if there is one that is up."""
        ranked = self.ranked(key)
        position = ranked.index(self.me) + 1 if self.me in ranked else len(ranked)
        return ranked[position] if position < len(ranked) else None

    def has_changed_within(self, seconds: float) -> bool:
        """Return whether the list changed, or this process started, less than `seconds` ago."""
        return self._now() - self.changed_at < seconds

    def is_down(self, name: str) -> bool:
        """Return whether `name` is left alone now, because it has failed."""
        failures = self._failures.get(name)
        return failures is not None and name != self.me and self._now() < failures.until

    def failed(self, name: str, reason: str) -> bool:
        """Note that `name` has failed now. Return whether it was not known to be failing.

        Requests that fail together count once.
        """
        failures, now = self._failures.get(name), self._now()
        if name not in self._names or name == self.me:
            return False
        if failures is None:
            self._failures[name] = _MemberFailures(1, now + RETRY_DELAYS[0], reason)
            return True
        failures.reason = reason
        if now >= failures.until:
            failures.until = now + RETRY_DELAYS[min(failures.count, len(RETRY_DELAYS) - 1)]
            failures.count += 1
        return False

    def distrusted(self, name: str, reason: str, seconds: float) -> None:
        """Leave `name` alone for that long, because its content was wrong."""
        if name in self._names and name != self.me:
            self._failures[name] = _MemberFailures(len(RETRY_DELAYS), self._now() + seconds, reason)

    def worked(self, name: str) -> bool:
        """Note that `name` has answered. Return whether it was known to be failing."""
        failures = self._failures.get(name)
        if failures is None or self._now() < failures.until:  # one that is left alone had begun to answer before
            return False
        del self._failures[name]
        return True

    def states(self) -> dict[str, str]:
        """Return the state of each member: ``me``, ``up``, or why it is down."""
        return {
            name: "me" if name == self.me else self._failures[name].reason if name in self._failures else "up"
            for name in self._names
        }

    def count_others(self) -> tuple[int, int]:
        """Return how many other members are up, and how many are down or have not answered since they were."""
        others = [name for name in self._names if name != self.me]
        down = sum(name in self._failures for name in others)
        return len(others) - down, down
