"""What the daemon has done, as Prometheus reads it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.daemon.metrics import VERDICTS, Metrics

# The text format as prometheus.io/docs/instrumenting/exposition_formats has it, for what has no escapes.
COMMENT = re.compile(r"# (HELP ([a-z_]+) \S.*|TYPE ([a-z_]+) (counter|gauge))")
SAMPLE = re.compile(r"([a-z_]+)(\{[a-z]+=\"[^\"\\\n]*\"(?:,[a-z]+=\"[^\"\\\n]*\")*\})? ([0-9.e+-]+)")


def read(told: bytes) -> dict[str, float]:
    """Return the samples, by name and labels as they are written; every line has to be as the format wants it."""
    text, samples, typed = told.decode(), {}, {}
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("#"):
            found = COMMENT.fullmatch(line)
            assert found, line
            if found[3]:
                assert found[3] not in typed  # once, before its samples
                typed[found[3]] = found[4]
            continue
        found = SAMPLE.fullmatch(line)
        assert found, line
        assert typed[found[1]] == ("counter" if found[1].endswith("_total") else "gauge")
        name = found[1] + (found[2] or "")
        assert name not in samples
        samples[name] = float(found[3])
    return samples


def told(metrics: Metrics) -> dict[str, float]:
    """Return the samples that are not 0."""
    return {name: value for name, value in read(metrics.tell()).items() if value}


def test_all_there_is_to_tell_is_told_before_anything_was_counted() -> None:
    samples = read(Metrics.make(2).tell())
    assert set(samples.values()) == {0}
    assert {name for name in samples if "requests" in name and "HIT" in name} == {
        f'dockerproxy_requests_total{{verdict="HIT",code="{code}"}}'
        for code in ("other", "1xx", "2xx", "3xx", "4xx", "5xx")
    }
    assert len(samples) == 7 * (6 + 2)


def test_a_request() -> None:
    metrics = Metrics.make(1)
    metrics.of(0).count("MISS", 206, 1000, 1.25)
    assert told(metrics) == {
        'dockerproxy_requests_total{verdict="MISS",code="2xx"}': 1,
        'dockerproxy_sent_bytes_total{verdict="MISS"}': 1000,
        'dockerproxy_request_seconds_total{verdict="MISS"}': 1.25,
    }


@pytest.mark.parametrize(("status", "code"), [(0, "other"), (100, "1xx"), (304, "3xx"), (599, "5xx"), (999, "other")])
def test_codes(status: int, code: str) -> None:
    """An upstream's may be any three digits, and one who leaves may have none."""
    metrics = Metrics.make(1)
    metrics.of(0).count("-", status, 0, 0.0)
    assert told(metrics) == {f'dockerproxy_requests_total{{verdict="-",code="{code}"}}': 1}


REQUESTS = st.lists(
    st.tuples(
        st.integers(0, 2), st.sampled_from(VERDICTS), st.integers(0, 999), st.integers(0, 1 << 40), st.floats(0, 1e5)
    )
)


@given(REQUESTS)
def test_the_sums_of_all_processes(requests: list[tuple[int, str, int, int, float]]) -> None:
    metrics = Metrics.make(3)
    for process, *request in requests:
        metrics.of(process).count(*request)  # type: ignore[arg-type]
    samples = read(metrics.tell())
    assert sum(value for name, value in samples.items() if "requests" in name) == len(requests)
    for verdict in VERDICTS:
        own = [request for request in requests if request[1] == verdict]
        assert samples[f'dockerproxy_sent_bytes_total{{verdict="{verdict}"}}'] == sum(request[3] for request in own)
        seconds = samples[f'dockerproxy_request_seconds_total{{verdict="{verdict}"}}']
        assert seconds == pytest.approx(sum(request[4] for request in own), abs=1e-5 * (len(own) + 1))


def test_a_copy_of_the_process_counts_for_all() -> None:
    metrics = Metrics.make(2)
    metrics.of(0).count("HIT", 200, 1, 0.0)
    pid = os.fork()
    if not pid:
        metrics.of(1).count("HIT", 200, 2, 0.0)
        os._exit(0)
    os.waitpid(pid, 0)
    assert told(metrics) == {
        'dockerproxy_requests_total{verdict="HIT",code="2xx"}': 2,
        'dockerproxy_sent_bytes_total{verdict="HIT"}': 3,
    }


def test_gauges() -> None:
    def gauges() -> Iterator[tuple[str, str, float]]:
        yield "cache_bytes", "Bytes in the cache.", 12
        yield "cache_limit_bytes", "Bytes that it may have.", 2**63

    samples = read(Metrics.make(1).tell(gauges()))
    assert (samples["dockerproxy_cache_bytes"], samples["dockerproxy_cache_limit_bytes"]) == (12, 2**63)
