"""How long a tag's answer is taken as fresh. PURE.

The tiers are those of rpardini/docker-registry-proxy: regular expressions matched at the start of the tag, as nginx
does with a location that ends in one. A digest never goes stale and is not asked about here.
"""

from __future__ import annotations

import re

from attrs import frozen


@frozen
class Freshness:
    """The manifest-cache tiers; times in seconds."""

    enabled: bool
    primary: re.Pattern[str]
    primary_time: float
    secondary: re.Pattern[str]
    secondary_time: float
    default_time: float

    def lifetime(self, tag: str) -> float:
        """Return for how many seconds an answer about `tag` holds without asking; 0 where each use asks."""
        if not self.enabled:
            return 0.0
        if self.primary.match(tag):
            return self.primary_time
        if self.secondary.match(tag):
            return self.secondary_time
        return self.default_time

    def is_fresh(self, tag: str, age: float) -> bool:
        """Return whether an answer of `age` seconds holds; one from the future (a clock was set back) does not."""
        return 0 <= age < self.lifetime(tag)
