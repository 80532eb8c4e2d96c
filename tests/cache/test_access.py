from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from twisted.internet.task import Clock

from dockerproxy.cache.access import FRESH, OUTAGE, Access, Standing
from dockerproxy.cache.identity import PUBLIC
from dockerproxy.store.records import Records

KEY = "registry-1.docker.io/library/app"
OWN, LOGIN = "own:0123", "login:4567"
EPOCH = 1_700_000_000.0


class Case:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.clock = Clock()
        self.restart()

    def restart(self) -> None:
        self.access = Access(Records(self.root), self.now)

    def now(self) -> float:
        return EPOCH + float(self.clock.seconds())

    def prove(self, identity: str, key: str = KEY) -> None:
        self.access.proven(key, identity, self.now())

    def standing(self, identity: str, key: str = KEY) -> Standing:
        return self.access.standing(key, identity)


@pytest.fixture
def case(tmp_path: Path) -> Iterator[Case]:
    yield Case(tmp_path)


@pytest.mark.parametrize("identity", [PUBLIC, OWN, LOGIN])
def test_nobody_is_known(case: Case, identity: str) -> None:
    assert case.standing(identity) is Standing.UNKNOWN


@pytest.mark.parametrize("identity", [PUBLIC, OWN, LOGIN])
@pytest.mark.parametrize("restart", [False, True])
def test_a_yes_holds_for_a_while(case: Case, identity: str, restart: bool) -> None:
    case.prove(identity)
    if restart:
        case.restart()
    case.clock.advance(FRESH - 1)
    assert case.standing(identity) is Standing.PROVEN
    case.clock.advance(1)
    assert case.standing(identity) is Standing.STALE


def test_it_is_for_one_identity_and_one_repository(case: Case) -> None:
    case.prove(OWN)
    assert case.standing("own:other") is Standing.UNKNOWN
    assert case.standing(PUBLIC) is Standing.UNKNOWN
    assert case.standing(OWN, KEY + "2") is Standing.UNKNOWN


@pytest.mark.parametrize("identity", [OWN, LOGIN])
def test_what_all_may_each_may(case: Case, identity: str) -> None:
    case.prove(PUBLIC)
    assert case.standing(identity) is Standing.PROVEN
    case.clock.advance(FRESH)
    assert case.standing(identity) is Standing.STALE
    case.prove(identity)
    assert case.standing(identity) is Standing.PROVEN
    assert case.standing(PUBLIC) is Standing.STALE


@pytest.mark.parametrize("restart", [False, True])
def test_a_clients_own_yes_ends(case: Case, restart: bool) -> None:
    """What is public, or read by the administrator's login, is served for as long as upstream is gone."""
    for identity in (OWN, LOGIN):
        case.prove(identity)
    case.prove(PUBLIC, "public/key")
    case.clock.advance(OUTAGE - 1)
    if restart:
        case.restart()
    assert [case.standing(OWN), case.standing(LOGIN)] == [Standing.STALE, Standing.STALE]
    case.clock.advance(1)
    assert [case.standing(OWN), case.standing(LOGIN)] == [Standing.UNKNOWN, Standing.STALE]
    case.clock.advance(1000 * OUTAGE)
    assert case.standing(LOGIN) is Standing.STALE
    assert case.standing(OWN, "public/key") is Standing.STALE


@pytest.mark.parametrize("identity", [PUBLIC, OWN, LOGIN])
@pytest.mark.parametrize("restart", [False, True])
def test_a_no_takes_it_back(case: Case, identity: str, restart: bool) -> None:
    case.prove(identity)
    case.prove("own:another")
    case.access.refused(KEY, identity)
    if restart:
        case.restart()
    assert case.standing(identity) is Standing.UNKNOWN
    assert case.standing("own:another") is Standing.PROVEN


@pytest.mark.parametrize("identity", [PUBLIC, OWN, LOGIN])
def test_a_no_to_another_process_counts_when_upstream_is_gone(case: Case, identity: str) -> None:
    """Both knew the yes. For a while nobody asks again, and then what one remembers is not the last word."""
    other = Access(Records(case.root), case.now)
    for access in (case.access, other):
        access.proven(KEY, identity, case.now())
    case.access.refused(KEY, identity)
    case.prove("own:another")
    case.clock.advance(FRESH)
    assert other.standing(KEY, identity) is Standing.UNKNOWN
    other.proven(KEY, identity, case.now())
    assert case.standing(identity) is other.standing(KEY, identity) is Standing.PROVEN


