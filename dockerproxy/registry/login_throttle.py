"""Delays the logins of clients that guess passwords. Pure."""

from __future__ import annotations

from collections.abc import Callable

from attrs import frozen

from dockerproxy.bounded_dict import BoundedDict
from dockerproxy.shares import client_key

_MAX_CLIENTS = 10_000
_FREE_FAILURES = 5  # a person mistypes; a host behind a NAT has an old password
_FIRST_DELAY = 0.5  # seconds
_MAX_DELAY = 30.0
_FORGET_AFTER = 300.0  # seconds without a failure


@frozen
class _Failures:
    count: int
    last: float


class LoginThrottle:
    """Counts failed logins of each client address (of each network for IPv6). `clock` is monotonic, in seconds.

    The delay doubles with each failure beyond the fifth, up to 30 s. A login that succeeds does not reset it: an
    attacker with one account of his own would otherwise guess without delay.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._failures: BoundedDict[str, _Failures] = BoundedDict(_MAX_CLIENTS, ttl=_FORGET_AFTER, clock=clock)

    def remaining_delay(self, client: str) -> float:
        """Return the seconds until the next password of `client` is checked; 0 if it is checked at once."""
        failures = self._failures.get(client_key(client))
        if failures is None or failures.count < _FREE_FAILURES:
            return 0.0
        delay = min(_MAX_DELAY, _FIRST_DELAY * 2.0 ** min(failures.count - _FREE_FAILURES, 10))
        return max(0.0, failures.last + delay - self._clock())

    def record_failure(self, client: str) -> None:
        """Count a wrong password of `client`."""
        client = client_key(client)
        failures = self._failures.get(client)
        self._failures[client] = _Failures(1 if failures is None else failures.count + 1, self._clock())
