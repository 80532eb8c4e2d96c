"""Notifications to systemd, received by sockets like systemd's."""

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

from dockerproxy.daemon.systemd import Notifier, SystemdService, watchdog_interval


class NotifySocket:
    """The socket of $NOTIFY_SOCKET, at a path or an abstract address."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address.replace("@", "\0", 1) if address.startswith("@") else address)
        self.socket.setblocking(False)

    def receive_all(self) -> list[str]:
        """Return the messages since the last call."""
        messages = []
        while True:
            try:
                messages.append(self.socket.recv(65536).decode())
            except BlockingIOError:
                return messages


@pytest.fixture(params=["path", "abstract"])
def notify_socket(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[NotifySocket]:
    notify_socket = NotifySocket(str(tmp_path / "notify") if request.param == "path" else f"@{secrets.token_hex(8)}")
    yield notify_socket
    notify_socket.socket.close()


def test_each_message_has_systemds_form(notify_socket: NotifySocket) -> None:
    notifier = Notifier(notify_socket.address)
    notifier.ready("serving all")
    notifier.ready()
    notifier.watchdog()
    notifier.status("X: 'a' is not a time.")
    notifier.stopping()
    assert notify_socket.receive_all() == [
        "READY=1\nSTATUS=serving all",
        "READY=1",
        "WATCHDOG=1",
        "STATUS=X: 'a' is not a time.",
        "STOPPING=1\nSTATUS=letting transfers finish",
    ]


def test_a_reload_message_has_a_timestamp(notify_socket: NotifySocket) -> None:
    """systemd ignores a RELOADING=1 with a timestamp older than its own reload request."""
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    Notifier(notify_socket.address).reloading()
    [message] = notify_socket.receive_all()
    reloading, _, since = message.partition("\nMONOTONIC_USEC=")
    assert reloading == "RELOADING=1"
    assert before <= int(since) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000


def test_a_status_cannot_inject_another_message(notify_socket: NotifySocket) -> None:
    Notifier(notify_socket.address).status("no such file: a\nREADY=1\r\nMAINPID=1")
    assert notify_socket.receive_all() == ["STATUS=no such file: a READY=1 MAINPID=1"]


def test_text_that_is_not_utf_8_is_replaced(notify_socket: NotifySocket) -> None:
    Notifier(notify_socket.address).status("\udcff.")
    assert notify_socket.receive_all() == ["STATUS=?."]


def test_without_systemd_nothing_is_sent() -> None:
    Notifier("").ready("serving all")


@pytest.mark.parametrize("address", ["/nowhere/notify", "@nobody-listens-here", "vsock:2:1234", "x" * 200])
def test_send_errors_are_logged(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    monkeypatch.setattr("dockerproxy.daemon.systemd.log.warn", lambda form, message, reason: messages.append(message))
    Notifier(address).ready("serving all")
    assert messages == ["READY=1"]


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
def test_the_watchdog_interval_is_half_the_timeout(environment: dict[str, str], expected: float | None) -> None:
    assert watchdog_interval(environment, 42) == expected


class ThreadCallReactor(MemoryReactorClock):
    def callFromThread(self, function: Callable[[], None]) -> None:
        self.callLater(0, function)


class SystemdServiceHarness:
    def __init__(self, notify_socket: NotifySocket) -> None:
        self.reactor = ThreadCallReactor()
        self.listening: Deferred[None] = Deferred()
        self.reloads = 0
        self.service = SystemdService(
            self.reactor, Notifier(notify_socket.address), self.listening, "serving all", self.reload
        )

    def reload(self) -> None:
        self.reloads += 1


@pytest.fixture
def harness(notify_socket: NotifySocket, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("WATCHDOG_USEC", "4000000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    before = signal.getsignal(signal.SIGHUP)
    yield SystemdServiceHarness(notify_socket)
    signal.signal(signal.SIGHUP, before)


def test_readiness_is_reported_once_listening_and_running(
    harness: SystemdServiceHarness, notify_socket: NotifySocket
) -> None:
    harness.service.startService()
    assert notify_socket.receive_all() == ["WATCHDOG=1"]
    harness.listening.callback(None)
    assert notify_socket.receive_all() == []
    harness.reactor.run()
    assert notify_socket.receive_all() == ["READY=1\nSTATUS=serving all"]


def test_the_watchdog_is_fed_until_stop(harness: SystemdServiceHarness, notify_socket: NotifySocket) -> None:
    harness.service.startService()
    assert notify_socket.receive_all() == ["WATCHDOG=1"]
    harness.reactor.advance(1.9)
    assert notify_socket.receive_all() == []
    harness.reactor.advance(0.1)
    assert notify_socket.receive_all() == ["WATCHDOG=1"]
    harness.service.stopService()
    assert notify_socket.receive_all() == ["STOPPING=1\nSTATUS=letting transfers finish"]
    harness.reactor.advance(10)
    assert notify_socket.receive_all() == []
    assert harness.reactor.getDelayedCalls() == []


def test_without_a_watchdog_no_keepalives_are_sent(
    harness: SystemdServiceHarness, notify_socket: NotifySocket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WATCHDOG_USEC")
    harness.service.startService()
    harness.reactor.advance(100)
    harness.service.stopService()
    assert notify_socket.receive_all() == ["STOPPING=1\nSTATUS=letting transfers finish"]


def test_sighup_reloads(harness: SystemdServiceHarness) -> None:
    harness.service.startService()
    os.kill(os.getpid(), signal.SIGHUP)
    harness.reactor.advance(0)
    os.kill(os.getpid(), signal.SIGHUP)
    harness.reactor.advance(0)
    assert harness.reloads == 2
    harness.service.stopService()
