"""Circles of parents: a proxy whose parents lead back to it. PURE.

Each CONNECT to a parent names the daemons that it has come through, in the field CDN-Loop (RFC 8586). A connection
serves many requests, so a daemon remembers for each host those that have lately come to it. If its own name is among
them, its parents lead back to it, and it refuses.
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
_MAX_NAMES = 16  # daemons one after the other
_MAX_FIELD = 2048  # characters
_MAX_HOSTS = 1000
_TTL = 60.0  # seconds
_ELEMENT = re.compile(rf"{_CDN_ID}[ \t]*;[ \t]*by=([0-9a-f]{{16}})")


@define
class ParentCircles:
    """The daemons below this one, by the host that they connect to. `now` returns seconds."""

    name: str
    _now: Callable[[], float]
    _below: BoundedDict[Host, frozenset[str]] = field(init=False)

    @_below.default
    def _make_below(self) -> BoundedDict[Host, frozenset[str]]:
        return BoundedDict(_MAX_HOSTS, ttl=_TTL, clock=self._now)

    @classmethod
    def of(cls, secret: bytes, now: Callable[[], float]) -> ParentCircles:
        """Return those of the daemon with this `secret`, which all of its processes have."""
        return cls(blake2b(secret, digest_size=8, person=b"parents").hexdigest(), now)

    def receive(self, host: Host, value: str) -> None:
        """Note the daemons that a CONNECT to `host` has come through.

        Raise `LoopDetected` if this one is among them, or if they are too many.
        """
        names = set()
        for element in value[:_MAX_FIELD].split(","):
            match = _ELEMENT.fullmatch(element.strip(" \t"))
            if match is not None:
                names.add(match[1])
        if self.name in names:
            raise LoopDetected(f"the parents in UPSTREAM_PROXY lead back to this proxy for {host.authority}")
        if len(names) >= _MAX_NAMES:
            raise LoopDetected(f"the request for {host.authority} has come through {len(names)} proxies")
        if names:
            known = self._below.get(host) or frozenset()
            self._below[host] = frozenset(sorted(names | known)[:_MAX_NAMES])

    def value(self, host: Host) -> str:
        """Return the field of a CONNECT to `host`."""
        names = sorted(self._below.get(host) or ())[: _MAX_NAMES - 1]
        return ", ".join(f"{_CDN_ID};by={name}" for name in (*names, self.name))
