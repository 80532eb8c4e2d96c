"""Signal handlers beyond Twisted's: a repeated stop signal, and SIGHUP."""

from __future__ import annotations

import signal
from collections.abc import Callable

from twisted.internet.interfaces import IReactorFromThreads


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
