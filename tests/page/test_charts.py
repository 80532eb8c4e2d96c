"""Charts, words, set-ups and views: pure functions of the page."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.oci.names import Host
from dockerproxy.page import charts, views, words
from dockerproxy.page.setups import engines

NOW = 1_796_054_400.0
values = st.lists(st.floats(0, 1e15), max_size=400)


def points(line: str) -> list[tuple[float, float]]:
    pairs = re.findall(r"[ML]([0-9.]+) ([0-9.]+)", line)
    return [(float(x), float(y)) for x, y in pairs]


@given(values, st.floats(1, 1e16))
def test_a_line_stays_in_its_box_from_edge_to_edge(values: list[float], top: float) -> None:
    line = points(charts.path(values, top))
    assert all(0 <= x <= charts.WIDTH and 0 <= y <= charts.HEIGHT for x, y in line)
    assert (line[0][0], line[-1][0]) == (0, charts.WIDTH)
    assert [x for x, _ in line] == sorted(x for x, _ in line)


@given(st.floats(0, 1e18))
def test_an_axis_ends_at_the_next_round_number(peak: float) -> None:
    top = charts.axis_top(peak)
    assert top >= peak
    assert top <= max(8.0, 2.5 * peak)
    assert float(f"{top / 4:.3g}") == pytest.approx(top / 4)  # a tick has at most three digits


@pytest.mark.parametrize("range_name", charts.RANGES)
@given(st.lists(st.tuples(st.integers(0, 10**15), st.integers(0, 10**15)), max_size=400), st.integers(1, 2**31))
def test_a_chart_of_any_series(range_name: str, bins: list[tuple[int, int]], start: int) -> None:
    series = {"range": range_name, "step": 300, "start": start, "served": [a for a, _ in bins],
              "downloaded": [b for _, b in bins]}  # fmt: skip
    chart = charts.traffic_chart(series)
    assert len(points(chart.served_line)) == len(points(chart.downloaded_line))
    served, downloaded = points(chart.served_line), points(chart.downloaded_line)
    assert all(above <= below for (_, above), (_, below) in zip(served, downloaded, strict=True))
    assert all(0 <= label.position <= 100 for label in (*chart.vertical, *chart.horizontal))
    assert chart.is_empty == (not any(a or b for a, b in bins))


@pytest.mark.parametrize(
    ("number", "noun", "expected"),
    [
        (1, "day", "1 day"),
        (2, "day", "2 days"),
        (1204, "repository", "1,204 repositories"),
        (4, "process", "4 processes"),
        (0, "client", "0 clients"),
    ],
)
def test_counted(number: int, noun: str, expected: str) -> None:
    assert words.counted(number, noun) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0, "0 s"), (28, "28 s"), (90, "1 min 30 s"), (12000, "3 h 20 min"), (90000, "1 d 1 h")]
)
def test_span(seconds: float, expected: str) -> None:
    assert words.span(seconds) == expected


def test_a_percentage_is_whole_only_if_nothing_is_missing() -> None:
    assert [words.percent(ratio) for ratio in (0.0, 0.91, 0.9999, 1.0, None)] == ["0.0", "91.0", "99.9", "100.0", "—"]


@given(st.text(max_size=400), st.integers(1, 300))
def test_a_strangers_text_is_short_and_printable(text: str, limit: int) -> None:
    shown = words.shortened(text, limit)
    assert len(shown) <= limit
    assert shown.isprintable()


@given(st.lists(st.builds(dict, size=st.integers(0, 10**12), present=st.booleans()), max_size=300))
def test_the_bar_of_layers_is_as_wide_as_its_box(layers: list[dict[str, Any]]) -> None:
    bars = views.layers(layers)["bars"]
    assert len(bars) == min(len(layers), 100)
    ends = [(float(bar["x"]), float(bar["x"]) + float(bar["width"])) for bar in bars]
    assert all(0 <= begin < end <= 100.01 for begin, end in ends)
    assert all(left[1] <= right[0] + 0.01 for left, right in itertools.pairwise(ends))


def test_every_engine_can_be_undone_and_has_the_visitors_address() -> None:
    found = engines(Host("proxy.lan", 80), Host("proxy.lan", 3128), ["docker.io", "quay.io"])
    assert [engine.id for engine in found] == [
        "docker", "containerd", "podman", "crio", "k3s", "kind", "buildkit", "kubernetes",
    ]  # fmt: skip
    for engine in found:
        text = "\n".join(command for step in engine.steps for command in step.commands)
        assert "ndo" in engine.steps[-1].text
        assert "http://proxy.lan/setup" in text or "proxy.lan:3128" in text, engine.id
    kubernetes = "\n".join(command for step in found[-1].steps for command in step.commands)
    assert "/etc/containerd/certs.d/quay.io/hosts.toml" in kubernetes


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("docker.io/library/nginx:1.29", ("docker.io/library/nginx", "1.29")),
        ("reg.test:5000/app", ("reg.test:5000/app", "")),
        ("reg.test:5000/app:v1", ("reg.test:5000/app", "v1")),
        ("app@sha256:ab", ("app", "sha256:ab")),
    ],
)
def test_the_parts_of_an_image(name: str, expected: tuple[str, str]) -> None:
    assert views.split_image(name) == expected
