"""The metrics: their text format, and the sums over processes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.daemon.metrics import CACHE_STATUSES, Metrics

# The text format of prometheus.io/docs/instrumenting/exposition_formats, without escapes.
COMMENT = re.compile(r"# (HELP ([a-z_]+) \S.*|TYPE ([a-z_]+) (counter|gauge))")
SAMPLE = re.compile(r"([a-z_]+)(\{[a-z]+=\"[^\"\\\n]*\"(?:,[a-z]+=\"[^\"\\\n]*\")*\})? ([0-9.e+-]+)")


def parse(exposition: bytes) -> dict[str, float]:
    """Return the samples by name and labels as written, and assert that every line is valid."""
    text, samples, types = exposition.decode(), {}, {}
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("#"):
            match = COMMENT.fullmatch(line)
            assert match, line
            if match[3]:
                assert match[3] not in types  # a TYPE line occurs once, before its samples
                types[match[3]] = match[4]
            continue
        match = SAMPLE.fullmatch(line)
        assert match, line
        assert types[match[1]] == ("counter" if match[1].endswith("_total") else "gauge")
        name = match[1] + (match[2] or "")
        assert name not in samples
        samples[name] = float(match[3])
    return samples


def nonzero_samples(metrics: Metrics) -> dict[str, float]:
    """Return the samples with a value other than 0."""
    return {name: value for name, value in parse(metrics.render()).items() if value}


def test_all_samples_start_at_zero() -> None:
    samples = parse(Metrics.make(2).render())
    assert set(samples.values()) == {0}
    assert {name for name in samples if "requests" in name and "HIT" in name} == {
        f'dockerproxy_requests_total{{verdict="HIT",code="{code}"}}'
        for code in ("other", "1xx", "2xx", "3xx", "4xx", "5xx")
    }
    assert len(samples) == 7 * (6 + 2)


def test_a_request_is_counted() -> None:
    metrics = Metrics.make(1)
    metrics.for_process(0).count("MISS", 206, 1000, 1.25)
    assert nonzero_samples(metrics) == {
        'dockerproxy_requests_total{verdict="MISS",code="2xx"}': 1,
        'dockerproxy_sent_bytes_total{verdict="MISS"}': 1000,
        'dockerproxy_request_seconds_total{verdict="MISS"}': 1.25,
    }


@pytest.mark.parametrize(("status", "code"), [(0, "other"), (100, "1xx"), (304, "3xx"), (599, "5xx"), (999, "other")])
def test_codes_are_counted_by_class(status: int, code: str) -> None:
    """An upstream may send any three digits, and the status is 0 if the client left before the response."""
    metrics = Metrics.make(1)
    metrics.for_process(0).count("-", status, 0, 0.0)
    assert nonzero_samples(metrics) == {f'dockerproxy_requests_total{{verdict="-",code="{code}"}}': 1}


REQUESTS = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.sampled_from(CACHE_STATUSES),
        st.integers(0, 999),
        st.integers(0, 1 << 40),
        st.floats(0, 1e5),
    )
)


@given(REQUESTS)
def test_totals_are_summed_over_all_processes(requests: list[tuple[int, str, int, int, float]]) -> None:
    metrics = Metrics.make(3)
    for process, *request in requests:
        metrics.for_process(process).count(*request)  # type: ignore[arg-type]
    samples = parse(metrics.render())
    assert sum(value for name, value in samples.items() if "requests" in name) == len(requests)
    for cache_status in CACHE_STATUSES:
        matching = [request for request in requests if request[1] == cache_status]
        assert samples[f'dockerproxy_sent_bytes_total{{verdict="{cache_status}"}}'] == sum(
            request[3] for request in matching
        )
        seconds = samples[f'dockerproxy_request_seconds_total{{verdict="{cache_status}"}}']
        assert seconds == pytest.approx(sum(request[4] for request in matching), abs=1e-5 * (len(matching) + 1))


def test_a_forked_process_counts_in_shared_memory() -> None:
    metrics = Metrics.make(2)
    metrics.for_process(0).count("HIT", 200, 1, 0.0)
    pid = os.fork()
    if not pid:
        metrics.for_process(1).count("HIT", 200, 2, 0.0)
        os._exit(0)
    os.waitpid(pid, 0)
    assert nonzero_samples(metrics) == {
        'dockerproxy_requests_total{verdict="HIT",code="2xx"}': 2,
        'dockerproxy_sent_bytes_total{verdict="HIT"}': 3,
    }


def test_gauges_are_rendered() -> None:
    def gauges() -> Iterator[tuple[str, str, float]]:
        yield "cache_bytes", "Bytes in the cache.", 12
        yield "cache_limit_bytes", "Limit of the cache in bytes.", 2**63

    samples = parse(Metrics.make(1).render(gauges()))
    assert (samples["dockerproxy_cache_bytes"], samples["dockerproxy_cache_limit_bytes"]) == (12, 2**63)
