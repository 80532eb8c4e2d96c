"""What systemd is told of the daemon: that it is ready, alive, reloading, stopping; and in a few words, how it is."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from twisted.application.service import Service
from twisted.internet.defer import Deferred
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from dockerproxy.daemon.signals import on_hangup

_SEND_TIMEOUT = 1.0  # seconds that a message may wait for the service manager to read its older ones

log = Logger()


class Notifier:
    """Sends messages to the socket that systemd listens on, sd_notify(3); to an empty `address`, none."""

    def __init__(self, address: str) -> None:
        # A leading @ stands for the NUL that abstract sockets begin with (unix(7)).
        self._address = "\0" + address[1:] if address.startswith("@") else address

    def ready(self, status: str = "") -> None:
        """Say that the start, or a reload, is over; and with `status`, what came of it."""
        self._send("READY=1", status)

    def reloading(self) -> None:
        """Say that a reload has begun; `ready` has to follow."""
        # systemd takes only what is younger than its own request, by this clock.
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self) -> None:
        """Say that the daemon is about to end."""
        self._send("STOPPING=1", "letting transfers finish")

    def watchdog(self) -> None:
        """Feed the watchdog."""
        self._send("WATCHDOG=1")

    def status(self, text: str) -> None:
        """Say why the daemon ends: `systemctl status` shows it from then on."""
        self._send("", text)

    def _send(self, assignments: str, status: str = "") -> None:
        if not self._address:
            return
        if status:
            assignments = f"{assignments}\nSTATUS={' '.join(status.split())}".lstrip()
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.settimeout(_SEND_TIMEOUT)
                sender.sendto(assignments.encode("utf-8", "replace"), self._address)
        except OSError as error:
            log.warn(
                "systemd cannot be told {message}: {reason}", message=assignments.partition("\n")[0], reason=str(error)
            )


def watchdog_interval(environment: Mapping[str, str], pid: int) -> float | None:
    """Return how often the watchdog wants to be fed, in seconds; None where there is none (sd_watchdog_enabled(3))."""
    timeout_usec = environment.get("WATCHDOG_USEC", "")
    applies = environment.get("WATCHDOG_PID", str(pid)) == str(pid)
    return (
        int(timeout_usec) / 2_000_000
        if applies and timeout_usec.isascii() and timeout_usec.isdigit() and int(timeout_usec)
        else None
    )


class SystemdService(Service):
    """Keeps systemd informed, and does as it says: SIGHUP is for `reload`.

    To be the last of the services: it is the first to stop then. The daemon is ready, and says `status`, when `opened`
    has fired and the reactor runs. The watchdog is fed by the reactor: one that hangs lets it starve.
    """

    def __init__(
        self, reactor: Any, notifier: Notifier, listening: Deferred[None], status: str, reload: Callable[[], None]
    ) -> None:
        self._reactor = reactor
        self._notifier = notifier
        self._listening = listening
        self._status = status
        self._reload = reload
        self._watchdog_loop = LoopingCall(notifier.watchdog)
        self._watchdog_loop.clock = reactor

    def startService(self) -> None:
        super().startService()  # type: ignore[no-untyped-call]
        on_hangup(self._reactor, self._reload)
        self._listening.addCallback(lambda _: self._reactor.callWhenRunning(self._notifier.ready, self._status))
        interval = watchdog_interval(os.environ, os.getpid())
        if interval is not None:
            self._watchdog_loop.start(interval)

    def stopService(self) -> None:
        super().stopService()  # type: ignore[no-untyped-call]
        self._notifier.stopping()
        if self._watchdog_loop.running:
            self._watchdog_loop.stop()
