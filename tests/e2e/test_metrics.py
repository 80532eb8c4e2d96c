"""The metrics equal what clients did and what upstream served, and name no host that is not configured."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from bench.servers import free_port
from tests.e2e.harness import images
from tests.e2e.harness.daemon import StartDaemon, TwistdDaemon
from tests.e2e.harness.fake_registry import pause_after
from tests.e2e.harness.http_client import basic_authorization, request_directly
from tests.e2e.harness.http_server import HTTPExchange
from tests.e2e.harness.images import ACCEPT_MANIFESTS, TypedContent
from tests.e2e.harness.multi_process import MultiProcessDaemon
from tests.e2e.harness.process import wait_until
from tests.e2e.harness.registry_daemon import USERS, write_htpasswd
from tests.e2e.harness.upstreams import FAKE, HUB, Upstreams

MIB = 1 << 20


def scrape(daemon: TwistdDaemon) -> dict[str, float]:
    """Return the samples by name and labels as written, without the prefix of the names."""
    response = request_directly("GET", daemon.url + "/metrics")
    assert response.status == 200
    lines = [line for line in response.body.decode().splitlines() if not line.startswith("#")]
    samples = (line.removeprefix("dockerproxy_").rpartition(" ") for line in lines)
    return {name: float(value) for name, _, value in samples}


@pytest.mark.parametrize("workers", ["1", "2"])
def test_requests_are_counted_by_registry_and_kind(
    upstreams: Upstreams, start_daemon: StartDaemon, workers: str
) -> None:
    daemon = start_daemon(WORKERS=workers)
    image = images.build_small_image("metrics")
    repository = f"metrics/app-{workers}"
    upstreams.fake.put(repository, "1", image)
    layer = image.layers[0]
    for _ in range(3):
        manifest = daemon.client.get(f"{FAKE}/v2/{repository}/manifests/1", Accept=ACCEPT_MANIFESTS)
        assert manifest.status == 200
        assert daemon.client.get(f"{FAKE}/v2/{repository}/blobs/{layer.digest}").body == layer.data
    assert daemon.client.get(f"{FAKE}/v2/{repository}/manifests/none", Accept=ACCEPT_MANIFESTS).status == 404
    samples = scrape(daemon)
    labels = 'registry="fake.test"'
    assert samples[f'requests_total{{kind="manifest",{labels},verdict="REVALIDATED"}}'] == 2
    assert samples[f'requests_total{{kind="blob",{labels},verdict="MISS"}}'] == 1
    assert samples[f'requests_total{{kind="blob",{labels},verdict="HIT"}}'] == 2
    assert samples[f'responses_total{{code="2xx",{labels}}}'] == 6
    assert samples[f'responses_total{{code="4xx",{labels}}}'] == 1
    assert samples[f'sent_bytes_total{{{labels},verdict="HIT"}}'] == 2 * len(layer.data)
    assert samples[f'request_seconds_count{{kind="blob",{labels}}}'] == 3
    for method in ("GET", "HEAD"):
        counted = [
            value
            for name, value in samples.items()
            if name.startswith("upstream_requests_total") and 'kind="manifest"' in name and f'"{method}"' in name
        ]
        assert sum(counted) == len(upstreams.fake.find_requests(method, f"/v2/{repository}/manifests/"))
    # The missing manifest has a body, too.
    received = samples[f"upstream_received_bytes_total{{{labels}}}"]
    assert len(layer.data) + len(manifest.body) <= received < len(layer.data) + len(manifest.body) + 500
    assert samples[f"upstream_up{{{labels}}}"] == 1


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("closed.test", "refused"),
        ("no-such-name.invalid", "dns"),
        ("selfsigned.test", "tls"),
        ("wrongname.test", "tls"),
    ],
)
def test_failures_are_counted_by_reason(daemon: TwistdDaemon, host: str, reason: str) -> None:
    assert daemon.client.get(f"https://{host}/v2/a/b/manifests/1").status == 502
    samples = scrape(daemon)
    assert samples[f'upstream_failures_total{{reason="{reason}",registry="{host}"}}'] >= 1
    assert samples[f'upstream_up{{registry="{host}"}}'] == 0


def test_no_host_that_a_client_names_becomes_a_label(daemon: TwistdDaemon) -> None:
    for host in ("evil.invalid", "registry-1.docker.io.evil.invalid"):
        assert daemon.client.get(f"http://{host}/v2/a/b/manifests/1").status == 502
        assert request_directly("GET", f"{daemon.url}/v2/a/b/manifests/1?ns={host}").status == 404
    assert not [name for name in scrape(daemon) if "evil" in name]


def test_refusals_tunnels_and_downloads(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    daemon, gate = start_daemon(), threading.Event()
    with pytest.raises(OSError, match="403"):
        daemon.client.get("https://elsewhere.example:5000/")
    assert scrape(daemon)['refusals_total{setting="TUNNEL_PORTS"}'] == 1
    digest = upstreams.fake.put_blob("metrics/slow", images.random_bytes(4 * MIB, "slow"))
    upstreams.fake.add_rule("GET", digest, pause_after(MIB, gate), times=1)
    pull = threading.Thread(target=daemon.client.get, args=(f"{FAKE}/v2/metrics/slow/blobs/{digest}",))
    pull.start()
    try:
        wait_until(lambda: scrape(daemon)["downloads"] == 1, "the download is counted")
    finally:
        gate.set()
        pull.join()
    wait_until(lambda: scrape(daemon)["downloads"] == 0, "no download is left")


def test_evictions_are_counted(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    daemon = start_daemon(CACHE_MAX_SIZE="5m")
    for number in range(3):
        digest = upstreams.fake.put_blob("metrics/evicted", images.random_bytes(3 * MIB, f"evicted {number}"))
        assert daemon.client.get(f"{FAKE}/v2/metrics/evicted/blobs/{digest}").status == 200
    wait_until(lambda: scrape(daemon)['cache_evictions_total{reason="room"}'] == 2, "two blobs are evicted")
    assert 0 <= scrape(daemon)["cache_evicted_idle_seconds"] < 3600


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_registrys_rate_limit(upstreams: Upstreams, start_daemon: StartDaemon, workers: str) -> None:
    """Many clients that try again cost one refused pull, also after a restart. Cached images go on."""
    daemon = start_daemon(WORKERS=workers)
    name = f"limited/app-{workers}"
    for tag in ("cached", "new"):
        upstreams.fake.put(name, tag, images.build_small_image(f"{name} {tag}"))
    url = f"{FAKE}/v2/{name}/manifests"
    assert daemon.client.get(f"{url}/cached", Accept=ACCEPT_MANIFESTS).status == 200
    upstreams.fake.add_rule("GET", f"/v2/{name}/manifests/", refuse_for_an_hour)
    for _ in range(10):
        response = daemon.client.get(f"{url}/new", Accept=ACCEPT_MANIFESTS)
        assert (response.status, int(response.headers["retry-after"]) > 3000) == (429, True)
        assert daemon.client.get(f"{url}/cached", Accept=ACCEPT_MANIFESTS).status == 200
    daemon.restart(kill=True)
    assert daemon.client.get(f"{url}/new", Accept=ACCEPT_MANIFESTS).status == 429
    assert len(upstreams.fake.find_requests("GET", f"/v2/{name}/manifests/new")) == 1
    samples = scrape(daemon)
    assert samples['ratelimit_limit{login="anonymous",registry="fake.test"}'] == 100
    assert samples['ratelimit_remaining{login="anonymous",registry="fake.test"}'] == 0
    refused_until = samples['ratelimit_refused_until_timestamp_seconds{login="anonymous",registry="fake.test"}']
    assert refused_until > time.time()


def refuse_for_an_hour(exchange: HTTPExchange, content: TypedContent | None) -> None:
    fields = {"Retry-After": "3600", "RateLimit-Limit": "100;w=21600", "RateLimit-Remaining": "0;w=21600"}
    exchange.respond(429, fields, b"")


def test_the_counters_equal_what_happened_even_if_a_process_is_killed(upstreams: Upstreams, tmp_path: Path) -> None:
    """500 mixed requests over four processes, one of which is killed in the middle."""
    image, name, fake = images.build_small_image("mixed"), "metrics/mixed", upstreams.fake
    unknown = images.sha256_digest(b"unknown")
    fake.put(name, "1", image)
    fake.add_rule("GET", f"/v2/{name}/manifests/limited", refuse_for_an_hour)
    settings = {**upstreams.settings, "WORKERS": "4", "HTPASSWD_FILE": str(write_htpasswd(tmp_path))}
    daemon = MultiProcessDaemon(tmp_path / "daemon", settings)
    daemon.start()
    try:
        before = scrape(daemon)
        asked_before = sum(f"/v2/{name}/" in request.path for request in list(fake.requests))
        counted: Counter[str] = Counter()
        paths, sent = ("manifests/1", f"blobs/{image.layers[0].digest}", "manifests/limited", f"blobs/{unknown}"), 0
        for number in range(500):
            if number == 250:
                os.kill(daemon.serving_pids[1], signal.SIGKILL)
                wait_until(lambda: scrape(daemon)["worker_replacements_total"] == 1, "the end of a process is counted")
            path = paths[number % 4]
            response = daemon.client.get(f"{FAKE}/v2/{name}/{path}", Accept=ACCEPT_MANIFESTS)
            counted[f"{response.status // 100}xx"] += 1
            sent += len(response.body)
        wait_until(lambda: scrape(daemon)["workers"] == 4, "the process is replaced")
        samples = scrape(daemon)

        def change(name: str) -> float:
            return samples[name] - before.get(name, 0)

        labels = 'registry="fake.test"'
        for code, number in counted.items():
            assert change(f'responses_total{{code="{code}",{labels}}}') == number
        assert counted["4xx"] == 250
        total = sum(change(sample) for sample in samples if sample.startswith("sent_bytes_total") and labels in sample)
        assert total == sent
        upstream = [sample for sample in samples if sample.startswith("upstream_requests_total") and labels in sample]
        asked = sum(f"/v2/{name}/" in request.path for request in list(fake.requests)) - asked_before
        assert sum(change(sample) for sample in upstream if '"token"' not in sample) == asked
        refused = [change(f'ratelimit_refused_total{{by="{by}",{labels}}}') for by in ("registry", "proxy")]
        assert refused == [1, 124]
        assert samples["process_cpu_seconds_total"] >= before["process_cpu_seconds_total"] > 0
        assert samples["process_resident_memory_bytes"] > 1 << 20
        assert samples["process_max_fds"] > samples["process_open_fds"] > 4 * 5
        assert samples["reload_success"] == 1 and samples['damaged_contents{store="hosted"}'] == 0
        login = {"Authorization": basic_authorization("alice", "wrong")}
        assert request_directly("GET", f"http://127.0.0.1:{daemon.http_port}/v2/", login).status == 401
        login = {"Authorization": basic_authorization("alice", USERS["alice"])}
        assert request_directly("GET", f"http://127.0.0.1:{daemon.http_port}/v2/", login).status == 200
        samples = scrape(daemon)
        assert [samples[f'logins_total{{result="{result}"}}'] for result in ("accepted", "refused")] == [1, 1]
    finally:
        daemon.stop()
    daemon.check_log(upstreams.secrets)


def test_requests_for_tokens_are_counted(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    upstreams.push_to_hub("library/tokens-counted", "1", images.build_small_image("tokens counted"))
    response = daemon.client.get(f"{HUB}/v2/library/tokens-counted/manifests/1", Accept=ACCEPT_MANIFESTS)
    assert response.status in (200, 401)
    query = "service=registry.docker.io&scope=repository:library/tokens-counted:pull"
    daemon.client.get(f"https://auth.docker.io/token?{query}")
    counted = [
        value
        for name, value in scrape(daemon).items()
        if name.startswith("upstream_requests_total") and 'kind="token"' in name and 'registry="docker.io"' in name
    ]
    assert sum(counted) >= 1


EXAMPLES = Path(__file__).parents[2] / "examples"

PROMETHEUS = """
global: {scrape_interval: 200ms, evaluation_interval: 200ms}
rule_files: [%s]
scrape_configs: [{job_name: docker-registry-proxy, static_configs: [{targets: ["%s"]}]}]
"""


def test_a_real_prometheus(upstreams: Upstreams, start_daemon: StartDaemon, tmp_path: Path) -> None:
    """It prefers OpenMetrics, takes every metric, and evaluates the rules of the examples over them."""
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed; `make test-programs` installs it")
    daemon = start_daemon()
    digest = upstreams.fake.put_blob("metrics/scraped", images.random_bytes(10_000, "scraped"))
    for _ in range(2):
        assert daemon.client.get(f"{FAKE}/v2/metrics/scraped/blobs/{digest}").status == 200
    port, configuration = free_port(), tmp_path / "prometheus.yml"
    configuration.write_text(
        PROMETHEUS % (EXAMPLES / "dockerproxy.rules.yml", daemon.url.removeprefix("http://").rstrip("/"))
    )

    def ask(path: str) -> Any:
        response = request_directly("GET", f"http://127.0.0.1:{port}/api/v1/{path}")
        return json.loads(response.body)["data"] if response.status == 200 else {}

    def query(expression: str) -> list[Any]:
        found: list[Any] = ask(f"query?query={quote(expression)}").get("result", [])
        return found

    def is_scraped() -> bool:
        try:
            return bool(query("dockerproxy_workers"))
        except OSError:
            return False  # it is starting

    def rules() -> list[Any]:
        return [rule for group in ask("rules")["groups"] for rule in group["rules"]]

    with subprocess.Popen(
        [
            "prometheus",
            f"--config.file={configuration}",
            f"--storage.tsdb.path={tmp_path}/data",
            f"--web.listen-address=127.0.0.1:{port}",
            "--log.level=error",
        ]
    ) as prometheus:
        try:
            wait_until(is_scraped, "the metrics are scraped")
            (target,) = ask("targets")["activeTargets"]
            assert (target["health"], target["lastError"]) == ("up", "")
            names = {row["metric"]["__name__"] for row in query("{job='docker-registry-proxy'}")}
            assert names > {
                f"dockerproxy_{name.partition('{')[0]}" for name in scrape(daemon) if "process_" not in name
            }
            (hits,) = query("dockerproxy_requests_total{registry='fake.test',verdict='HIT'}")
            assert hits["value"][1] == "1"
            wait_until(lambda: all(rule["evaluationTime"] > 0 for rule in rules()), "the rules are evaluated")
            assert {(rule["health"], rule.get("lastError", "")) for rule in rules()} == {("ok", "")}
        finally:
            prometheus.terminate()
