"""The fork server: a copy of the first process as it was before it served anybody, of which workers are copies.

A worker that begins as a copy has its modules already, and shares the memory they are in; and it has the same CA with
the same keys for TLS session tickets. It is not copied from the first process when it is wanted, for that has threads
and clients then. Here nothing happens but this: it waits for an order, makes a copy, and tells of the ends of those.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn

from attrs import field, frozen
from twisted.application.service import Service
from twisted.logger import Logger

from dockerproxy.workers.line import LONGEST, Line, pair, refuse
from dockerproxy.workers.relay import stop_logging

# A terminal's signals go to all processes, as systemd's SIGTERM does; it is the first one that knows what to do.
_FOR_THE_FIRST = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

log = Logger()


@frozen
class Order:
    """What a worker is to be: its `number`, and the settings that have `changed` since the start.

    `line` is its line to the first process. Its log goes into that of the first process by the pipe `output`, or to the
    standard output that it has.
    """

    number: int
    changed: Mapping[str, str] = field(repr=False)
    line: int
    output: int | None


class ForkServer(Service):
    """The fork server, as the first process has it, and this as a service: to be the first, when nothing is open.

    `run` is what a worker does, in a process of its own that ends when it returns. A copy `writes` to the log that the
    first process has, or its log has no observers when it begins.
    """

    def __init__(self, reactor: Any, run: Callable[[Order], object], *, writes: bool) -> None:
        self._reactor = reactor
        self._run = run
        self._writes = writes
        self._pid = 0
        self._line: Line | None = None
        self.started: Callable[[int, int], None]
        """Called with the number of a worker, and its process's."""
        self.ended: Callable[[int, str], None]
        """Called with the number of a worker that ended, or could not be started, and why."""
        self.lost: Callable[[], None]
        """Called when there is no fork server any more."""

    @property
    def alive(self) -> bool:
        """Whether workers can be started, and their ends are told."""
        return self._line is not None and self._line.connected

    def startService(self) -> None:
        super().startService()  # type: ignore[no-untyped-call]
        assert threading.active_count() == 1  # or a copy would have locks that nobody opens
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        gc.collect()
        gc.freeze()  # what a copy does not look through stays shared
        ours, theirs = pair()
        self._pid = os.fork()
        if not self._pid:
            _kept = [] if self._writes else stop_logging()  # see `_close_all_but`
            _end_after(partial(serve, theirs, self._run))
        theirs.close()
        self._line = Line(self._reactor, ours, self._received, refuse, self._lost)

    def start(self, number: int, changed: Mapping[str, str], line: int, output: int | None) -> bool:
        """Have a worker started (see `Order`), and say whether that could be asked for."""
        order = json.dumps([number, changed], separators=(",", ":")).encode()
        descriptors = [line] if output is None else [line, output]
        return self._line is not None and self._line.pass_on(order, *descriptors)

    def close(self) -> None:
        """Have the fork server end. Workers stay, and their ends are no longer told."""
        if self._line is not None:
            self._line.close()

    def _received(self, message: Any) -> None:
        what, number, detail = message
        (self.started if what == "started" else self.ended)(number, detail)

    def _lost(self) -> None:
        with suppress(ChildProcessError):
            os.waitpid(self._pid, os.WNOHANG)
        self.lost()


def serve(line: socket.socket, run: Callable[[Order], object]) -> None:
    """Be the fork server, at the other end of `line`, until that is closed."""
    for each in _FOR_THE_FIRST:
        signal.signal(each, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _close_all_but(line.fileno())
    call_this_process("fork server")
    workers: dict[int, tuple[int, int]] = {}  # a process's descriptor: its number as a worker, and the kernel's
    poll = select.poll()
    poll.register(line, select.POLLIN)
    while True:
        for descriptor, _ in poll.poll():
            if descriptor != line.fileno():
                number, pid = workers.pop(descriptor)
                poll.unregister(descriptor)
                os.close(descriptor)
                _tell(line, "ended", number, _cause(os.waitpid(pid, 0)[1]))
                continue
            order = _next_order(line)
            if order is None:
                return
            try:
                pid = _start(order, run)
            except OSError as error:  # no memory, or no more processes
                _tell(line, "ended", order.number, str(error))
                continue
            descriptor = os.pidfd_open(pid)
            workers[descriptor] = order.number, pid
            poll.register(descriptor, select.POLLIN)
            _tell(line, "started", order.number, pid)


def call_this_process(name: str) -> None:
    """Give this process a name of up to 15 bytes, which programs like top show."""
    with suppress(OSError), open("/proc/self/comm", "w") as file:
        file.write(name)


def _start(order: Order, run: Callable[[Order], object]) -> int:
    try:
        pid = os.fork()
        if not pid:
            _end_after(partial(_be_worker, order, run))
        return pid
    finally:
        for one in filter(None, (order.line, order.output)):
            os.close(one)


def _be_worker(order: Order, run: Callable[[Order], object]) -> None:
    _close_all_but(order.line, *([] if order.output is None else [order.output]))
    if order.output is not None:
        os.dup2(order.output, 1)
        os.dup2(order.output, 2)
        os.close(order.output)
    call_this_process(f"worker {order.number}")
    run(order)


def _next_order(line: socket.socket) -> Order | None:
    try:
        data, descriptors, _, _ = socket.recv_fds(line, LONGEST, 2)
    except ConnectionError:  # it was closed before all that was told here had been read
        return None
    if not data:
        return None
    number, changed = json.loads(data)
    return Order(number, changed, descriptors[0], descriptors[1] if len(descriptors) > 1 else None)


def _tell(line: socket.socket, what: str, number: int, detail: int | str) -> None:
    with suppress(OSError):  # the first process is gone, which is found by reading
        line.send(b"{" + json.dumps([what, number, detail]).encode())


def _cause(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"exit status {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


def _end_after(run: Callable[[], object]) -> NoReturn:
    """Do `run`, and end, without anything of what this process was to do when it was another's copy."""
    status = 1
    try:
        run()
        status = 0
    except SystemExit:  # what is wrong has been said
        pass
    except BaseException:
        log.failure("process {pid} failed", pid=os.getpid())
    finally:
        with suppress(Exception):
            sys.stdout.flush()
        os._exit(status)


def _close_all_but(*kept: int) -> None:
    """Close what this process has open beside its standard streams and `kept`.

    The objects that had these numbers must not be freed: they would close what others have under these numbers then.
    They are referred to from the frames that called this, which are never left.
    """
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) not in kept:
            with suppress(OSError):  # that of the list itself
                os.close(int(name))
