"""Performance targets and their comparison with figures."""

from __future__ import annotations

import pytest

from bench import performance_targets
from bench.performance_targets import PERFORMANCE_TARGETS, PerformanceTarget, evaluate
from bench.table import NGINX, PROXY, ResultTable

KEY = ("hit", "1 client", "server CPU")


def make_table(proxy_value: float, peer_value: float | None = None) -> ResultTable:
    result_table = ResultTable()
    result_table.add(KEY[0], KEY[1], PROXY, KEY[2], "s/GB", proxy_value)
    if peer_value is not None:
        result_table.add(KEY[0], KEY[1], NGINX, KEY[2], "s/GB", peer_value)
    return result_table


@pytest.mark.parametrize(
    ("target", "proxy_value", "peer_value", "is_met"),
    [
        (PerformanceTarget("CPU", KEY, 0.8, peer=NGINX), 0.8, 1.0, True),
        (PerformanceTarget("CPU", KEY, 0.8, peer=NGINX), 0.81, 1.0, False),
        (PerformanceTarget("rate", KEY, 1.2, peer=NGINX, is_lower_bound=True), 2.4, 2.0, True),
        (PerformanceTarget("rate", KEY, 1.2, peer=NGINX, is_lower_bound=True), 2.3, 2.0, False),
        (PerformanceTarget("wait", KEY, 5), 5, None, True),
        (PerformanceTarget("wait", KEY, 5), 5.1, 100, False),
        (PerformanceTarget("count", KEY, 6000, is_lower_bound=True), 6000, None, True),
        (PerformanceTarget("count", KEY, 6000, is_lower_bound=True), 5999, 1, False),
    ],
)
def test_bound_applies_to_the_ratio_with_a_peer(
    target: PerformanceTarget, proxy_value: float, peer_value: float | None, is_met: bool
) -> None:
    (result,) = evaluate(make_table(proxy_value, peer_value), [target])
    assert result.is_met is is_met


def test_unmeasured_target_has_no_result() -> None:
    other_case = PerformanceTarget("other", ("hit", "8 clients", "server CPU"), 1)
    without_peer = PerformanceTarget("alone", KEY, 1, peer=NGINX)
    assert list(evaluate(make_table(1.0), [other_case, without_peer])) == []


def test_missed_targets_are_marked() -> None:
    results = list(
        evaluate(
            make_table(0.9, 1.0),
            [
                PerformanceTarget("CPU", KEY, 0.8, peer=NGINX),
                PerformanceTarget("CPU at all", KEY, 1500, is_lower_bound=True),
            ],
        )
    )
    assert [line.split() for line in performance_targets.render_results(results).splitlines()] == [
        ["target", "unit", "proxy", "peer", "ratio", "bound"],
        ["CPU", "s/GB", "0.90", "nginx", "1.00", "0.90", "≤", "0.8", "×", "MISSED"],
        ["CPU", "at", "all", "s/GB", "0.90", "≥", "1,500", "MISSED"],
        [],
        ["0", "of", "2", "targets", "met"],
    ]


def test_targets_are_unique() -> None:
    assert (
        len({target.key for target in PERFORMANCE_TARGETS})
        == len({target.label for target in PERFORMANCE_TARGETS})
        == len(PERFORMANCE_TARGETS)
    )
