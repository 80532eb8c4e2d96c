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

from dockerproxy.workers.log_relay import remove_log_observers
from dockerproxy.workers.message_socket import MAX_MESSAGE_SIZE, MessageSocket, reject_descriptor, socketpair

# A terminal's signals go to all processes, as systemd's SIGTERM does; it is the first one that knows what to do.
_MAIN_PROCESS_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

log = Logger()


@frozen
class SpawnRequest:
    """What a worker is to be: its `number`, and the settings that have `changed` since the start.

    `line` is its line to the first process. Its log goes into that of the first process by the pipe `output`, or to the
    standard output that it has.
    """

    number: int
    changed_settings: Mapping[str, str] = field(repr=False)
    socket_fd: int
    log_fd: int | None


class ForkServer(Service):
    """The fork server, as the first process has it, and this as a service: to be the first, when nothing is open.

    `run` is what a worker does, in a process of its own that ends when it returns. A copy `writes` to the log that the
    first process has, or its log has no observers when it begins.
    """

    def __init__(self, reactor: Any, run: Callable[[SpawnRequest], object], *, keep_log_observers: bool) -> None:
        self._reactor = reactor
        self._run = run
        self._keep_log_observers = keep_log_observers
        self._pid = 0
        self._message_socket: MessageSocket | None = None
        self.on_started: Callable[[int, int], None]
        """Called with the number of a worker, and its process's."""
        self.on_exited: Callable[[int, str], None]
        """Called with the number of a worker that ended, or could not be started, and why."""
        self.on_lost: Callable[[], None]
        """Called when there is no fork server any more."""

    @property
    def alive(self) -> bool:
        """Whether workers can be started, and their ends are told."""
        return self._message_socket is not None and self._message_socket.connected

    def startService(self) -> None:
        super().startService()  # type: ignore[no-untyped-call]
        assert threading.active_count() == 1  # or a copy would have locks that nobody opens
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        gc.collect()
        gc.freeze()  # what a copy does not look through stays shared
        parent_socket, child_socket = socketpair()
        self._pid = os.fork()
        if not self._pid:
            _removed_observers = [] if self._keep_log_observers else remove_log_observers()  # see `_close_all_but`
            _run_and_exit(partial(run_fork_server, child_socket, self._run))
        child_socket.close()
        self._message_socket = MessageSocket(
            self._reactor, parent_socket, self._on_message, reject_descriptor, self._on_closed
        )

    def start(self, number: int, changed_settings: Mapping[str, str], socket_fd: int, log_fd: int | None) -> bool:
        """Have a worker started (see `Order`), and say whether that could be asked for."""
        request = json.dumps([number, changed_settings], separators=(",", ":")).encode()
        descriptors = [socket_fd] if log_fd is None else [socket_fd, log_fd]
        return self._message_socket is not None and self._message_socket.send_descriptors(request, *descriptors)

    def close(self) -> None:
        """Have the fork server end. Workers stay, and their ends are no longer told."""
        if self._message_socket is not None:
            self._message_socket.close()

    def _on_message(self, message: Any) -> None:
        event, number, detail = message
        (self.on_started if event == "started" else self.on_exited)(number, detail)

    def _on_closed(self) -> None:
        with suppress(ChildProcessError):
            os.waitpid(self._pid, os.WNOHANG)
        self.on_lost()


def run_fork_server(sock: socket.socket, run: Callable[[SpawnRequest], object]) -> None:
    """Be the fork server, at the other end of `line`, until that is closed."""
    for signal_number in _MAIN_PROCESS_SIGNALS:
        signal.signal(signal_number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _close_other_descriptors(sock.fileno())
    set_process_name("fork server")
    workers: dict[int, tuple[int, int]] = {}  # a process's descriptor: its number as a worker, and the kernel's
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    while True:
        for descriptor, _ in poll.poll():
            if descriptor != sock.fileno():
                number, pid = workers.pop(descriptor)
                poll.unregister(descriptor)
                os.close(descriptor)
                _notify(sock, "exited", number, _exit_reason(os.waitpid(pid, 0)[1]))
                continue
            request = _receive_request(sock)
            if request is None:
                return
            try:
                pid = _fork_worker(request, run)
            except OSError as error:  # no memory, or no more processes
                _notify(sock, "exited", request.number, str(error))
                continue
            descriptor = os.pidfd_open(pid)
            workers[descriptor] = request.number, pid
            poll.register(descriptor, select.POLLIN)
            _notify(sock, "started", request.number, pid)


def set_process_name(name: str) -> None:
    """Give this process a name of up to 15 bytes, which programs like top show."""
    with suppress(OSError), open("/proc/self/comm", "w") as file:
        file.write(name)


def _fork_worker(request: SpawnRequest, run: Callable[[SpawnRequest], object]) -> int:
    try:
        pid = os.fork()
        if not pid:
            _run_and_exit(partial(_run_worker, request, run))
        return pid
    finally:
        for descriptor in filter(None, (request.socket_fd, request.log_fd)):
            os.close(descriptor)


def _run_worker(request: SpawnRequest, run: Callable[[SpawnRequest], object]) -> None:
    _close_other_descriptors(request.socket_fd, *([] if request.log_fd is None else [request.log_fd]))
    if request.log_fd is not None:
        os.dup2(request.log_fd, 1)
        os.dup2(request.log_fd, 2)
        os.close(request.log_fd)
    set_process_name(f"worker {request.number}")
    run(request)


def _receive_request(sock: socket.socket) -> SpawnRequest | None:
    try:
        data, descriptors, _, _ = socket.recv_fds(sock, MAX_MESSAGE_SIZE, 2)
    except ConnectionError:  # it was closed before all that was told here had been read
        return None
    if not data:
        return None
    number, changed_settings = json.loads(data)
    return SpawnRequest(number, changed_settings, descriptors[0], descriptors[1] if len(descriptors) > 1 else None)


def _notify(sock: socket.socket, event: str, number: int, detail: int | str) -> None:
    with suppress(OSError):  # the first process is gone, which is found by reading
        sock.send(b"{" + json.dumps([event, number, detail]).encode())


def _exit_reason(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"exit status {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


def _run_and_exit(run: Callable[[], object]) -> NoReturn:
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


def _close_other_descriptors(*keep: int) -> None:
    """Close what this process has open beside its standard streams and `kept`.

    The objects that had these numbers must not be freed: they would close what others have under these numbers then.
    They are referred to from the frames that called this, which are never left.
    """
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) not in keep:
            with suppress(OSError):  # that of the list itself
                os.close(int(name))
