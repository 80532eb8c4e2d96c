from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.task import Clock

from dockerproxy.cache.access import GRANT_TTL, STALE_GRANT_TTL, Access, AccessState
from dockerproxy.cache.identity import PUBLIC
from dockerproxy.store.records import Records

KEY = "registry-1.docker.io/library/app"
CLIENT, LOGIN = "own:0123", "login:4567"
EPOCH = 1_700_000_000.0


class AccessHarness:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.clock = Clock()
        self.restart()

    def restart(self) -> None:
        self.access = Access(Records(self.root), self.now)

    def now(self) -> float:
        return EPOCH + float(self.clock.seconds())

    def grant(self, identity: str, key: str = KEY) -> None:
        self.access.record_grant(key, identity, self.now())

    def state(self, identity: str, key: str = KEY) -> AccessState:
        return self.access.state(key, identity, public=True)


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[AccessHarness]:
    yield AccessHarness(tmp_path)


@pytest.mark.parametrize("identity", [PUBLIC, CLIENT, LOGIN])
def test_unknown_identity_has_no_access(harness: AccessHarness, identity: str) -> None:
    assert harness.state(identity) is AccessState.UNKNOWN


@pytest.mark.parametrize("identity", [PUBLIC, CLIENT, LOGIN])
@pytest.mark.parametrize("restart", [False, True])
def test_grant_is_fresh_then_stale(harness: AccessHarness, identity: str, restart: bool) -> None:
    harness.grant(identity)
    if restart:
        harness.restart()
    harness.clock.advance(GRANT_TTL - 1)
    assert harness.state(identity) is AccessState.GRANTED
    harness.clock.advance(1)
    assert harness.state(identity) is AccessState.GRANTED_STALE


def test_grant_is_per_identity_and_repository(harness: AccessHarness) -> None:
    harness.grant(CLIENT)
    assert harness.state("own:other") is AccessState.UNKNOWN
    assert harness.state(PUBLIC) is AccessState.UNKNOWN
    assert harness.state(CLIENT, KEY + "2") is AccessState.UNKNOWN


@pytest.mark.parametrize("identity", [CLIENT, LOGIN])
def test_public_grant_covers_every_identity(harness: AccessHarness, identity: str) -> None:
    harness.grant(PUBLIC)
    assert harness.state(identity) is AccessState.GRANTED
    harness.clock.advance(GRANT_TTL)
    assert harness.state(identity) is AccessState.GRANTED_STALE
    harness.grant(identity)
    assert harness.state(identity) is AccessState.GRANTED
    assert harness.state(PUBLIC) is AccessState.GRANTED_STALE


@pytest.mark.parametrize("restart", [False, True])
def test_client_grant_expires_during_outage(harness: AccessHarness, restart: bool) -> None:
    """Grants to the public and to the configured login stay valid for the whole outage."""
    for identity in (CLIENT, LOGIN):
        harness.grant(identity)
    harness.grant(PUBLIC, "public/key")
    harness.clock.advance(STALE_GRANT_TTL - 1)
    if restart:
        harness.restart()
    assert [harness.state(CLIENT), harness.state(LOGIN)] == [AccessState.GRANTED_STALE, AccessState.GRANTED_STALE]
    harness.clock.advance(1)
    assert [harness.state(CLIENT), harness.state(LOGIN)] == [AccessState.UNKNOWN, AccessState.GRANTED_STALE]
    harness.clock.advance(1000 * STALE_GRANT_TTL)
    assert harness.state(LOGIN) is AccessState.GRANTED_STALE
    assert harness.state(CLIENT, "public/key") is AccessState.GRANTED_STALE


@pytest.mark.parametrize("identity", [PUBLIC, CLIENT, LOGIN])
@pytest.mark.parametrize("restart", [False, True])
def test_denial_revokes_grant(harness: AccessHarness, identity: str, restart: bool) -> None:
    harness.grant(identity)
    harness.grant("own:another")
    harness.access.record_denial(KEY, identity)
    if restart:
        harness.restart()
    assert harness.state(identity) is AccessState.UNKNOWN
    assert harness.state("own:another") is AccessState.GRANTED


@pytest.mark.parametrize("identity", [PUBLIC, CLIENT, LOGIN])
def test_denial_from_another_process_counts_during_outage(harness: AccessHarness, identity: str) -> None:
    """Both processes hold the grant in memory. Once it is stale, the denial on disk takes precedence."""
    other = Access(Records(harness.root), harness.now)
    for access in (harness.access, other):
        access.record_grant(KEY, identity, harness.now())
    harness.access.record_denial(KEY, identity)
    harness.grant("own:another")
    harness.clock.advance(GRANT_TTL)
    assert other.state(KEY, identity, public=True) is AccessState.UNKNOWN
    other.record_grant(KEY, identity, harness.now())
    assert harness.state(identity) is other.state(KEY, identity, public=True) is AccessState.GRANTED


