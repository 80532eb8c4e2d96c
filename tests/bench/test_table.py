"""The table of results: medians, ratios, and the text output."""

from __future__ import annotations

from bench.table import NGINX, PROXY, REGISTRY, ResultTable, format_number


def make_table() -> ResultTable:
    result_table = ResultTable()
    for proxy_value, peer_value in ((10, 4), (60, 18), (20, 6)):
        result_table.add("hit", "1 client", PROXY, "throughput", "MB/s", proxy_value)
        result_table.add("hit", "1 client", NGINX, "throughput", "MB/s", peer_value)
    result_table.add("hit", "8 clients", PROXY, "throughput", "MB/s", 7.0, utilization=0.84)
    result_table.add("hit", "1 client", PROXY, "server CPU", "s/GB", 0.5)
    result_table.add("push", "1 layer", PROXY, "throughput", "MB/s", 1234.5)
    result_table.add("push", "1 layer", REGISTRY, "throughput", "MB/s", 1000.0)
    return result_table


def test_medians_are_compared() -> None:
    row = make_table().rows["hit", "1 client", "throughput"]
    assert (row.median(PROXY), row.median(NGINX)) == (20, 6)
    assert row.ratio(NGINX) == 20 / 6


def test_no_ratio_without_a_peer() -> None:
    row = make_table().rows["hit", "8 clients", "throughput"]
    assert row.median(NGINX) is None
    assert row.ratio(NGINX) is None


def test_columns_per_benchmark() -> None:
    text = make_table().render({"hit": "hit: a blob", "push": "push: a layer"})
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


def test_data_contains_all_rounds() -> None:
    (row, *_) = make_table().as_dicts()
    assert row["samples"] == {PROXY: [10, 60, 20], NGINX: [4, 18, 6]}
    assert row["ratios"] == {NGINX: 20 / 6}


def test_numbers_are_formatted() -> None:
    assert [format_number(value) for value in (None, 0.125, 9.994, 12.34, 1234.5)] == [
        "",
        "0.12",
        "9.99",
        "12.3",
        "1,234",
    ]
