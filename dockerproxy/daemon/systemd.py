"""Integration with systemd: readiness, reload, status text and watchdog through sd_notify(3)."""

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

_SEND_TIMEOUT = 1.0  # seconds to wait if the queue of systemd's socket is full

log = Logger()


class Notifier:
    """Sends sd_notify(3) messages to the socket `address` ($NOTIFY_SOCKET). If it is empty, sends nothing."""

    def __init__(self, address: str) -> None:
        # A leading @ stands for the NUL byte of an abstract socket address (unix(7)).
        self._address = "\0" + address[1:] if address.startswith("@") else address

    def ready(self, status: str = "") -> None:
        """Report that start-up, or a reload, has finished, with an optional `status` text."""
        self._send("READY=1", status)

    def reloading(self) -> None:
        """Report that a reload has begun. Call `ready` when it has finished."""
        # systemd compares this with the time of its own request, and ignores an older message.
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self) -> None:
        """Report that the daemon is shutting down."""
        self._send("STOPPING=1", "letting transfers finish")

    def watchdog(self) -> None:
        """Send the watchdog keep-alive."""
        self._send("WATCHDOG=1")

    def status(self, text: str) -> None:
        """Set the status text that `systemctl status` shows."""
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
                "cannot notify systemd of {message}: {reason}",
                message=assignments.partition("\n")[0],
                reason=str(error),
            )


def watchdog_interval(environment: Mapping[str, str], pid: int) -> float | None:
    """Return the seconds between keep-alives, half the timeout, or None without a watchdog (sd_watchdog_enabled(3))."""
    timeout_usec = environment.get("WATCHDOG_USEC", "")
    applies = environment.get("WATCHDOG_PID", str(pid)) == str(pid)
    return (
        int(timeout_usec) / 2_000_000
        if applies and timeout_usec.isascii() and timeout_usec.isdigit() and int(timeout_usec)
        else None
    )


class SystemdService(Service):
    """Reports the daemon's state to systemd, and calls `reload` at SIGHUP.

    Add it as the last service: services stop in reverse order, and STOPPING=1 must be sent before the others stop. It
    reports readiness, with the text `status`, when `listening` has fired and the reactor runs. A reactor timer sends
    the keep-alives, so a hung reactor misses them and systemd restarts the daemon.
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