def test_denial_without_grant_writes_nothing(harness: AccessHarness) -> None:
    harness.access.record_denial(KEY, CLIENT)
    assert list(harness.root.iterdir()) == []


def test_grant_is_saved_once_a_minute(harness: AccessHarness) -> None:
    harness.grant(CLIENT)
    [path] = harness.root.rglob("*~.json")
    inode = path.stat().st_ino
    harness.clock.advance(59)
    harness.grant(CLIENT)
    assert path.stat().st_ino == inode
    harness.clock.advance(2)
    harness.grant(CLIENT)
    assert path.stat().st_ino != inode
    harness.clock.advance(GRANT_TTL - 1)
    harness.restart()
    assert harness.state(CLIENT) is AccessState.GRANTED


@pytest.mark.parametrize("shared", [False, True])
def test_write_through_grant_is_saved_at_once(harness: AccessHarness, shared: bool) -> None:
    """Only if other processes share the records. Without `write_through`, a renewed grant is saved once a minute."""
    access, other = (
        Access(Records(harness.root), harness.now, shared),
        Access(Records(harness.root), harness.now, shared),
    )
    access.record_grant(KEY, CLIENT, harness.now(), write_through=True)
    harness.clock.advance(1)
    granted_at = harness.now()
    access.record_grant(KEY, CLIENT, granted_at)
    assert not other.granted_since(KEY, CLIENT, granted_at)
    access.record_grant(KEY, CLIENT, granted_at, write_through=True)
    assert other.granted_since(KEY, CLIENT, granted_at) is shared


@pytest.mark.parametrize("denied_by", ["this process", "another process"])
def test_a_denial_ends_the_grant_that_another_request_waited_for(harness: AccessHarness, denied_by: str) -> None:
    since = harness.now()
    other = Access(Records(harness.root), harness.now, shared=True)
    harness.grant(CLIENT)
    assert harness.access.granted_since(KEY, CLIENT, since)
    harness.clock.advance(1)
    (harness.access if denied_by == "this process" else other).record_denial(KEY, CLIENT)
    assert not harness.access.granted_since(KEY, CLIENT, since)
    assert not other.granted_since(KEY, CLIENT, since)


def test_grant_counts_from_its_own_time(harness: AccessHarness) -> None:
    """A grant dates from the upstream response, which precedes the end of a long download."""
    before = harness.now()
    harness.clock.advance(GRANT_TTL)
    harness.access.record_grant(KEY, CLIENT, before)
    assert harness.state(CLIENT) is AccessState.GRANTED_STALE
    harness.grant(CLIENT)
    harness.clock.advance(GRANT_TTL - 1)
    now = harness.now()
    harness.access.record_grant(KEY, CLIENT, now - 10)
    harness.access.record_grant(KEY, CLIENT, now - 20)  # an older grant changes nothing
    harness.clock.advance(GRANT_TTL - 15)
    assert harness.state(CLIENT) is AccessState.GRANTED


def test_clock_set_back(harness: AccessHarness) -> None:
    """A grant dated in the future is not fresh. A grant to a client's own credential is then not valid at all."""
    for identity in (PUBLIC, CLIENT):
        harness.grant(identity, "key/" + identity.replace(":", "-"))
    harness.clock.rightNow -= 1e6
    assert harness.state(PUBLIC, "key/public") is AccessState.GRANTED_STALE
    assert harness.state(CLIENT, "key/own-0123") is AccessState.UNKNOWN


def test_grant_from_another_process(harness: AccessHarness) -> None:
    other = Access(Records(harness.root), harness.now)
    assert harness.state(CLIENT) is AccessState.UNKNOWN
    other.record_grant(KEY, CLIENT, harness.now())
    assert harness.state(CLIENT) is AccessState.GRANTED


def test_grant_from_another_process_is_read_once_while_it_is_fresh(harness: AccessHarness) -> None:
    harness.grant(CLIENT)
    harness.restart()
    assert harness.state(CLIENT) is AccessState.GRANTED
    shutil.rmtree(harness.root)
    assert harness.state(CLIENT) is AccessState.GRANTED
    harness.clock.advance(GRANT_TTL)
    assert harness.state(CLIENT) is AccessState.UNKNOWN


