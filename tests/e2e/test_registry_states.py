"""The log of a registry that stops to answer: one line for each change, over all processes and whatever the cause."""

from __future__ import annotations

import pytest

from tests.e2e.harness import images
from tests.e2e.harness.daemon import StartDaemon, TwistdDaemon
from tests.e2e.harness.fake_registry import FakeRegistry
from tests.e2e.harness.images import ACCEPT_MANIFESTS
from tests.e2e.harness.process import wait_until
from tests.e2e.harness.upstreams import Upstreams

REGISTRY = "http://states.test:8081"


def events(daemon: TwistdDaemon) -> list[str]:
    """Return the lines about states of the log, from the server's name on."""
    lines = [line for line in daemon.output_text.splitlines() if "answers again" in line or "does not answer:" in line]
    return [line[line.index("states.test") :] for line in lines if "states.test" in line and "/v2/" not in line]


@pytest.mark.parametrize("workers", [1, 3])
def test_one_line_for_each_change(upstreams: Upstreams, start_daemon: StartDaemon, workers: int) -> None:
    """With several processes, the requests come to all of them."""
    server = FakeRegistry()
    server.start()
    daemon = start_daemon(
        WORKERS=str(workers),
        PROXY_CONNECT_TIMEOUT="2s",
        REGISTRIES=REGISTRY,
        UPSTREAM_ADDRESSES=f"states.test:8081=127.0.0.1:{server.port}",
    )
    if workers > 1:
        wait_until(lambda: daemon.output_text.count(" serves") == workers - 1, "all workers serve")
    server.put("states/app", "1", images.build_small_image("states"))
    url = f"{REGISTRY}/v2/states/app/manifests/1"

    def get() -> str:
        return daemon.client.get(url, Accept=ACCEPT_MANIFESTS).cache_status

    try:
        assert get() == "MISS"
        for outage in (1, 2):
            server.stop()
            stale = [get() for _ in range(7)]
            assert stale == ["STALE"] * 7
            begins = "states.test:8081 does not answer: connection refused; serving what is cached"
            assert events(daemon)[2 * outage - 2 :] == [begins]
            server.start()
            wait_until(lambda: get() == "REVALIDATED", "the registry is asked again")
            assert [get() for _ in range(5)] == ["REVALIDATED"] * 5
            wait_until(lambda outage=outage: len(events(daemon)) == 2 * outage, "the log says that it answers")
            end = events(daemon)[-1]
            assert end.startswith("states.test:8081 answers again after ")
            assert end.endswith(" s, 7 answers were stale")
    finally:
        server.stop()
