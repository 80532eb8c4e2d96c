"""A file system that does not answer: which requests wait, for how long, and how many."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from dockerproxy.concurrency import current_client
from dockerproxy.errors import RegistryError, ServiceOverloaded, StorageFailed, TooManyRequests
from dockerproxy.oci.names import Digest, parse_repository
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.disk_access import NETWORK_DISK_LIMITS, READ_TIMEOUT, LocalDisk, NetworkDisk
from dockerproxy.store.hosted_tree import HostedTree
from dockerproxy.store.layout import Layout
from dockerproxy.thread_pool import BoundedThreadPool, PoolLimits
from tests.store.support.reactor import SteppedReactor
from tests.support.hosted import make_hosted_store

SMALL = PoolLimits(threads=4, threads_per_client=2, waiting=6, waiting_per_client=3)


class HangingReactor(SteppedReactor):
    """Its threads run nothing until `answer`, as if each waited for the file system."""

    def answer(self) -> None:
        while self.jobs:
            self.run_one()


@pytest.fixture
def reactor() -> HangingReactor:
    return HangingReactor()


def make_disk(reactor: Any, limits: PoolLimits = SMALL) -> NetworkDisk:
    pool = BoundedThreadPool(reactor, "accesses to REGISTRY_DIR", limits, reactor)
    return NetworkDisk(reactor, "REGISTRY_DIR", "nfs4", pool)


def start(access: Any, client: str) -> list[Any]:
    """Start `access` for `client` and return a list that gets its result or failure."""
    outcomes: list[Any] = []
    token = current_client.set(client)
    try:
        Deferred.fromCoroutine(access).addBoth(outcomes.append)
    finally:
        current_client.reset(token)
    return outcomes


def test_a_read_ends_in_a_sentence(reactor: HangingReactor) -> None:
    disk, calls = make_disk(reactor), list[int]()
    outcomes = start(disk.read(calls.append, 1), "10.0.0.1")
    reactor.advance(READ_TIMEOUT - 1)
    assert not outcomes
    reactor.advance(1)
    error = outcomes[0].value
    assert isinstance(error, ServiceOverloaded)
    assert error.message == "REGISTRY_DIR is on nfs4, which has not answered for 30 seconds"
    assert error.headers == (("Retry-After", "30"),)
    reactor.answer()
    assert (calls, len(outcomes)) == ([1], 1), "the thread goes on, and its result is dropped"


def test_a_read_that_has_not_begun_is_dropped(reactor: HangingReactor) -> None:
    disk, calls = make_disk(reactor), list[int]()
    for number in range(4):
        start(disk.read(calls.append, number), "10.0.0.1")
    reactor.advance(READ_TIMEOUT)
    reactor.answer()
    assert calls == [0, 1], "one client has two threads"
    assert not any(bound.used for bound in disk.bounds)


def test_a_write_waits_until_the_file_system_answers(reactor: HangingReactor) -> None:
    disk = make_disk(reactor)
    outcomes = start(disk.run(lambda: "done"), "10.0.0.1")
    reactor.advance(10 * READ_TIMEOUT)
    assert not outcomes
    reactor.answer()
    assert outcomes == ["done"]


def test_one_client_has_a_share(reactor: HangingReactor) -> None:
    disk = make_disk(reactor)
    own = [start(disk.run(int), "10.0.0.1") for _ in range(6)]
    refused = own[5][0].value
    assert isinstance(refused, TooManyRequests)
    assert refused.message == ("10.0.0.1 has 3 of the 3 waiting accesses to REGISTRY_DIR that one client may have")
    assert dict(refused.headers)["Retry-After"]
    others = [start(disk.run(int), "10.0.0.2") for _ in range(2)]
    assert len(reactor.jobs) == 4, "another client has the other two threads"
    reactor.answer()
    assert [*own[:5], *others] == [[0]] * 7


def test_what_must_run_is_not_refused(reactor: HangingReactor) -> None:
    """An upload is unlocked again, however many requests wait."""
    disk, calls = make_disk(reactor), list[str]()
    for number in range(10):
        start(disk.run(int), f"10.0.0.{number}")
    assert isinstance(start(disk.run(int), "")[0].value, ServiceOverloaded)
    required = start(disk.run(calls.append, "unlocked", required=True), "10.0.0.99")
    reactor.advance(5)
    assert not required
    while reactor.busy:
        reactor.run_one()
    assert (calls, required) == (["unlocked"], [None])


def test_a_bound_of_500_hosts_behind_one_address() -> None:
    assert NETWORK_DISK_LIMITS.waiting_per_client >= 1000


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOTCONN, errno.ESTALE, errno.ETIMEDOUT])
def test_a_file_system_that_fails(reactor: HangingReactor, error: int) -> None:
    def fail() -> None:
        raise OSError(error, "it is gone")

    outcomes = start(make_disk(reactor).read(fail), "10.0.0.1")
    reactor.answer()
    assert isinstance(outcomes[0].value, StorageFailed)
    assert outcomes[0].value.message == "REGISTRY_DIR is on nfs4, which failed: it is gone"


def test_content_is_read_in_threads_only(reactor: HangingReactor, tmp_path: Path) -> None:
    disk, blobs = make_disk(reactor), Blobs(Layout(tmp_path), False)
    digest = Digest.of(b"0123456789")
    blobs.put(b"0123456789", digest)
    blob = blobs.open(digest)
    assert blob is not None
    content = disk.open_content(blobs, blob)
    assert (blob.fd, content.size) == (-1, 10)
    assert start(content.sendfile_source(0, 5), "") == [None]
    outcomes = [start(content.read(offset, 4), "") for offset in (0, 4, 8, 10)]
    assert outcomes == [[], [], [], []]
    reactor.answer()
    assert outcomes == [[b"0123"], [b"4567"], [b"89"], [b""]]
    blobs.remove(digest)
    gone = start(content.read(0, 4), "")
    reactor.answer()
    assert isinstance(gone[0].value, RegistryError)


def test_a_local_disk_needs_no_thread_for_what_is_quick() -> None:
    disk = LocalDisk(Clock())
    assert start(disk.read(lambda: 1), "") == [1]
    assert start(disk.run(lambda: 2, quick=True), "") == [2]


def test_an_upload_is_unlocked_however_many_requests_wait(reactor: HangingReactor, tmp_path: Path) -> None:
    disk, repository = make_disk(reactor), parse_repository("team/app")
    uploads = make_hosted_store(reactor, HostedTree.from_layout(Layout(tmp_path)), disk).uploads
    upload = reactor.run(uploads.start(repository, "sha256", "10.0.0.1"))
    reactor.run(upload.append(b"abc"))
    for number in range(10):
        start(disk.run(int), f"10.0.0.{number}")
    suspended = start(upload.suspend(), "10.0.0.1")
    while reactor.busy:
        reactor.run_one()
    assert suspended == [None]
    assert reactor.run(uploads.resume(repository, upload.status.session)).status.size == 3
