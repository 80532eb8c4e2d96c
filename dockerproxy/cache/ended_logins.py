"""The logins of the administrator's that are refused, as all processes know of them: said once in the log."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attrs import evolve, frozen
from twisted.logger import Logger

from dockerproxy.bounded_dict import BoundedDict

_MAX_LOGINS = 256
REPORT_TTL = 3600.0
"""Seconds for which a report counts. A process that knows of a refusal reports it again sooner."""

log = Logger()


@frozen
class EndedLogin:
    """A login that was refused: for which registry, in which setting, how, and since which Unix time."""

    registry: str
    setting: str
    reason: str
    since: float


class EndedLogins:
    """The logins that are refused now. `clock` returns Unix time."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._logins: BoundedDict[str, EndedLogin] = BoundedDict(_MAX_LOGINS, ttl=REPORT_TTL, clock=clock)

    def report(self, registry: str, setting: str, reason: str) -> None:
        """Record that the login for `registry` in `setting` is refused, or with an empty `reason` that it works again.

        Several processes report the same; only a change is logged.
        """
        known = self._logins.get(registry)
        if not reason:
            self._logins.pop(registry)
            if known is not None:
                log.warn("the login for {registry} in {setting} works again", registry=registry, setting=known.setting)
            return
        if known is None:
            log.error(
                "THE LOGIN FOR {registry} IN {setting} IS REFUSED: {reason}. Public images are pulled without it, and"
                " private ones are refused, until it works again. If it has ended, renew it in {setting} and reload",
                registry=registry, setting=setting, reason=reason,
            )  # fmt: skip
            known = EndedLogin(registry, setting, reason, self._clock())
        self._logins[registry] = evolve(known, setting=setting, reason=reason)

    def clear(self) -> None:
        """Forget all reports, because the settings are new."""
        self._logins.clear()

    def report_list(self) -> list[dict[str, Any]]:
        """Return the refused logins. `dockerproxy status` and `debug` show them."""
        logins = [login for name in list(self._logins) if (login := self._logins.get(name)) is not None]
        return [
            {"registry": login.registry, "setting": login.setting, "reason": login.reason, "since": login.since}
            for login in logins
        ]
