"""Signals that Twisted does not handle, or not as wanted: a second one to stop, and the one to reload."""

from __future__ import annotations

import signal
from collections.abc import Callable

from twisted.internet.interfaces import IReactorFromThreads


def on_repeated_stop(reactor: IReactorFromThreads, callback: Callable[[], None]) -> None:
    """Have the stopping `reactor` call `call` at every further SIGINT and SIGTERM.

    Twisted's own handler would try to stop what is stopping already, and log a traceback of that.
    """

    def handler(*_: object) -> None:
        reactor.callFromThread(callback)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, handler)


def on_hangup(reactor: IReactorFromThreads, callback: Callable[[], None]) -> None:
    """Have the reactor call `call` at every SIGHUP, by which a daemon is told to read its settings again."""
    signal.signal(signal.SIGHUP, lambda *_: reactor.callFromThread(callback))
