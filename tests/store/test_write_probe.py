"""Probes that write to a store: their results, and how many of them run while a file system hangs."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from dockerproxy.errors import ServiceOverloaded
from dockerproxy.store.layout import Layout
from dockerproxy.store.write_probe import ANSWER_TIMEOUT, RESULT_TTL, ProbeResult, StoreState, probe_directory

WRITABLE = ProbeResult(StoreState.WRITABLE)


class Disk:
    """A store, and a file system that hangs while `hangs` is true."""

    def __init__(self, root: Path) -> None:
        self.layout = Layout(root)
        os.makedirs(self.layout.staging)
        self.clock = Clock()
        self.hangs = False
        self.waiting: list[tuple[Deferred[str], Callable[[], str]]] = []
        self.runs = 0
        self.error: OSError | None = None
        self.probe = probe_directory(self.clock, "CACHE_DIR", self.layout, self._run, self._check)

    async def _run(self, function: Callable[[], str]) -> str:
        self.runs += 1
        if not self.hangs:
            return function()
        work: Deferred[str] = Deferred()
        self.waiting.append((work, function))
        return await work

    def _check(self) -> None:
        if self.error is not None:
            raise self.error

    def wake_up(self) -> None:
        self.hangs = False
        for work, function in self.waiting:
            work.callback(function())

    def ask(self) -> list[ProbeResult]:
        """Start to ask. Return a list which gets the answer."""
        answers: list[Any] = []
        Deferred.fromCoroutine(self.probe.probe()).addBoth(answers.append)
        return answers


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path)


def test_a_writable_store_is_left_as_it_was(disk: Disk) -> None:
    assert disk.ask() == [WRITABLE]
    assert os.listdir(disk.layout.staging) == []


def test_a_store_that_cannot_be_written_says_why_without_its_path(disk: Disk) -> None:
    os.rmdir(disk.layout.staging)
    [result] = disk.ask()
    assert result.state is StoreState.FAILED
    assert result.sentence.startswith("CACHE_DIR cannot be written: No such file or directory; see")
    assert str(disk.layout.root) not in result.sentence
    os.mkdir(disk.layout.staging)
    disk.clock.advance(RESULT_TTL)
    assert disk.ask() == [WRITABLE]


@pytest.mark.parametrize(
    ("error", "start"),
    [
        (OSError(errno.ENOSPC, "3 MiB are free"), "CACHE_DIR is full: 3 MiB are free; free space"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "CACHE_DIR is full: Disk quota exceeded; "),
        (OSError(errno.EROFS, "Read-only file system"), "CACHE_DIR cannot be written: Read-only file system; "),
    ],
    ids=["space", "quota", "read-only"],
)
def test_what_the_store_may_not_use_counts_as_full(disk: Disk, error: OSError, start: str) -> None:
    disk.error = error
    [result] = disk.ask()
    assert (result.state, result.sentence.startswith(start)) == (StoreState.FAILED, True)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_file_that_cannot_be_written_to_its_end_is_removed(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk has room for the file's name, but not for its content."""
    real_open = os.open

    def open_full(path: str, flags: int, mode: int) -> int:
        os.close(real_open(path, flags, mode))
        return real_open("/dev/full", os.O_WRONLY)

    monkeypatch.setattr("dockerproxy.store.write_probe.os.open", open_full)
    [result] = disk.ask()
    assert result.sentence.startswith("CACHE_DIR is full: No space left on device")
    assert os.listdir(disk.layout.staging) == []


def test_those_who_ask_all_the_time_share_a_result(disk: Disk) -> None:
    for _ in range(100):
        assert disk.ask() == [WRITABLE]
    assert disk.runs == 1
    disk.clock.advance(RESULT_TTL)
    disk.ask()
    assert disk.runs == 2


def test_a_hanging_disk_is_answered_in_time_and_asked_once(disk: Disk) -> None:
    disk.hangs = True
    first = disk.ask()
    disk.clock.advance(ANSWER_TIMEOUT / 2)
    second = disk.ask()
    assert first == second == []
    disk.clock.advance(ANSWER_TIMEOUT / 2)
    for answers in (first, second, disk.ask(), disk.ask()):
        assert answers[0].state is StoreState.HANGS
        assert answers[0].sentence == "CACHE_DIR has not answered for 2 s; is its disk alive?"
    disk.clock.advance(3600)
    assert disk.ask()[0].state is StoreState.HANGS
    assert disk.runs == 1
    disk.wake_up()
    assert disk.ask() == [WRITABLE]
    assert disk.clock.getDelayedCalls() == []


def test_those_who_wait_get_the_result_of_the_write(disk: Disk) -> None:
    disk.hangs = True
    waiting = [disk.ask() for _ in range(3)]
    disk.wake_up()
    assert waiting == [[WRITABLE]] * 3
    assert disk.runs == 1


def test_one_who_gives_up_leaves_the_others(disk: Disk) -> None:
    disk.hangs = True
    asked = Deferred.fromCoroutine(disk.probe.probe())
    other = disk.ask()
    asked.addErrback(lambda failure: None)
    asked.cancel()
    disk.wake_up()
    assert other == [WRITABLE]


@pytest.mark.parametrize(
    ("error", "state"),
    [(ServiceOverloaded("all threads wait"), StoreState.HANGS), (ZeroDivisionError("bug"), StoreState.FAILED)],
    ids=["busy", "bug"],
)
def test_a_probe_that_cannot_run(disk: Disk, error: Exception, state: StoreState) -> None:
    async def run(function: Callable[[], str]) -> str:
        raise error

    probe = probe_directory(disk.clock, "REGISTRY_DIR", disk.layout, run)
    results: list[Any] = []
    Deferred.fromCoroutine(probe.probe()).addBoth(results.append)
    assert results[0].state is state
