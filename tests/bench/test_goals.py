"""Targets, and whether figures reach them."""

from __future__ import annotations

import pytest

from bench import goals
from bench.goals import GOALS, Goal, verdicts
from bench.table import NGINX, PROXY, Table

KEY = ("hit", "1 client", "server CPU")


def table(ours: float, theirs: float | None = None) -> Table:
    found = Table()
    found.add(KEY[0], KEY[1], PROXY, KEY[2], "s/GB", ours)
    if theirs is not None:
        found.add(KEY[0], KEY[1], NGINX, KEY[2], "s/GB", theirs)
    return found


@pytest.mark.parametrize(
    ("goal", "ours", "theirs", "met"),
    [
        (Goal("CPU", KEY, 0.8, peer=NGINX), 0.8, 1.0, True),
        (Goal("CPU", KEY, 0.8, peer=NGINX), 0.81, 1.0, False),
        (Goal("rate", KEY, 1.2, peer=NGINX, at_least=True), 2.4, 2.0, True),
        (Goal("rate", KEY, 1.2, peer=NGINX, at_least=True), 2.3, 2.0, False),
        (Goal("wait", KEY, 5), 5, None, True),
        (Goal("wait", KEY, 5), 5.1, 100, False),
        (Goal("count", KEY, 6000, at_least=True), 6000, None, True),
        (Goal("count", KEY, 6000, at_least=True), 5999, 1, False),
    ],
)
def test_a_bound_is_for_the_ratio_where_there_is_a_peer(
    goal: Goal, ours: float, theirs: float | None, met: bool
) -> None:
    (verdict,) = verdicts(table(ours, theirs), [goal])
    assert verdict.met is met


def test_what_was_not_measured_has_no_verdict() -> None:
    other = Goal("other", ("hit", "8 clients", "server CPU"), 1)
    alone = Goal("alone", KEY, 1, peer=NGINX)
    assert list(verdicts(table(1.0), [other, alone])) == []


def test_the_table_says_which_targets_are_missed() -> None:
    found = list(
        verdicts(table(0.9, 1.0), [Goal("CPU", KEY, 0.8, peer=NGINX), Goal("CPU at all", KEY, 1500, at_least=True)])
    )
    assert [line.split() for line in goals.text(found).splitlines()] == [
        ["what", "unit", "proxy", "peer", "ratio", "target"],
        ["CPU", "s/GB", "0.90", "nginx", "1.00", "0.90", "≤", "0.8", "×", "MISSED"],
        ["CPU", "at", "all", "s/GB", "0.90", "≥", "1,500", "MISSED"],
        [],
        ["0", "of", "2", "targets", "met"],
    ]


def test_no_two_targets_are_for_the_same_figure() -> None:
    assert len({goal.key for goal in GOALS}) == len({goal.what for goal in GOALS}) == len(GOALS)
