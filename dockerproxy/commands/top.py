"""The command `top`: the downloads under way and the traffic, once a second.

On a terminal it is a screen; `q` ends it, and `s` changes the order. Elsewhere it is a JSON object a second.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import Empty, Full, Queue
from typing import Any, NoReturn

from dockerproxy.commands.live_view import SORTS, LiveView
from dockerproxy.control_client import DISCONNECTED, FAILED, CommandError, ControlClient, Event
from dockerproxy.terminal import Terminal, print_line

_INTERVAL = 1.0  # seconds between two screens or lines
_OVERVIEW_INTERVAL = 10.0  # seconds between two questions about the registries
_MAX_WAITING = 100  # events that wait for this process; then the daemon waits, and drops the view in the end
_TERMINATED = 128 + signal.SIGTERM


def top(client: ControlClient, options: argparse.Namespace, terminal: Terminal) -> int:
    """Show the overview until the user ends it, or `options.count` times."""
    source = _Source(client)
    try:
        if terminal.as_json or not sys.stdout.isatty():
            _print_lines(source, options.count)
        else:
            _show_screen(source, options.count)
    except KeyboardInterrupt:
        return 0  # nothing was changed
    finally:
        source.stop()
    return 0


def _print_lines(source: _Source, count: int | None) -> None:
    view = LiveView()
    source.start(with_overview=False)
    source.wait_for_event(view)
    due = time.monotonic()
    while True:
        print_line(json.dumps({"now": time.time(), **view.snapshot()}))
        sys.stdout.flush()
        if count is not None and (count := count - 1) == 0:
            return
        due = max(due + _INTERVAL, time.monotonic())
        while (left := due - time.monotonic()) > 0:
            source.read(view, left)


def _show_screen(source: _Source, count: int | None) -> None:
    from rich.console import Console
    from rich.live import Live

    from dockerproxy.commands.live_screen import render

    view, sort = LiveView(), SORTS[0]
    console = Console(highlight=False)
    source.start(with_overview=True)
    source.wait_for_event(view)
    with _keyboard() as read_key, _ends_on_sigterm(), Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(render(view, sort, console.width, console.height), refresh=True)
            if count is not None and (count := count - 1) == 0:
                return
            due = time.monotonic() + _INTERVAL
            while (left := due - time.monotonic()) > 0:
                key = read_key(min(left, 0.1))
                if key == "q":
                    return
                if key == "s":
                    sort = SORTS[(SORTS.index(sort) + 1) % len(SORTS)]
                    break
                source.read(view, 0)


class _Source:
    """Reads events and the overview in threads, so that a daemon that hangs does not keep the user from leaving."""

    def __init__(self, client: ControlClient) -> None:
        self._client = client
        self._news: Queue[Callable[[LiveView], None]] = Queue(_MAX_WAITING)
        self._stopped = threading.Event()

    def start(self, *, with_overview: bool) -> None:
        """Begin to read. The threads do not keep the process from its end."""
        for read in (self._read_events, self._read_overview) if with_overview else (self._read_events,):
            threading.Thread(target=self._report_errors, args=(read,), daemon=True).start()

    def stop(self) -> None:
        """Read no more."""
        self._stopped.set()

    def wait_for_event(self, view: LiveView) -> None:
        """Wait until the daemon has sent something. Raise `CommandError`."""
        while not view.is_complete:
            self.read(view, _INTERVAL)

    def read(self, view: LiveView, timeout: float) -> None:
        """Apply the news that have come, or the first that comes within `timeout` seconds. Raise `CommandError`."""
        with suppress(Empty):
            self._news.get(timeout > 0, timeout or None)(view)
            while True:
                self._news.get_nowait()(view)

    def _read_events(self) -> None:
        for event in self._client.stream_events("GET", "/v1/live"):
            self._add(_applying(LiveView.apply, event))
        raise CommandError(FAILED, DISCONNECTED)

    def _read_overview(self) -> None:
        while not self._stopped.is_set():
            self._add(_applying(LiveView.set_overview, self._client.call("GET", "/v1/overview?range=24h", None)))
            self._stopped.wait(_OVERVIEW_INTERVAL)

    def _report_errors(self, read: Callable[[], None]) -> None:
        try:
            read()
        except CommandError as error:
            self._add(_raising(error))

    def _add(self, news: Callable[[LiveView], None]) -> None:
        while not self._stopped.is_set():
            with suppress(Full):
                self._news.put(news, timeout=_INTERVAL)
                return


def _applying(method: Callable[[LiveView, Event], None], event: Event) -> Callable[[LiveView], None]:
    return lambda view: method(view, event)


def _raising(error: CommandError) -> Callable[[LiveView], None]:
    def fail(view: LiveView) -> NoReturn:
        raise error

    return fail


@contextmanager
def _keyboard() -> Iterator[Callable[[float], str]]:
    """Return a function that waits for a key for some seconds, and returns it, or `""`."""
    if sys.stdin is None or not sys.stdin.isatty():
        yield _no_key
        return
    descriptor = sys.stdin.fileno()

    def read_key(timeout: float) -> str:
        ready, _, _ = select.select([descriptor], [], [], timeout)
        return os.read(descriptor, 1).decode("latin-1") if ready else ""

    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor)
    try:
        yield read_key
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _no_key(timeout: float) -> str:
    time.sleep(timeout)
    return ""


@contextmanager
def _ends_on_sigterm() -> Iterator[None]:
    """Give the terminal back before this process ends because of the signal."""

    def end(number: int, frame: Any) -> NoReturn:
        raise SystemExit(_TERMINATED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
