"""The metrics in the formats of Prometheus, by `prometheus_client`. Import this in a thread, when it is first needed.

Only the library's exposition is used: its counters would cost a hit microseconds, and its mode for several processes
keeps files for each of them. The names are the families of `dockerproxy.daemon.metrics` behind ``dockerproxy_``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate

from attrs import frozen
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from dockerproxy.daemon.metrics import BUCKETS, FAMILIES, Family, Metrics

_BOUNDS = (*map(str, BUCKETS), "+Inf")


@frozen(eq=False)
class _Collector(Collector):
    metrics: Metrics
    gauges: Mapping[str, tuple[str, float]]

    def collect(self) -> Iterator[Metric]:
        for family in FAMILIES:
            yield _histogram(self.metrics, family) if family.is_histogram else _counter(self.metrics, family)
        for name, (help_text, value) in self.gauges.items():
            yield GaugeMetricFamily(f"dockerproxy_{name}", help_text, value)


def render(metrics: Metrics, gauges: Mapping[str, tuple[str, float]], accept: str) -> tuple[str, bytes]:
    """Return the media type and the exposition: OpenMetrics if `accept` prefers it, otherwise Prometheus's text format.

    `gauges` have their help text and value by name. See prometheus.io/docs/instrumenting/exposition_formats. It takes
    milliseconds, so call it in a thread.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(metrics, gauges))
    encode, content_type = choose_encoder(accept)
    return content_type, encode(registry)


def _counter(metrics: Metrics, family: Family) -> Metric:
    metric = CounterMetricFamily(f"dockerproxy_{family.name}", family.help_text, labels=_label_names(family))
    # Combinations that never occur would be most of the lines. A counter with one label more than the registry's has
    # all its values from the start, because `increase()` does not see the step from nothing to 1.
    for sample in metrics.samples(family):
        if sample.value or len(family.labels) < 2:
            metric.add_metric((sample.registry, *sample.labels), sample.value)
    return metric


def _histogram(metrics: Metrics, family: Family) -> Metric:
    metric = HistogramMetricFamily(f"dockerproxy_{family.name}", family.help_text, labels=_label_names(family))
    for sample in metrics.samples(family):
        if any(sample.buckets):
            buckets = list(zip(_BOUNDS, accumulate(sample.buckets), strict=True))
            metric.add_metric((sample.registry, *sample.labels), buckets, sample.value)
    return metric


def _label_names(family: Family) -> tuple[str, ...]:
    return ("registry", *(name for name, _ in family.labels))
