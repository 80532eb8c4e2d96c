"""The clocks of members, by the dates of their answers.

A token that one member issues during an outage is good for an hour by its clock, and counts at all members.
"""

from __future__ import annotations

from collections.abc import Callable
from email.utils import parsedate_to_datetime

from attrs import define, field
from twisted.logger import Logger

from dockerproxy.bounded_dict import BoundedDict

_MAX_OFFSET = 60.0  # seconds by which clocks may differ
_INTERVAL = 60.0  # seconds between two looks at the clock of a member
_MAX_MEMBERS = 1000

log = Logger()


@define(eq=False)
class MemberClocks:
    """Compares the clocks of members with this machine's. `now` returns seconds, `wall_clock` POSIX time."""

    _now: Callable[[], float]
    _wall_clock: Callable[[], float]
    _compared: BoundedDict[str, bool] = field(init=False)
    _wrong: BoundedDict[str, bool] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._compared = BoundedDict(_MAX_MEMBERS, ttl=_INTERVAL, clock=self._now)
        self._wrong = BoundedDict(_MAX_MEMBERS, ttl=None, clock=self._now)

    def compare(self, member: str, date: str | None) -> None:
        """Compare the clock of `member`, which has sent a Date field. Warn once, until the clocks agree again."""
        if date is None or member in self._compared:
            return
        self._compared[member] = True
        try:
            offset = parsedate_to_datetime(date[:64]).timestamp() - self._wall_clock()
        except (ValueError, OverflowError):
            return
        if abs(offset) <= _MAX_OFFSET:
            self._wrong.pop(member)
        elif member not in self._wrong:
            self._wrong[member] = True
            log.warn(
                "the clock of the member {member} is {seconds} s {direction} of this machine's, so that tokens of one"
                " may have expired at the other; set the clocks by NTP (dockerproxy doctor says which one is wrong)",
                member=member, seconds=round(abs(offset)), direction="ahead" if offset > 0 else "behind",
            )  # fmt: skip