def test_a_no_to_one_who_was_not_known(case: Case) -> None:
    case.access.refused(KEY, OWN)
    assert list(case.root.iterdir()) == []


def test_a_yes_is_written_down_once_a_minute(case: Case) -> None:
    case.prove(OWN)
    [path] = case.root.rglob("*~.json")
    inode = path.stat().st_ino
    case.clock.advance(59)
    case.prove(OWN)
    assert path.stat().st_ino == inode
    case.clock.advance(2)
    case.prove(OWN)
    assert path.stat().st_ino != inode
    case.clock.advance(FRESH - 1)
    case.restart()
    assert case.standing(OWN) is Standing.PROVEN


@pytest.mark.parametrize("shared", [False, True])
def test_a_yes_that_others_wait_for_is_written_down_at_once(case: Case, shared: bool) -> None:
    """Unless there are no others. One that nobody waits for has its minute."""
    access, other = Access(Records(case.root), case.now, shared), Access(Records(case.root), case.now, shared)
    access.proven(KEY, OWN, case.now(), awaited=True)
    case.clock.advance(1)
    asked = case.now()
    access.proven(KEY, OWN, asked)
    assert not other.is_proven_since(KEY, OWN, asked)
    access.proven(KEY, OWN, asked, awaited=True)
    assert other.is_proven_since(KEY, OWN, asked) is shared


def test_the_yes_of_then(case: Case) -> None:
    """It counts from when upstream said it, which for a long download is long ago."""
    before = case.now()
    case.clock.advance(FRESH)
    case.access.proven(KEY, OWN, before)
    assert case.standing(OWN) is Standing.STALE
    case.prove(OWN)
    case.clock.advance(FRESH - 1)
    now = case.now()
    case.access.proven(KEY, OWN, now - 10)
    case.access.proven(KEY, OWN, now - 20)  # one that is older changes nothing
    case.clock.advance(FRESH - 15)
    assert case.standing(OWN) is Standing.PROVEN


def test_a_clock_that_is_set_back(case: Case) -> None:
    """A yes from the future proves nothing, and a client's own is not believed for longer than it should."""
    for identity in (PUBLIC, OWN):
        case.prove(identity, "key/" + identity.replace(":", "-"))
    case.clock.rightNow -= 1e6
    assert case.standing(PUBLIC, "key/public") is Standing.STALE
    assert case.standing(OWN, "key/own-0123") is Standing.UNKNOWN


def test_another_process_says_yes(case: Case) -> None:
    other = Access(Records(case.root), case.now)
    assert case.standing(OWN) is Standing.UNKNOWN
    other.proven(KEY, OWN, case.now())
    assert case.standing(OWN) is Standing.PROVEN


def test_what_is_remembered_is_bounded(case: Case) -> None:
    case.prove(PUBLIC)
    case.prove(LOGIN)
    for number in range(300):
        case.clock.advance(0.01)
        case.prove(f"own:{number}")
    case.restart()
    assert case.standing("own:0") is Standing.PROVEN  # because it is public
    case.access.refused(KEY, PUBLIC)
    assert case.standing(LOGIN) is Standing.PROVEN
    assert case.standing("own:299") is Standing.PROVEN
    assert case.standing("own:0") is Standing.UNKNOWN
    [path] = case.root.rglob("*~.json")
    assert path.stat().st_size < 30_000


@pytest.mark.parametrize(
    "content", ["", "[]", f'{{"key":["access","{KEY}"],"value":{{"own:0123":"yes","public":null}}}}']
)
def test_damaged_records_prove_nothing(case: Case, content: str) -> None:
    case.prove(OWN)
    case.prove(PUBLIC)
    [path] = case.root.rglob("*~.json")
    path.write_text(content)
    case.restart()
    assert case.standing(OWN) is Standing.UNKNOWN


def test_nothing_can_be_written(case: Case, logged: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it is remembered as long as the daemon runs."""

    def fail(*args: object, **more: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("dockerproxy.store.files.Staging.write", fail)
    case.prove(OWN)
    assert case.standing(OWN) is Standing.PROVEN
    assert any("not remembered: No space left" in line for line in logged)
    case.restart()
    assert case.standing(OWN) is Standing.UNKNOWN
