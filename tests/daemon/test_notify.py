"""What systemd is told, received by sockets as systemd has them."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.testing import MemoryReactorClock

from dockerproxy.daemon.notify import Notifier, Supervised, watchdog_interval


class Systemd:
    """The socket of $NOTIFY_SOCKET: a path, or an abstract one."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address.replace("@", "\0", 1) if address.startswith("@") else address)
        self.socket.setblocking(False)

    def received(self) -> list[str]:
        """Return the messages since the last call."""
        messages = []
        while True:
            try:
                messages.append(self.socket.recv(65536).decode())
            except BlockingIOError:
                return messages


@pytest.fixture(params=["path", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Systemd]:
    made = Systemd(str(tmp_path / "notify") if request.param == "path" else f"@{secrets.token_hex(8)}")
    yield made
    made.socket.close()


def test_messages(systemd: Systemd) -> None:
    notifier = Notifier(systemd.address)
    notifier.ready("serving all")
    notifier.ready()
    notifier.alive()
    notifier.failed("X: 'a' is not a time.")
    notifier.stopping()
    assert systemd.received() == [
        "READY=1\nSTATUS=serving all",
        "READY=1",
        "WATCHDOG=1",
        "STATUS=X: 'a' is not a time.",
        "STOPPING=1\nSTATUS=letting transfers finish",
    ]


def test_a_reload_has_the_time(systemd: Systemd) -> None:
    """systemd ignores a message of a reload that is older than its request for one."""
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    Notifier(systemd.address).reloading()
    [message] = systemd.received()
    reloading, _, since = message.partition("\nMONOTONIC_USEC=")
    assert reloading == "RELOADING=1"
    assert before <= int(since) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000


def test_a_status_cannot_smuggle_in_another_message(systemd: Systemd) -> None:
    Notifier(systemd.address).failed("no such file: a\nREADY=1\r\nMAINPID=1")
    assert systemd.received() == ["STATUS=no such file: a READY=1 MAINPID=1"]


def test_text_that_is_not_utf_8(systemd: Systemd) -> None:
    Notifier(systemd.address).failed("\udcff.")
    assert systemd.received() == ["STATUS=?."]


def test_without_systemd_nothing_is_said() -> None:
    Notifier("").ready("serving all")


@pytest.mark.parametrize("address", ["/nowhere/notify", "@nobody-listens-here", "vsock:2:1234", "x" * 200])
def test_who_does_not_listen_does_no_harm(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("dockerproxy.daemon.notify.log.warn", lambda form, message, why: told.append(message))
    Notifier(address).ready("serving all")
    assert told == ["READY=1"]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "60000000"}, 30),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "42"}, 30),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "43"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "-5"}, None),
        ({"WATCHDOG_USEC": "٣"}, None),
    ],
)
def test_how_often_the_watchdog_is_fed(environment: dict[str, str], expected: float | None) -> None:
    assert watchdog_interval(environment, 42) == expected


class Reactor(MemoryReactorClock):
    def callFromThread(self, function: Callable[[], None]) -> None:
        self.callLater(0, function)


class Scene:
    def __init__(self, systemd: Systemd) -> None:
        self.reactor = Reactor()
        self.opened: Deferred[None] = Deferred()
        self.reloads = 0
        self.supervised = Supervised(self.reactor, Notifier(systemd.address), self.opened, "serving all", self.reload)

    def reload(self) -> None:
        self.reloads += 1


@pytest.fixture
def scene(systemd: Systemd, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("WATCHDOG_USEC", "4000000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    before = signal.getsignal(signal.SIGHUP)
    yield Scene(systemd)
    signal.signal(signal.SIGHUP, before)


def test_ready_when_the_doors_are_open_and_the_reactor_runs(scene: Scene, systemd: Systemd) -> None:
    scene.supervised.startService()
    assert systemd.received() == ["WATCHDOG=1"]
    scene.opened.callback(None)
    assert systemd.received() == []
    scene.reactor.run()
    assert systemd.received() == ["READY=1\nSTATUS=serving all"]


def test_the_watchdog_is_fed_until_the_end(scene: Scene, systemd: Systemd) -> None:
    scene.supervised.startService()
    assert systemd.received() == ["WATCHDOG=1"]
    scene.reactor.advance(1.9)
    assert systemd.received() == []
    scene.reactor.advance(0.1)
    assert systemd.received() == ["WATCHDOG=1"]
    scene.supervised.stopService()
    assert systemd.received() == ["STOPPING=1\nSTATUS=letting transfers finish"]
    scene.reactor.advance(10)
    assert systemd.received() == []
    assert scene.reactor.getDelayedCalls() == []


def test_without_a_watchdog_none_is_fed(scene: Scene, systemd: Systemd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WATCHDOG_USEC")
    scene.supervised.startService()
    scene.reactor.advance(100)
    scene.supervised.stopService()
    assert systemd.received() == ["STOPPING=1\nSTATUS=letting transfers finish"]


def test_sighup_reloads(scene: Scene) -> None:
    scene.supervised.startService()
    os.kill(os.getpid(), signal.SIGHUP)
    scene.reactor.advance(0)
    os.kill(os.getpid(), signal.SIGHUP)
    scene.reactor.advance(0)
    assert scene.reloads == 2
    scene.supervised.stopService()
