"""The probe of the bucket, over a store in memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from twisted.internet.defer import Deferred

from dockerproxy.bucket.bucket_probe import RESULT_TTL, keeps_conditions, probe_bucket
from dockerproxy.errors import UpstreamUnreachable
from dockerproxy.store.write_probe import ProbeResult, StoreProbe, StoreState
from tests.cache.support.reactor import ManualReactor
from tests.support.fake_store import LOCATION, FakeStore, refusal


@pytest.fixture
def fake() -> FakeStore:
    return FakeStore(ManualReactor())


def make_probe(fake: FakeStore, reads_only: Callable[[], bool] = lambda: False) -> StoreProbe:
    return probe_bucket(fake.clock, fake.bucket(), reads_only)


def ask(fake: FakeStore, probe: StoreProbe) -> ProbeResult:
    results: list[ProbeResult] = []
    Deferred.fromCoroutine(probe.probe()).addCallback(results.append)
    while not results:
        fake.clock.advance(0.5)
    return results[0]


def ask_to_the_end(fake: FakeStore, probe: StoreProbe) -> ProbeResult:
    """Return the result of an attempt, which may try for longer than those who ask wait."""
    for _ in range(100):
        result = ask(fake, probe)
        if result.details:
            return result
        fake.clock.advance(0.5)
    raise AssertionError("the attempt does not end")


def test_a_bucket_that_can_be_written_is_left_as_it_was(fake: FakeStore) -> None:
    probe = make_probe(fake)
    assert ask(fake, probe) == ProbeResult(StoreState.WRITABLE)
    assert (fake.keys(), [request.method for request in fake.requests]) == ([], ["PUT", "DELETE"])
    assert ask(fake, probe).state is StoreState.WRITABLE
    assert len(fake.requests) == 2, "the result is kept, because requests cost money"
    fake.clock.advance(RESULT_TTL)
    ask(fake, probe)
    assert len(fake.requests) == 4


def test_a_key_that_may_only_read_is_asked_to_read_only(fake: FakeStore) -> None:
    assert ask(fake, make_probe(fake, lambda: True)).state is StoreState.WRITABLE
    assert [request.method for request in fake.requests] == ["HEAD"]


@pytest.mark.parametrize(
    ("status", "code", "state"),
    [
        (403, "AccessDenied", StoreState.FAILED),
        (507, "XMinioStorageFull", StoreState.FAILED),
        (503, "SlowDown", StoreState.HANGS),
    ],
)
def test_problems_say_no_place_to_everybody(fake: FakeStore, status: int, code: str, state: StoreState) -> None:
    for _ in range(20):
        fake.fail(refusal(status, code))
    probe = make_probe(fake)
    result = ask_to_the_end(fake, probe)
    assert (result.state, code in result.details) == (state, True)
    assert result.sentence.startswith("REGISTRY_STORE ")
    assert str(LOCATION) not in result.sentence and LOCATION.endpoint.host.name not in result.sentence


def test_a_store_that_cannot_be_reached_does_not_answer(fake: FakeStore) -> None:
    fake.fail(UpstreamUnreachable("store.test: connection refused"), times=20)
    probe = make_probe(fake)
    ask(fake, probe)
    fake.clock.advance(5)
    result = ask(fake, probe)
    assert result.state is StoreState.HANGS
    assert "does not answer" in result.sentence and "store.test" not in result.sentence
    assert "connection refused" in result.details


@pytest.mark.parametrize("keeps", [True, False])
def test_a_store_that_ignores_conditions_is_found(fake: FakeStore, keeps: bool) -> None:
    fake.knows_conditions = keeps
    results: list[bool] = []
    Deferred.fromCoroutine(keeps_conditions(fake.bucket())).addCallback(results.append)
    while not results:
        fake.clock.advance(0.5)
    assert (results, fake.keys()) == ([keeps], [])