def test_memory_is_bounded(harness: AccessHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files are bounded by the cache's janitor."""
    monkeypatch.setattr("dockerproxy.cache.access._MAX_GRANTS_IN_MEMORY", 100)
    harness.restart()
    for number in range(300):
        harness.grant(f"own:{number}")
    assert len(harness.access._grants) == 100
    assert harness.state("own:299") is harness.state("own:0") is AccessState.GRANTED  # as saved


class InterleavedRecords(Records):
    """Runs `interrupt` just before the next write, like another process."""

    interrupt: Callable[[], None] | None = None

    def put(self, value: Mapping[str, Any], *key: str) -> None:
        interrupt, self.interrupt = self.interrupt, None
        if interrupt is not None:
            interrupt()
        super().put(value, *key)


@pytest.mark.parametrize("granted", [CLIENT, "own:another", LOGIN])
@pytest.mark.parametrize("write", ["grant", "denial"])
def test_denial_is_not_overwritten_by_another_process(harness: AccessHarness, granted: str, write: str) -> None:
    """The other process denies CLIENT just before this one writes what upstream decided earlier for `granted`."""
    records = InterleavedRecords(harness.root)
    harness.access, other = Access(records, harness.now), Access(Records(harness.root), harness.now)
    harness.grant(CLIENT)
    if granted != CLIENT and write == "denial":
        harness.grant(granted)
    started_at = harness.now()
    harness.clock.advance(100)
    records.interrupt = partial(other.record_denial, KEY, CLIENT)
    if write == "grant":
        harness.access.record_grant(KEY, granted, started_at + 90)
    else:
        harness.access.record_denial(KEY, granted)
    assert records.interrupt is None
    harness.clock.advance(GRANT_TTL)
    for access in (harness.access, other, Access(Records(harness.root), harness.now)):
        assert access.state(KEY, CLIENT, public=True) is AccessState.UNKNOWN
    other.record_grant(KEY, CLIENT, harness.now())
    assert harness.state(CLIENT) is AccessState.GRANTED


def test_download_that_began_before_a_denial_grants_nothing(harness: AccessHarness) -> None:
    harness.grant(CLIENT)
    started_at = harness.now()
    harness.clock.advance(10)
    harness.access.record_denial(KEY, CLIENT)
    harness.clock.advance(10)
    harness.access.record_grant(KEY, CLIENT, started_at)
    assert harness.state(CLIENT) is AccessState.UNKNOWN
    harness.grant(CLIENT)
    assert harness.state(CLIENT) is AccessState.GRANTED


def test_denial_dated_in_the_future_ends_with_the_next_grant(harness: AccessHarness) -> None:
    harness.grant(CLIENT)
    harness.access.record_denial(KEY, CLIENT)
    harness.clock.rightNow -= 1e6
    assert harness.state(CLIENT) is AccessState.UNKNOWN
    harness.grant(CLIENT)
    harness.restart()
    assert harness.state(CLIENT) is AccessState.GRANTED


@pytest.mark.parametrize("content", ["", "[]", '{"key":["grant","KEY","own:0123"],"value":{"at":"yes"}}'])
def test_damaged_records_grant_nothing(harness: AccessHarness, content: str) -> None:
    harness.grant(CLIENT)
    harness.grant(PUBLIC)
    paths = list(harness.root.rglob("*~.json"))
    assert len(paths) == 2
    for path in paths:
        path.write_text(content.replace("KEY", KEY))
    harness.restart()
    assert harness.state(CLIENT) is AccessState.UNKNOWN


def test_unwritable_records(harness: AccessHarness, log_lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The grant is then kept in memory until GRANT_TTL ends."""

    def fail(*args: object, **more: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("dockerproxy.store.files.Staging.write", fail)
    harness.grant(CLIENT)
    assert harness.state(CLIENT) is AccessState.GRANTED
    assert any("cannot save the grant record" in line and "No space left" in line for line in log_lines)
    harness.restart()
    assert harness.state(CLIENT) is AccessState.UNKNOWN


def test_denial_counts_on_a_full_disk(harness: AccessHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **more: object) -> None:
        raise OSError(28, os.strerror(28))

    harness.grant(CLIENT)
    monkeypatch.setattr("dockerproxy.store.files.Staging.write", fail)
    harness.access.record_denial(KEY, CLIENT)
    assert harness.state(CLIENT) is AccessState.UNKNOWN
    harness.restart()
    assert harness.state(CLIENT) is AccessState.UNKNOWN
