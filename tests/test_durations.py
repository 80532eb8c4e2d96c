"""Durations of settings and of the command."""

from __future__ import annotations

import pytest

from dockerproxy.durations import parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("1h30m", 5400), ("2w", 1_209_600), ("60d", 5_184_000), ("1.5h", 5400), ("250ms", 0.25)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "soon", "-1s", "1 h", "1h 30m", "1y", "1e3", "9999999999s", "٣s"])
def test_not_a_duration(text: str) -> None:
    with pytest.raises(ValueError, match="duration"):
        parse_duration(text)
