"""Figures of several rounds: their medians, ratios, and the table that people read."""

from __future__ import annotations

from bench.table import NGINX, PROXY, REGISTRY, Table, number


def table() -> Table:
    found = Table()
    for ours, theirs in ((10, 4), (60, 18), (20, 6)):
        found.add("hit", "1 client", PROXY, "throughput", "MB/s", ours)
        found.add("hit", "1 client", NGINX, "throughput", "MB/s", theirs)
    found.add("hit", "8 clients", PROXY, "throughput", "MB/s", 7.0, busy=0.84)
    found.add("hit", "1 client", PROXY, "server CPU", "s/GB", 0.5)
    found.add("push", "1 layer", PROXY, "throughput", "MB/s", 1234.5)
    found.add("push", "1 layer", REGISTRY, "throughput", "MB/s", 1000.0)
    return found


def test_medians_are_compared_and_not_means() -> None:
    row = table().rows["hit", "1 client", "throughput"]
    assert (row.median(PROXY), row.median(NGINX)) == (20, 6)
    assert row.ratio(NGINX) == 20 / 6


def test_without_a_peer_there_is_no_ratio() -> None:
    row = table().rows["hit", "8 clients", "throughput"]
    assert row.median(NGINX) is None
    assert row.ratio(NGINX) is None


def test_each_measure_has_the_columns_of_its_own_peers() -> None:
    text = table().text({"hit": "hit: a blob", "push": "push: a layer"})
    assert [line.split() for line in text.splitlines()] == [
        [],
        ["hit:", "a", "blob"],
        ["proxy", "nginx", "ratio"],
        ["1", "client", "throughput", "MB/s", "20.0", "6.00", "3.33"],
        ["server", "CPU", "s/GB", "0.50"],
        ["8", "clients", "throughput", "MB/s", "7.00*"],
        [],
        ["push:", "a", "layer"],
        ["proxy", "registry:2", "ratio"],
        ["1", "layer", "throughput", "MB/s", "1,234", "1,000", "1.23"],
        [],
        *[line.split() for line in text.splitlines()[-2:]],
    ]
    assert text.splitlines()[-2].startswith("* The server used less than 85 %")


def test_the_rounds_are_in_the_data() -> None:
    (row, *_) = table().data()
    assert row["samples"] == {PROXY: [10, 60, 20], NGINX: [4, 18, 6]}
    assert row["ratios"] == {NGINX: 20 / 6}


def test_numbers_have_three_digits() -> None:
    assert [number(value) for value in (None, 0.125, 9.994, 12.34, 1234.5)] == ["", "0.12", "9.99", "12.3", "1,234"]
