"""The metrics in the formats of Prometheus, by `prometheus_client`. Import this in a thread, when it is first needed.

Only the library's exposition is used: its counters would cost a hit microseconds, and its mode for several processes
keeps files for each of them. The names are the families of `dockerproxy.daemon.metrics` behind ``dockerproxy_``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate

from attrs import frozen
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

import twisted
from dockerproxy.daemon.metrics import BUCKETS, GLOBAL_FAMILIES, REGISTRY_FAMILIES, Family, Metrics, Sample
from dockerproxy.daemon.processes import ProcessUsage

_MEASURED = {
    "cache_bytes": "Bytes of the cache, with 8 KiB more for each blob, and 4 KiB for each link and record.",
    "cache_limit_bytes": "Maximum bytes of the cache (CACHE_MAX_SIZE).",
    "cache_evicted_idle_seconds": "Seconds for which the last blob that was evicted to make room had not been used.",
    "certificate_expiry_timestamp_seconds": "The end of the CA's certificate, in POSIX time.",
}

_RATE_LIMITS = (
    ("limit", "ratelimit_limit", "Pulls that a registry allows in its window, as it last said."),
    ("remaining", "ratelimit_remaining", "Pulls that are left, as the registry last said."),
    ("window", "ratelimit_window_seconds", "The window of the limit."),
    (
        "refused_until",
        "ratelimit_refused_until_timestamp_seconds",
        "The time until which a registry refuses pulls, in POSIX time; 0 if it does not.",
    ),
)

ANONYMOUS, CONFIGURED = "anonymous", "configured"
"""The logins of rate limits: none, and one of the settings. Its name is for administrators: `dockerproxy budget`."""

_BOUNDS = (*map(str, BUCKETS), "+Inf")


@frozen
class Gauge:
    """A gauge that was measured for this exposition, with the values of its `labels`."""

    name: str
    help_text: str
    values: Mapping[tuple[str, ...], float]
    labels: tuple[str, ...] = ()


def measured_gauges(
    version: str, values: Mapping[str, float], disks: Mapping[str, os.statvfs_result]
) -> Iterator[Gauge]:
    """Yield the gauges that were measured for this exposition: `values` by name, and the `disks` of stores.

    `version` is that of the daemon.
    """
    versions = version, ".".join(map(str, sys.version_info[:3])), twisted.__version__
    yield Gauge("build_info", "The version of the daemon; always 1.", {versions: 1}, ("version", "python", "twisted"))
    for name, value in values.items():
        yield Gauge(name, _MEASURED[name], {(): value})
    free: dict[tuple[str, ...], float] = {}
    inodes: dict[tuple[str, ...], float] = {}
    for store, disk in disks.items():
        free[store,], inodes[store,] = disk.f_bavail * disk.f_frsize, disk.f_favail
    yield Gauge("store_free_bytes", "Free bytes on the disk of a store.", free, ("store",))
    yield Gauge("store_free_inodes", "Free inodes of the file system of a store.", inodes, ("store",))


def rate_limit_gauges(limits: Mapping[tuple[str, str], Mapping[str, float | None]]) -> Iterator[Gauge]:
    """Yield the gauges of the rate limits of registries for clients without a login of their own.

    `limits` have ``limit``, ``remaining``, ``window`` (seconds) and ``refused_until`` (POSIX time) by registry and
    login, which is `ANONYMOUS` or `CONFIGURED`; what a registry has not said is None.
    """
    for key, name, help_text in _RATE_LIMITS:
        values: dict[tuple[str, ...], float] = {}
        for registry_and_login, limit in limits.items():
            value = limit[key]
            if value is not None:
                values[registry_and_login] = value
        yield Gauge(name, help_text, values, ("registry", "login"))


def operation_gauge(ends: Mapping[str, float]) -> Gauge:
    """Return the gauge of the POSIX times at which operations last ended without a problem, by their names."""
    values: dict[tuple[str, ...], float] = {(name.replace(" ", "_"),): at for name, at in ends.items()}
    help_text = "The time at which an operation last ended without a problem, in POSIX time."
    return Gauge("operation_end_timestamp_seconds", help_text, values, ("operation",))


def damaged_gauge(damaged: Mapping[str, int]) -> Gauge:
    """Return the gauge of contents that `check` found damaged, by store."""
    values: dict[tuple[str, ...], float] = {(store,): number for store, number in damaged.items()}
    return Gauge("damaged_contents", "Contents that were found damaged, and not replaced yet.", values, ("store",))


@frozen(eq=False)
class _Collector(Collector):
    metrics: Metrics
    gauges: Sequence[Gauge]
    usage: ProcessUsage | None
    started_at: float

    def collect(self) -> Iterator[Metric]:
        for family in (*REGISTRY_FAMILIES, *GLOBAL_FAMILIES):
            yield _histogram(self.metrics, family) if family.is_histogram else _simple(self.metrics, family)
        for gauge in self.gauges:
            metric = GaugeMetricFamily(f"dockerproxy_{gauge.name}", gauge.help_text, labels=gauge.labels)
            for values, number in gauge.values.items():
                metric.add_metric(values, number)
            yield metric
        if self.usage is not None:
            yield from self._process_metrics(self.usage)

    def _process_metrics(self, usage: ProcessUsage) -> Iterator[Metric]:
        """Yield the standard metrics of a process, as sums over all processes that serve."""
        cpu = CounterMetricFamily("process_cpu_seconds", "Processor time of all processes in seconds.")
        cpu.add_metric((), self.metrics.cpu_seconds)
        yield cpu
        for name, help_text, value in (
            (
                "process_resident_memory_bytes",
                "Resident memory of all processes; shared memory once.",
                usage.resident,
            ),
            ("process_virtual_memory_bytes", "Virtual memory of all processes.", usage.virtual),
            ("process_open_fds", "Open file descriptors of all processes.", usage.open_files),
            ("process_max_fds", "Maximum of open file descriptors of all processes.", usage.max_files),
            ("process_start_time_seconds", "The start of the main process, in POSIX time.", self.started_at),
        ):
            gauge = GaugeMetricFamily(name, help_text)
            gauge.add_metric((), value)
            yield gauge


def render(
    metrics: Metrics,
    gauges: Iterable[Gauge],
    accept: str,
    usage: ProcessUsage | None = None,
    started_at: float = 0.0,
) -> tuple[str, bytes]:
    """Return the media type and the exposition: OpenMetrics if `accept` prefers it, otherwise Prometheus's text format.

    `usage`, if given, is that of all processes, the first of which started at the POSIX time `started_at`.
    See prometheus.io/docs/instrumenting/exposition_formats. It takes milliseconds, so call it in a thread.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(metrics, tuple(gauges), usage, started_at))
    encode, content_type = choose_encoder(accept)
    return content_type, encode(registry)


