"""Circles of parents: a proxy whose parents lead back to it. PURE.

Each CONNECT to a parent names the daemons that it has come through, in the field CDN-Loop (RFC 8586). A connection
serves many requests, so a daemon remembers for each host those that have lately come to it. If its own name is among
them, its parents lead back to it, and it refuses.

Clients may invent names. So a daemon passes fewer on than a parent refuses, and the oldest are left out first: those of
a true circle come again with each turn. A circle of more than _MAX_PASSED_ON daemons is not noticed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from hashlib import blake2b

from attrs import define, field

from dockerproxy.bounded_dict import BoundedDict
from dockerproxy.errors import LoopDetected
from dockerproxy.oci.names import Host

FIELD = "CDN-Loop"

_CDN_ID = "docker-registry-proxy"
_MAX_NAMES = 16  # in a field that is refused
_MAX_PASSED_ON = 14  # names of others
_MAX_FIELD = 2048  # characters
_MAX_HOSTS = 1000
_TTL = 60.0  # seconds
_ELEMENT = re.compile(rf"{_CDN_ID}[ \t]*;[ \t]*by=([0-9a-f]{{16}})")


@define
class ParentCircles:
    """The daemons below this one, by the host that they connect to. `now` returns seconds."""

    name: str
    _now: Callable[[], float]
    _below: BoundedDict[Host, tuple[str, ...]] = field(init=False)  # the last ones that came are at the end

    @_below.default
    def _make_below(self) -> BoundedDict[Host, tuple[str, ...]]:
        return BoundedDict(_MAX_HOSTS, ttl=_TTL, clock=self._now)

    @classmethod
    def of(cls, secret: bytes, now: Callable[[], float]) -> ParentCircles:
        """Return those of the daemon with this `secret`, which all of its processes have."""
        return cls(blake2b(secret, digest_size=8, person=b"parents").hexdigest(), now)

    def receive(self, host: Host, value: str) -> None:
        """Note the daemons that a CONNECT to `host` has come through.

        Raise `LoopDetected` if this one is among them, or if they are too many.
        """
        names: dict[str, None] = {}
        for element in value[:_MAX_FIELD].split(","):
            match = _ELEMENT.fullmatch(element.strip(" \t"))
            if match is not None:
                names[match[1]] = None
        if self.name in names:
            raise LoopDetected(f"the parents in UPSTREAM_PROXY lead back to this proxy for {host.authority}")
        if len(names) >= _MAX_NAMES:
            raise LoopDetected(f"the request for {host.authority} has come through {len(names)} proxies")
        if names:
            known = [name for name in self._below.get(host) or () if name not in names]
            self._below[host] = (*known, *names)[-_MAX_PASSED_ON:]

    def value(self, host: Host) -> str:
        """Return the field of a CONNECT to `host`."""
        return ", ".join(f"{_CDN_ID};by={name}" for name in (*(self._below.get(host) or ()), self.name))
