"""Look-ups: shared, remembered briefly, dropped if nobody waits for them."""

from __future__ import annotations

import errno
import socket
from typing import Any

import pytest
from attrs import define, field
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from dockerproxy.errors import TooManyRequests
from dockerproxy.net.resolver import NameResolver


@define(eq=False)
class ManualPool:
    """A pool with jobs that the test ends."""

    calls: list[tuple[str, str]] = field(factory=list)
    families: list[Any] = field(factory=list)
    jobs: list[Deferred[Any]] = field(factory=list)
    cancelled: int = 0
    error: Exception | None = None

    async def run(self, function: Any, *args: object, client: str = "") -> Any:
        if self.error is not None:
            raise self.error
        self.calls.append((str(args[0]), client))
        self.families.append(args[2])
        job: Deferred[Any] = Deferred(self._cancel)
        self.jobs.append(job)
        return await job

    def _cancel(self, job: Deferred[Any]) -> None:
        self.cancelled += 1

    def answer(self, *addresses: str) -> None:
        self.jobs.pop(0).callback(
            [(socket.AF_INET6 if ":" in a else socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, 0)) for a in addresses]
        )


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pool() -> ManualPool:
    return ManualPool()


@pytest.fixture
def resolver(pool: ManualPool, clock: Clock) -> NameResolver:
    return NameResolver(pool, clock.seconds)


def resolve(resolver: NameResolver, name: str = "quay.test", client: str = "a") -> Deferred[list[str]]:
    return Deferred.fromCoroutine(resolver.resolve(name, client))


def failure_of(deferred: Deferred[Any]) -> BaseException:
    caught: list[Failure] = []
    deferred.addErrback(caught.append)
    return caught[0].value


def test_addresses_keep_the_resolvers_order(resolver: NameResolver, pool: ManualPool) -> None:
    addresses = resolve(resolver)
    pool.answer("2001:db8::1", "192.0.2.1", "2001:db8::1")
    assert addresses.result == ["2001:db8::1", "192.0.2.1"]


def test_one_look_up_serves_all_who_wait(resolver: NameResolver, pool: ManualPool) -> None:
    waiting = [resolve(resolver, client=client) for client in "abc"]
    assert pool.calls == [("quay.test", "a")]
    assert resolver.pending == ["quay.test"]
    pool.answer("192.0.2.1")
    assert [waiter.result for waiter in waiting] == [["192.0.2.1"]] * 3
    assert resolver.pending == []


def test_an_answer_is_kept_for_seconds(resolver: NameResolver, pool: ManualPool, clock: Clock) -> None:
    resolve(resolver)
    pool.answer("192.0.2.1")
    assert resolve(resolver).result == ["192.0.2.1"]
    clock.advance(5)
    resolve(resolver)
    assert len(pool.calls) == 2


def test_a_name_that_does_not_exist_is_kept_for_seconds(resolver: NameResolver, pool: ManualPool, clock: Clock) -> None:
    first = resolve(resolver)
    pool.jobs.pop().errback(socket.gaierror(socket.EAI_NONAME, "Name or service not known"))
    assert first.result == []
    assert resolve(resolver).result == []
    clock.advance(2)
    resolve(resolver)
    assert len(pool.calls) == 2


def test_a_name_that_idna_refuses_has_no_address(resolver: NameResolver, pool: ManualPool) -> None:
    addresses = resolve(resolver)
    pool.jobs.pop().errback(UnicodeError("label too long"))
    assert addresses.result == []


def test_a_lack_of_descriptors_is_not_remembered(resolver: NameResolver, pool: ManualPool) -> None:
    first = resolve(resolver)
    pool.jobs.pop().errback(OSError(errno.EMFILE, "Too many open files"))
    assert first.result == []
    resolve(resolver)
    assert len(pool.calls) == 2


def test_a_look_up_goes_on_for_those_who_stay(resolver: NameResolver, pool: ManualPool) -> None:
    leaver, stayer = resolve(resolver), resolve(resolver)
    leaver.cancel()
    assert isinstance(failure_of(leaver), CancelledError)
    assert pool.cancelled == 0
    pool.answer("192.0.2.1")
    assert stayer.result == ["192.0.2.1"]


def test_a_look_up_that_nobody_waits_for_is_cancelled(resolver: NameResolver, pool: ManualPool) -> None:
    waiting = [resolve(resolver), resolve(resolver)]
    for waiter in waiting:
        waiter.cancel()
        failure_of(waiter)
    assert pool.cancelled == 1
    assert resolver.pending == []
    resolve(resolver)  # begins anew
    assert len(pool.calls) == 2


def test_a_full_pool_is_an_error_for_this_client_only(resolver: NameResolver, pool: ManualPool) -> None:
    pool.error = TooManyRequests("50 name look-ups of a are waiting already")
    assert isinstance(failure_of(resolve(resolver)), TooManyRequests)
    pool.error = None
    addresses = resolve(resolver, client="b")
    pool.answer("192.0.2.1")
    assert addresses.result == ["192.0.2.1"]


def test_ipv4_alone_if_ipv6_is_disabled(pool: ManualPool, clock: Clock) -> None:
    resolve(NameResolver(pool, clock.seconds))
    resolve(NameResolver(pool, clock.seconds, ipv6=False))
    assert pool.families == [socket.AF_UNSPEC, socket.AF_INET]
