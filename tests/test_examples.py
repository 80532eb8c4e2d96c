"""The examples for Prometheus and Grafana: they parse, their alerts fire, and they use metrics that exist."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from dockerproxy.daemon.exposition import damaged_gauge, measured_gauges, operation_gauge, rate_limit_gauges, render
from dockerproxy.daemon.metrics import Metrics
from dockerproxy.daemon.processes import ProcessUsage

EXAMPLES = Path(__file__).parent.parent / "examples"

# Variables of Grafana, with values that Prometheus's parser accepts.
OPENMETRICS = "application/openmetrics-text;version=1.0.0"

DISK = os.statvfs("/")
VARIABLES = {"$instance": ".*", "$__rate_interval": "5m"}

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool of the Debian package prometheus is not installed"
)


def exposition(accept: str = "") -> bytes:
    """Return an exposition with every metric, in the format that `accept` names."""
    metrics = Metrics.make(1, ["quay.io"])
    metrics.count_request("quay.io", "blob", "HIT", 200, 1, 0.1)
    metrics.count_upstream("quay.io", "blob", "GET", 200, 0.1)
    values = {
        "cache_evicted_idle_seconds": 1.0,
        "cache_bytes": 1.0,
        "cache_limit_bytes": 1.0,
        "certificate_expiry_timestamp_seconds": 1.0,
    }
    limit: dict[str, float | None] = {"limit": 1, "remaining": 1, "window": 1, "refused_until": 1}
    gauges = (
        *measured_gauges("1", values, {"cached": DISK, "hosted": DISK}),
        *rate_limit_gauges({("quay.io", "anonymous"): limit}),
        damaged_gauge({"hosted": 0}),
        operation_gauge({"gc": 1.0, "check of the cache": 2.0}),
    )
    return render(metrics, gauges, accept, ProcessUsage(1, 1, 1, 1), 1.0)[1]


def expressions() -> Iterator[str]:
    """Yield the expressions of the dashboard, without its variables."""
    dashboard: dict[str, Any] = json.loads((EXAMPLES / "grafana.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"]
            for name, value in VARIABLES.items():
                expression = expression.replace(name, value)
            yield expression


def test_the_examples_use_metrics_that_exist() -> None:
    names = set(re.findall(r"^(dockerproxy_\w+)", exposition().decode(), re.MULTILINE))
    text = (EXAMPLES / "dockerproxy.rules.yml").read_text() + " ".join(expressions())
    used = set(re.findall(r"\bdockerproxy_\w+", text))
    assert len(used) > 15
    assert used <= names


def test_every_panel_has_a_place_and_a_title() -> None:
    panels = json.loads((EXAMPLES / "grafana.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert panel["title"] and not cells & taken and max(x for x, _ in cells) < 24
        taken |= cells


@needs_promtool
@pytest.mark.parametrize(
    "command",
    [
        ["check", "config", "prometheus.yml"],
        ["check", "rules", "dockerproxy.rules.yml"],
        ["test", "rules", "dockerproxy.rules_test.yml"],
    ],
    ids=" ".join,
)
def test_promtool_accepts_the_examples(command: list[str]) -> None:
    result = subprocess.run(["promtool", *command], cwd=EXAMPLES, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr


def test_both_formats_have_the_same_metrics() -> None:
    """OpenMetrics by the strict parser of its reference implementation; promtool reads the other format only."""
    text = {(family.name, family.type): family for family in parse_text(exposition().decode())}
    strict = {(family.name, family.type): family for family in parse_openmetrics(exposition(OPENMETRICS).decode())}
    assert text.keys() == strict.keys()
    assert len(strict) > 30
    for key, family in strict.items():
        assert family.documentation == text[key].documentation
        assert {sample[:3] for sample in map(_sample, family.samples)} == {
            sample[:3] for sample in map(_sample, text[key].samples)
        }


def _sample(sample: Any) -> tuple[str, frozenset[tuple[str, str]], float]:
    # The bounds of buckets are written 1 and 1.0.
    labels = {name: str(float(value)) if name == "le" else value for name, value in sample.labels.items()}
    return sample.name, frozenset(labels.items()), sample.value


@needs_promtool
def test_promtool_accepts_the_metrics() -> None:
    result = subprocess.run(["promtool", "check", "metrics"], input=exposition(), capture_output=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")


@needs_promtool
def test_the_expressions_of_the_dashboard_are_valid(tmp_path: Path) -> None:
    rules = [{"record": f"panel:{number}", "expr": expr} for number, expr in enumerate(expressions())]
    file = tmp_path / "rules.yml"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))  # JSON is YAML
    result = subprocess.run(["promtool", "check", "rules", str(file)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
