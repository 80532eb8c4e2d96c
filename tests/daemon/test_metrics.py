"""The metrics: counters of all processes, their sums, and the formats in which Prometheus reads them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import pytest
from attrs import fields_dict
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from dockerproxy.daemon.exposition import (
    ANONYMOUS,
    CONFIGURED,
    Gauge,
    measured_gauges,
    operation_gauge,
    rate_limit_gauges,
    render,
)
from dockerproxy.daemon.metrics import BUCKETS, CACHE_STATUSES, KINDS, REFUSING_SETTINGS, TUNNELS, Metrics
from dockerproxy.settings import Settings

OPENMETRICS = "application/openmetrics-text; version=1.0.0"

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(metrics: Metrics, accept: str = "", gauges: Iterable[Gauge] = ()) -> Samples:
    """Return the samples by name and labels. A sample that occurs twice, or has no metadata, is an error."""
    content_type, content = render(metrics, gauges, accept)
    is_openmetrics = content_type.startswith("application/openmetrics-text")
    assert is_openmetrics or content_type.startswith("text/plain; version=0.0.4")
    samples: Samples = {}
    for family in (parse_openmetrics if is_openmetrics else parse_text)(content.decode()):
        assert family.name.startswith("dockerproxy_") and family.documentation
        assert family.type in ("counter", "gauge", "histogram")
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in samples
            samples[key] = sample.value
    return samples


def nonzero(samples: Samples) -> dict[str, float]:
    """Return the samples other than 0 without buckets, with their labels in alphabetical order."""
    return {
        f"{name.removeprefix('dockerproxy_')} {' '.join(value for _, value in sorted(labels))}": number
        for (name, labels), number in samples.items()
        if number and not name.endswith("_bucket")
    }


def test_counters_with_few_labels_start_at_zero() -> None:
    """`increase()` does not see the step from nothing to 1."""
    samples = scrape(Metrics.make(2, ["docker.io"]))
    assert set(samples.values()) == {0}
    for registry in ("docker.io", "hosted", "own", "other"):
        assert ("dockerproxy_responses_total", frozenset({("registry", registry), ("code", "5xx")})) in samples
        assert ("dockerproxy_sent_bytes_total", frozenset({("registry", registry), ("verdict", "HIT")})) in samples


@pytest.mark.parametrize("accept", ["", "text/plain", OPENMETRICS, "*/*"])
def test_a_request_is_counted(accept: str) -> None:
    metrics = Metrics.make(1, ["quay.io"])
    metrics.for_process(0).count_request("quay.io", "blob", "MISS", 206, 1000, 1.25)
    assert nonzero(scrape(metrics, accept)) == {
        "requests_total blob quay.io MISS": 1,
        "responses_total 2xx quay.io": 1,
        "sent_bytes_total quay.io MISS": 1000,
        "request_seconds_count blob quay.io": 1,
        "request_seconds_sum blob quay.io": 1.25,
    }


@pytest.mark.parametrize(("status", "code"), [(0, "other"), (100, "1xx"), (304, "3xx"), (599, "5xx"), (999, "other")])
def test_codes_are_counted_by_class(status: int, code: str) -> None:
    """An upstream may send any three digits, and the status is 0 if the client left before the response."""
    metrics = Metrics.make(1)
    metrics.for_process(0).count_request("own", "other", "-", status, 0, None)
    assert nonzero(scrape(metrics)) == {"requests_total other own -": 1, f"responses_total {code} own": 1}


def test_other_registries_and_kinds_count_as_other() -> None:
    """No client can add a value of a label by asking for a host."""
    metrics = Metrics.make(1, ["quay.io"])
    for registry in ("evil.example", "", "docker.io", 'a"\n'):
        metrics.for_process(0).count_request(registry, "catalog", "PASS", 200, 0, None)
    assert nonzero(scrape(metrics)) == {"requests_total other other PASS": 4, "responses_total 2xx other": 4}


def test_uploads_are_blobs() -> None:
    metrics = Metrics.make(1)
    for kind in ("uploads", "upload", "blob"):
        metrics.for_process(0).count_request("hosted", kind, "-", 201, 0, None)
    assert nonzero(scrape(metrics))["requests_total blob hosted -"] == 3


REQUESTS = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.tuples(
            st.sampled_from(["quay.io", "hosted", "other"]),
            st.sampled_from(KINDS),
            st.sampled_from(CACHE_STATUSES),
            st.integers(0, 999),
            st.integers(0, 1 << 40),
            st.none() | st.floats(0, 100) | st.sampled_from(BUCKETS),
        ),
    ),
    max_size=30,
)


@given(REQUESTS)
def test_totals_are_summed_over_all_processes(
    requests: list[tuple[int, tuple[str, str, str, int, int, float | None]]],
) -> None:
    metrics = Metrics.make(3, ["quay.io"])
    for process, request in requests:
        metrics.for_process(process).count_request(*request)
    samples = scrape(metrics)
    assert sum(value for (name, _), value in samples.items() if name.endswith("requests_total")) == len(requests)
    assert sum(value for (name, _), value in samples.items() if name.endswith("responses_total")) == len(requests)
    for registry, kind in {(request[0], request[1]) for _, request in requests}:
        labels = {("registry", registry), ("kind", kind)}
        latencies = [
            request[5] for _, request in requests if request[:2] == (registry, kind) and request[5] is not None
        ]
        if not latencies:
            continue
        for bound in BUCKETS:
            key = "dockerproxy_request_seconds_bucket", frozenset({*labels, ("le", str(bound))})
            assert samples[key] == sum(latency <= bound for latency in latencies)
        total = samples["dockerproxy_request_seconds_sum", frozenset(labels)]
        assert total == pytest.approx(sum(latencies), abs=1e-6 * len(latencies) + 1e-9)
        assert samples["dockerproxy_request_seconds_count", frozenset(labels)] == len(latencies)


def test_a_forked_process_counts_in_shared_memory() -> None:
    metrics = Metrics.make(2)
    metrics.for_process(0).count_request("hosted", "blob", "-", 200, 1, None)
    pid = os.fork()
    if not pid:
        metrics.for_process(1).count_request("hosted", "blob", "-", 200, 2, None)
        os._exit(0)
    os.waitpid(pid, 0)
    assert nonzero(scrape(metrics)) == {
        "requests_total blob hosted -": 2,
        "responses_total 2xx hosted": 2,
        "sent_bytes_total hosted -": 3,
    }


def test_a_registry_that_a_reload_adds_is_counted_by_all_processes() -> None:
    main = Metrics.make(2, ["quay.io"])
    worker = main.for_process(1)
    main.add_registries(["quay.io", "ghcr.io"])
    worker.read_registries()
    replacement = main.for_process(1)  # of a worker that died
    for process in (worker, replacement, main):
        process.count_request("ghcr.io", "manifest", "HIT", 200, 0, None)
    assert nonzero(scrape(main)) == {"requests_total manifest ghcr.io HIT": 3, "responses_total 2xx ghcr.io": 3}


def test_too_many_registries_count_as_other() -> None:
    main = Metrics.make(1)
    main.add_registries(f"r{number}.example" for number in range(1000))
    main.add_registries(["x" * 300])
    worker = main.for_process(0)
    worker.count_request("r0.example", "blob", "HIT", 200, 0, None)
    worker.count_request("r999.example", "blob", "HIT", 200, 0, None)
    assert nonzero(scrape(main)) == {
        "requests_total blob r0.example HIT": 1,
        "requests_total blob other HIT": 1,
        "responses_total 2xx r0.example": 1,
        "responses_total 2xx other": 1,
    }


@pytest.mark.parametrize("accept", ["", OPENMETRICS])
def test_measured_gauges(accept: str) -> None:
    disk = os.statvfs("/")
    values = {"cache_bytes": 12.0, "cache_limit_bytes": float(2**63), "certificate_expiry_timestamp_seconds": 2.1e9}
    samples = scrape(Metrics.make(1), accept, measured_gauges("1.2", values, {"cached": disk}))
    for name, value in values.items():
        assert samples[f"dockerproxy_{name}", frozenset()] == value
    free = samples["dockerproxy_store_free_bytes", frozenset({("store", "cached")})]
    assert free == disk.f_bavail * disk.f_frsize
    assert ("dockerproxy_store_free_bytes", frozenset({("store", "hosted")})) not in samples
    (build,) = [labels for name, labels in samples if name == "dockerproxy_build_info"]
    assert ("version", "1.2") in build


def test_refusals_are_counted_by_setting() -> None:
    metrics = Metrics.make(2)
    for sentence in (
        "ALLOW_CLIENTS has no entry for your address, 192.0.2.1.",
        "TUNNEL_DENY (loopback) forbids connections to localhost:443.",
        "alice has 8 of the 8 unfinished uploads that one client may have (MAX_UPLOADS_PER_CLIENT)",
        "no such page; / lists the pages",
        "XALLOW_CLIENTS, ALLOW_CLIENTSX",
    ):
        metrics.for_process(1).count_refusal(sentence)
    assert nonzero(scrape(metrics)) == {
        "refusals_total ALLOW_CLIENTS": 1, "refusals_total TUNNEL_DENY": 1, "refusals_total MAX_UPLOADS_PER_CLIENT": 1,
    }  # fmt: skip
    assert set(REFUSING_SETTINGS) <= {"REGISTRIES", *(name.upper() for name in fields_dict(Settings))}


def test_evictions_are_counted_by_reason() -> None:
    metrics = Metrics.make(2)
    metrics.count_evictions("room", 3)
    metrics.count_evictions("inactive", 0)
    metrics.for_process(1).count_evictions("inactive", 1)
    assert nonzero(scrape(metrics)) == {"cache_evictions_total room": 3, "cache_evictions_total inactive": 1}


def test_a_gauge_is_the_sum_of_all_processes() -> None:
    """A worker that replaces a dead one has none of its tunnels."""
    metrics = Metrics.make(3)
    for process in range(3):
        metrics.for_process(process).set(TUNNELS, 10 + process)
    assert nonzero(scrape(metrics)) == {"tunnels ": 33}
    metrics.for_process(1)
    assert nonzero(scrape(metrics)) == {"tunnels ": 22}


def test_what_registries_do() -> None:
    metrics = Metrics.make(2, ["quay.io"])
    worker = metrics.for_process(1)
    worker.count_upstream("quay.io", "manifest", "HEAD", 200, 0.2)
    worker.count_upstream("quay.io", "upload", "PATCH", 202, 0.2)
    worker.count_received("quay.io", 1000)
    assert nonzero(scrape(metrics)) == {
        "upstream_requests_total 2xx manifest HEAD quay.io": 1,
        "upstream_requests_total 2xx blob other quay.io": 1,
        "upstream_received_bytes_total quay.io": 1000,
        "upstream_seconds_count quay.io": 2,
        "upstream_seconds_sum quay.io": 0.4,
        "upstream_up quay.io": 1,
    }
    metrics.count_failure("quay.io", "dns")
    metrics.count_failure("quay.io", "anything else")
    samples = nonzero(scrape(metrics))
    assert samples["upstream_failures_total dns quay.io"] == samples["upstream_failures_total other quay.io"] == 1
    assert "upstream_up quay.io" not in samples
    up = "dockerproxy_upstream_up", frozenset({("registry", "quay.io")})
    assert scrape(metrics)[up] == 0
    worker.count_upstream("quay.io", "blob", "GET", 503, 0.1)  # it responds
    assert scrape(metrics)[up] == 1
    assert ("dockerproxy_upstream_up", frozenset({("registry", "hosted")})) not in scrape(metrics)


@pytest.mark.parametrize("accept", ["", OPENMETRICS])
def test_rate_limits(accept: str) -> None:
    hub = {"limit": 100, "remaining": 34, "window": 21600, "refused_until": 0.0, "source": "192.0.2.7"}
    login = {**hub, "limit": 200}
    quay = {"limit": None, "remaining": None, "window": None, "refused_until": 1.8e9, "source": None}
    gauges: Any = rate_limit_gauges(
        {("docker.io", ANONYMOUS): hub, ("docker.io", CONFIGURED): login, ("quay.io", ANONYMOUS): quay}  # type: ignore[dict-item]
    )
    samples = nonzero(scrape(Metrics.make(1), accept, gauges))
    assert samples == {
        "ratelimit_limit anonymous docker.io": 100,
        "ratelimit_limit configured docker.io": 200,
        "ratelimit_remaining anonymous docker.io": 34,
        "ratelimit_remaining configured docker.io": 34,
        "ratelimit_window_seconds anonymous docker.io": 21600,
        "ratelimit_window_seconds configured docker.io": 21600,
        "ratelimit_refused_until_timestamp_seconds anonymous quay.io": 1.8e9,
    }


@pytest.mark.parametrize("accept", ["", OPENMETRICS])
def test_the_ends_of_operations(accept: str) -> None:
    gauge = operation_gauge({"gc": 1.7e9, "check of the cache": 1.8e9})
    assert nonzero(scrape(Metrics.make(1), accept, [gauge])) == {
        "operation_end_timestamp_seconds gc": 1.7e9,
        "operation_end_timestamp_seconds check_of_the_cache": 1.8e9,
    }
