"""The audit log: an entry for each change, with its user, its origin, its time and its result."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from attrs import field, frozen

from dockerproxy.registry.principal import Principal
from dockerproxy.store.journal import BackgroundJournal, Entry, Journal, bounded

AUDIT_FILE = "audit.jsonl"
"""The name of the file in STATE_DIR."""

_MAX_BYTES = 16 * 1024 * 1024  # of each of two generations; about 60,000 entries

MAX_REFUSALS = 100
"""Refused sign-ins that one process records in an hour."""

_HOUR = 3600.0


@frozen
class AuditLog:
    """Passes entries to `append`, which does not block. Every process does. `clock` returns POSIX time.

    An entry is a JSON object with ``time`` (UTC), ``user`` (null without a login), ``from`` (an address, or the control
    socket), ``user_agent``, ``action``, ``target``, ``result`` and ``detail``. Texts are escaped and bounded.
    """

    _append: Callable[[Entry], None]
    _clock: Callable[[], float] = time.time
    _refusals: deque[float] = field(factory=lambda: deque(maxlen=MAX_REFUSALS), init=False)  # their times

    @classmethod
    def open(cls, reactor: Any, state_dir: str) -> AuditLog:
        """Return the audit log in `state_dir`, and write what waits when `reactor` has stopped."""
        journal = BackgroundJournal(reactor, Journal(f"{state_dir}/{AUDIT_FILE}", "audit", _MAX_BYTES))
        reactor.addSystemEventTrigger("after", "shutdown", journal.flush)
        return cls(journal.append)

    def record(self, principal: Principal, action: str, target: str, result: str = "done", detail: str = "") -> None:
        """Record that `principal` did `action` to `target`. Never raises, and does not wait for the disk."""
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._clock())),
            "user": principal.user and bounded(principal.user),
            "from": bounded(principal.address),
            "user_agent": principal.user_agent and bounded(principal.user_agent),
            "action": action,
            "target": bounded(target),
            "result": bounded(result),
        }
        self._append(entry | ({"detail": bounded(detail)} if detail else {}))

    def record_refusal(self, principal: Principal, action: str, target: str) -> None:
        """Record that `action` was refused, at most `MAX_REFUSALS` times an hour.

        Anybody can cause such an entry, and with any number of them displace all others.
        """
        now, times = self._clock(), self._refusals
        if len(times) == MAX_REFUSALS and 0 <= now - times[0] < _HOUR:
            return
        times.append(now)
        is_last = len(times) == MAX_REFUSALS and 0 <= now - times[0] < _HOUR
        detail = "further ones within the hour are only in the access log" if is_last else ""
        self.record(principal, action, target, "refused", detail)
