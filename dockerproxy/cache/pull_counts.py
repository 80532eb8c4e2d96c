"""How many pulls a registry has counted lately, and of which repositories: the uses of its limit."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable

_STEP = 300.0  # seconds that one count covers
_MAX_COUNTS = 20_000  # of all registries; the oldest go first
_MAX_TEXT = 512  # characters of a name

HOUR = 3600.0


class PullCounts:
    """Counts GETs of manifests in steps of five minutes. `clock` returns POSIX time."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._counts: OrderedDict[tuple[int, str, str], int] = OrderedDict()  # by step, registry and repository

    def add(self, registry: str, repository: str) -> None:
        """Count a pull of `repository` from the registry at the host `registry`."""
        key = int(self._clock() // _STEP), registry[:_MAX_TEXT], repository[:_MAX_TEXT]
        self._counts[key] = self._counts.get(key, 0) + 1
        if len(self._counts) > _MAX_COUNTS:
            self._counts.popitem(last=False)

    def by_repository(self, registry: str, seconds: float) -> Counter[str]:
        """Return how many pulls of each repository there were in the last `seconds`, and in up to five minutes more."""
        since = int((self._clock() - seconds) // _STEP)
        totals: Counter[str] = Counter()
        for (step, host, repository), count in self._counts.items():
            if host == registry and step >= since:
                totals[repository] += count
        return totals