def _simple(metrics: Metrics, family: Family) -> Metric:
    metric_class = GaugeMetricFamily if family.is_gauge else CounterMetricFamily
    metric = metric_class(f"dockerproxy_{family.name}", family.help_text, labels=_label_names(family))
    # Combinations that never occur would be most of the lines. A counter with at most one label beside the registry has
    # all its values from the start, because `increase()` does not see the step from nothing to 1.
    for sample in metrics.samples(family):
        if sample.value or len(family.labels) < 2:
            metric.add_metric(_label_values(sample), sample.value)
    return metric


def _histogram(metrics: Metrics, family: Family) -> Metric:
    metric = HistogramMetricFamily(f"dockerproxy_{family.name}", family.help_text, labels=_label_names(family))
    for sample in metrics.samples(family):
        if any(sample.buckets):
            buckets = list(zip(_BOUNDS, accumulate(sample.buckets), strict=True))
            metric.add_metric(_label_values(sample), buckets, sample.value)
    return metric


def _label_names(family: Family) -> tuple[str, ...]:
    names = tuple(name for name, _ in family.labels)
    return ("registry", *names) if family in REGISTRY_FAMILIES else names


def _label_values(sample: Sample) -> tuple[str, ...]:
    return (sample.registry, *sample.labels) if sample.registry else sample.labels
