"""Lifetime of a cached tag. PURE.

The tiers are those of rpardini/docker-registry-proxy. Their regular expressions are matched at the start of the tag,
like the end of an nginx location. They apply to tags only, because the content of a digest never changes.
"""

from __future__ import annotations

import re

from attrs import frozen


@frozen
class Freshness:
    """The tiers of the manifest cache. Times are in seconds."""

    enabled: bool
    primary: re.Pattern[str]
    primary_time: float
    secondary: re.Pattern[str]
    secondary_time: float
    default_time: float

    def lifetime(self, tag: str) -> float:
        """Return the seconds for which `tag` is fresh; 0 if each use must be revalidated."""
        if not self.enabled:
            return 0.0
        if self.primary.match(tag):
            return self.primary_time
        if self.secondary.match(tag):
            return self.secondary_time
        return self.default_time

    def is_fresh(self, tag: str, age: float) -> bool:
        """Return whether `tag` is fresh at `age` seconds. A negative age is stale, because the clock was set back."""
        return 0 <= age < self.lifetime(tag)
