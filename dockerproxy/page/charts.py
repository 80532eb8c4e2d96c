"""Charts as SVG: the paths, labels and scales of the traffic over time and of sparklines. Pure.

A path is in a box of `WIDTH` by `HEIGHT`, which the page stretches to the room that it has. Labels have positions in
percent, because text in a stretched box would be distorted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any

from attrs import frozen

from dockerproxy.page import words

WIDTH, HEIGHT = 1000, 100

RANGES = {"1h": "1 h", "6h": "6 h", "24h": "24 h", "7d": "7 d", "30d": "30 d", "1y": "1 y"}
"""The ranges of time by the name that the API has for them."""

_TICKS = 4
_MAX_BINS = 1000
_STEPS = (1, 1.5, 2, 2.5, 3, 4, 5, 7.5, 10)
_LABELS = {  # by the range: the distance of two labels in seconds, and their form
    "1h": (600, "%H:%M"),
    "6h": (3600, "%H:%M"),
    "24h": (6 * 3600, "%H:%M"),
    "7d": (86400, "%a %d"),
    "30d": (5 * 86400, "%d %b"),
    "1y": (61 * 86400, "%b %Y"),
}


@frozen
class Label:
    """A text at `position` percent of an axis."""

    position: float
    text: str


@frozen
class TrafficChart:
    """The bytes sent to clients, as two areas one above the other: `downloaded` below, and `served`, which is the sum.

    `vertical` are the labels from the top, `horizontal` those from the left.
    """

    served_line: str
    served_area: str
    downloaded_line: str
    downloaded_area: str
    vertical: tuple[Label, ...]
    horizontal: tuple[Label, ...]
    is_empty: bool


def traffic_chart(series: dict[str, Any]) -> TrafficChart:
    """Return the chart of a SERIES document of the API: bytes in each bin of `step` seconds."""
    step = max(1.0, float(series["step"]))
    served = [value / step for value in series["served"][-_MAX_BINS:]]
    downloaded = [value / step for value in series["downloaded"][-_MAX_BINS:]]
    total = [max(pair) for pair in zip(served, downloaded, strict=True)]
    top = axis_top(max(total, default=0.0))
    served_line, downloaded_line = path(total, top), path(downloaded, top)
    return TrafficChart(
        served_line,
        area(served_line),
        downloaded_line,
        area(downloaded_line),
        tuple(Label(100 * tick / _TICKS, words.rate(top * (_TICKS - tick) / _TICKS)) for tick in range(_TICKS)),
        tuple(time_labels(float(series["start"]), step * len(total), series["range"])),
        not any(total),
    )


def axis_top(peak: float) -> float:
    """Return the value at the top of an axis: at least `peak`, with a round number at each of its ticks."""
    peak = max(peak, float(_TICKS))
    unit = 10.0 ** math.floor(math.log10(peak / _TICKS))
    return next(_TICKS * step * unit for step in (*_STEPS, 20) if _TICKS * step * unit >= peak)


def path(values: Sequence[float], top: float) -> str:
    """Return the line through `values`, the first at the left edge and the last at the right one."""
    if not values:
        return f"M0 {HEIGHT} L{WIDTH} {HEIGHT}"
    points = list(values) if len(values) > 1 else [*values, *values]
    width = WIDTH / (len(points) - 1)

    def y(value: float) -> str:
        return f"{HEIGHT - HEIGHT * min(1.0, max(0.0, value / top)):.2f}"

    return "M" + " L".join(f"{number * width:.1f} {y(value)}" for number, value in enumerate(points))


def area(line: str) -> str:
    """Return the area between a line and the bottom."""
    return f"{line} L{WIDTH} {HEIGHT} L0 {HEIGHT} Z"


def sparkline(values: Sequence[float]) -> str:
    """Return a line through `values` that uses the whole height."""
    # Below the top edge, which would cut the line in half.
    return path([value * 0.96 for value in values], max([*values, 1]))


def time_labels(start: float, length: float, range_name: str) -> Iterator[Label]:
    """Yield labels at round times of the server's time zone, within `length` seconds from `start` (POSIX time)."""
    distance, form = _LABELS[range_name]
    if length <= 0:
        return
    first = datetime.fromtimestamp(start)
    midnight = first.replace(hour=0, minute=0, second=0, microsecond=0)
    moment = midnight
    for _ in range(200):
        position = 100 * (moment.timestamp() - start) / length
        if position > 97:  # the text would leave the chart
            return
        if position >= 3:
            yield Label(round(position, 2), moment.strftime(form))
        moment += timedelta(seconds=distance)
