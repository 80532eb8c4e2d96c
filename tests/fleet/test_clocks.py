"""Warnings about clocks that differ between members."""

from __future__ import annotations

from email.utils import formatdate

import pytest
from twisted.internet.task import Clock

from dockerproxy.fleet import clocks
from dockerproxy.fleet.clocks import MemberClocks

NOW = 1_700_000_000.0


class ClocksHarness:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock, self.lines = Clock(), list[str]()
        self.clocks = MemberClocks(self.clock.seconds, lambda: NOW + self.clock.seconds())
        monkeypatch.setattr(clocks.log, "warn", lambda form, **values: self.lines.append(form.format(**values)))

    def answer(self, offset: float, member: str = "10.0.0.2:3128") -> None:
        """Let a member with a clock that is `offset` seconds ahead answer, a minute after its last answer."""
        self.clock.advance(60)
        self.clocks.compare(member, formatdate(NOW + self.clock.seconds() + offset, usegmt=True))


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> ClocksHarness:
    return ClocksHarness(monkeypatch)


def test_clocks_that_agree_are_no_news(harness: ClocksHarness) -> None:
    for offset in (0, 30, -30):
        harness.answer(offset)
    assert harness.lines == []


def test_a_clock_that_is_wrong_is_logged_once_until_it_is_right(harness: ClocksHarness) -> None:
    for offset in (3600, 3600, 0, -3600):
        harness.answer(offset)
    ahead, behind = harness.lines
    assert "the clock of the member 10.0.0.2:3128 is 3600 s ahead of this machine's" in ahead
    assert "3600 s behind" in behind


def test_the_clock_is_looked_at_once_a_minute(harness: ClocksHarness) -> None:
    harness.answer(0)
    harness.clocks.compare("10.0.0.2:3128", formatdate(0, usegmt=True))
    assert harness.lines == []


@pytest.mark.parametrize("date", [None, "", "yesterday", "Mon, 99 Foo 9999999999 99:99:99 GMT", "\0" * 10_000])
def test_a_field_that_is_no_date_says_nothing(harness: ClocksHarness, date: str | None) -> None:
    harness.clocks.compare("10.0.0.2:3128", date)
    assert harness.lines == []
