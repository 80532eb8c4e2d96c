"""The page /metrics: its bounds, a file system that does not answer, and the hosts that it names."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from attrs import define, field
from twisted.internet.defer import Deferred

from dockerproxy.cache.identity import PUBLIC
from dockerproxy.cache.rate_limits import RateLimits
from dockerproxy.daemon.metrics import Metrics
from dockerproxy.errors import TooManyRequests
from dockerproxy.http.headers import Headers
from dockerproxy.metering import handle_metrics
from dockerproxy.oci.names import Registry
from dockerproxy.shares import ClientShares
from dockerproxy.store.layout import Layout
from dockerproxy.store.records import Records
from dockerproxy.store.tombstones import Tombstones
from tests.store.support.reactor import SteppedReactor


class FakeSpace:
    async def usage(self) -> tuple[int, int]:
        return 1, 2


@define
class FakeDisk:
    """It answers when `answer` fires."""

    answer: Deferred[Any] = field(factory=Deferred)

    async def read(self, function: Any, *args: Any) -> Any:
        await self.answer
        return function(*args)


@define(eq=False)
class FakeRequest:
    client: str = "192.0.2.1"
    headers: Headers = field(factory=Headers)
    content: str = ""
    sent: Deferred[None] = field(factory=Deferred)

    async def respond_long(self, status: int, fields: Any, content: bytes) -> None:
        self.content = content.decode()
        await self.sent


@define(eq=False)
class Page:
    root: Path
    reactor: SteppedReactor = field(factory=SteppedReactor)
    disk: FakeDisk = field(factory=FakeDisk)
    requests: ClientShares = field(factory=lambda: ClientShares("requests for /metrics", limit=3, share=2))
    connected: list[FakeRequest] = field(factory=list)  # or the collector would end a handler that waits for its client

    @property
    def records(self) -> Records:
        return Records(self.root / "records")

    def get(self, request: FakeRequest) -> list[Any]:
        self.connected.append(request)
        store = Layout(self.root)
        state = SimpleNamespace(cache=store, registry=store, open_records=lambda: self.records)
        metrics, tombstones = Metrics.make(1, ["quay.io"]), Tombstones()
        shared: Any = SimpleNamespace(cache_space=FakeSpace(), state=state, metrics=metrics, tombstones=tombstones)
        authority: Any = SimpleNamespace(expires_at=1.0)
        disk: Any = self.disk
        outcomes: list[Any] = []
        page = handle_metrics(self.reactor, shared, authority, disk, self.requests, request)  # type: ignore[arg-type]
        Deferred.fromCoroutine(page).addBoth(outcomes.append)
        self.run_jobs()
        return outcomes

    def run_jobs(self) -> None:
        while self.reactor.jobs:
            self.reactor.run_one()


@pytest.fixture
def page(tmp_path: Path) -> Page:
    return Page(tmp_path)


def test_a_disk_that_does_not_answer_delays_no_scrape(page: Page) -> None:
    """Prometheus waits for 10 seconds, and needs the other metrics just then."""
    request = FakeRequest()
    page.get(request)
    assert not request.content
    page.reactor.advance(2)
    page.run_jobs()
    assert 'dockerproxy_store_free_bytes{store="cached"}' in request.content
    assert 'store="hosted"' not in request.content


def test_one_client_has_a_share_until_it_has_read(page: Page) -> None:
    page.disk.answer.callback(None)
    first, second = FakeRequest(), FakeRequest()
    assert page.get(first) == page.get(second) == []
    (failure,) = page.get(FakeRequest())
    assert failure.check(TooManyRequests) and "2 of the 2 requests for /metrics" in str(failure.value)
    assert page.get(FakeRequest("192.0.2.2")) == []
    first.sent.callback(None)
    second.sent.errback(ConnectionError())
    assert page.get(FakeRequest()) == []
    assert page.requests.used == 2


def test_hosts_that_are_not_configured_are_not_named(page: Page) -> None:
    """A wildcard of REGISTRIES has any number of them."""
    page.disk.answer.callback(None)
    limits = RateLimits(page.records, lambda: 1_800_000_000.0)
    for name in ("quay.io", "secret.registries.example"):
        limits.note(Registry.parse(name), PUBLIC, "GET", 429, Headers([("Retry-After", "60")]))
    request = FakeRequest()
    page.get(request)
    assert 'ratelimit_refused_until_timestamp_seconds{login="anonymous",registry="quay.io"}' in request.content
    assert "secret" not in request.content
