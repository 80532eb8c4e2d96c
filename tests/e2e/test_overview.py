"""The overview of a daemon: what its API, its stream of events and its control socket say while clients pull."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

import pytest

from tests.e2e.harness import images
from tests.e2e.harness.daemon import StartDaemon, TwistdDaemon
from tests.e2e.harness.http_client import request_directly
from tests.e2e.harness.images import ACCEPT_MANIFESTS
from tests.e2e.harness.process import wait_until
from tests.e2e.harness.upstreams import FAKE, Upstreams

MIB = 1 << 20


def get(daemon: TwistdDaemon, resource: str) -> dict[str, Any]:
    response = request_directly("GET", f"{daemon.url}/api/v1/{resource}")
    assert response.status == 200, response.body
    document: dict[str, Any] = json.loads(response.body)
    return document


def pull(daemon: TwistdDaemon, repository: str, image: Any) -> None:
    assert daemon.client.get(f"{FAKE}/v2/{repository}/manifests/1", Accept=ACCEPT_MANIFESTS).status == 200
    for layer in image.layers:
        assert daemon.client.get(f"{FAKE}/v2/{repository}/blobs/{layer.digest}").status == 200


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_api_says_what_clients_did(upstreams: Upstreams, start_daemon: StartDaemon, workers: str) -> None:
    daemon = start_daemon(WORKERS=workers)
    image = images.build_small_image("overview")
    repository = f"overview/app-{workers}"
    upstreams.fake.put(repository, "1", image)
    for _ in range(2):
        pull(daemon, repository, image)

    def row() -> dict[str, Any]:
        rows = get(daemon, "registries")["registries"]
        return next((row for row in rows if row["name"] == "fake.test"), {"requests": 0})

    wait_until(lambda: row()["requests"] >= 4, "the counters are sampled", timeout=30)
    size = sum(len(layer.data) for layer in image.layers)
    assert row()["served"] >= 2 * size
    assert 0 < row()["ratio"] < 1
    assert row()["up"] is True
    wait_until(lambda: get(daemon, "images?q=overview")["count"] == 1, "the repository is listed", timeout=60)
    listed = get(daemon, "images?q=overview")["images"][0]
    assert listed["name"] == f"fake.test/{repository}"
    assert listed["tags"] == 1
    tags = get(daemon, f"image?name={quote(listed['name'])}")["tags"]
    assert [tag["tag"] for tag in tags] == ["1"]
    overview = get(daemon, "overview")
    assert overview["total"]["served"] >= 2 * size
    assert overview["repositories"]["count"] >= 1
