"""Signal handlers beyond Twisted's: a repeated stop signal, SIGHUP and SIGUSR2."""

from __future__ import annotations

import json
import signal
from collections.abc import Awaitable, Callable
from typing import Any

from twisted.application.service import Service
from twisted.internet.interfaces import IReactorFromThreads
from twisted.logger import Logger

from dockerproxy.concurrency import spawn

log = Logger()


def on_repeated_stop(reactor: IReactorFromThreads, callback: Callable[[], None]) -> None:
    """Run `callback` in the reactor thread at every further SIGINT or SIGTERM.

    This replaces Twisted's handler, which would stop the stopping reactor again and log a traceback.
    """

    def handler(*_: object) -> None:
        reactor.callFromThread(callback)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, handler)


def on_hangup(reactor: IReactorFromThreads, callback: Callable[[], None]) -> None:
    """Run `callback` in the reactor thread at every SIGHUP, the signal to reload the settings."""
    signal.signal(signal.SIGHUP, lambda *_: reactor.callFromThread(callback))


class DebugSignalService(Service):
    """Logs `report` at every SIGUSR2, as JSON: for a daemon whose control socket does not answer."""

    def __init__(self, reactor: IReactorFromThreads, report: Callable[[], Awaitable[dict[str, Any]]]) -> None:
        self._reactor = reactor
        self._report = report

    def startService(self) -> None:
        super().startService()  # type: ignore[no-untyped-call]
        signal.signal(signal.SIGUSR2, lambda *_: self._reactor.callFromThread(self._log))

    def _log(self) -> None:
        spawn(self._log_report(), "reporting what the daemon is doing")

    async def _log_report(self) -> None:
        log.info("{report}", report=json.dumps(await self._report()))
