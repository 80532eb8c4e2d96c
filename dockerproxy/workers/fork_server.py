"""The fork server: a copy of the main process from before it served clients, which forks the workers.

A forked worker has all modules loaded and shares their memory with the other processes. It also has the same CA and the
same TLS session ticket keys. The main process cannot fork workers itself once it runs, because it has threads and
connections by then. The fork server only waits for requests, forks a worker for each, and reports the exit of workers.
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

# The terminal and systemd send these signals to all processes. Only the main process handles them.
_MAIN_PROCESS_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

log = Logger()


@frozen
class SpawnRequest:
    """A request to start a worker.

    `changed_settings` are the variables that a reload has changed since the daemon started. `socket_fd` is the worker's
    end of the socket to the main process. `log_fd` is a pipe for its log, or None if it logs to its standard output.
    """

    number: int
    changed_settings: Mapping[str, str] = field(repr=False)
    socket_fd: int
    log_fd: int | None


class ForkServer(Service):
    """The main process's handle of the fork server. It must be the first service, because it forks when it starts.

    `run` is the worker's main function; the worker exits when it returns. If `keep_log_observers` is true, the fork
    server and the workers keep the log observers of the main process; otherwise they start without any.
    """

    def __init__(self, reactor: Any, run: Callable[[SpawnRequest], object], *, keep_log_observers: bool) -> None:
        self._reactor = reactor
        self._run = run
        self._keep_log_observers = keep_log_observers
        self._pid = 0
        self._message_socket: MessageSocket | None = None
        self.on_started: Callable[[int, int], None]
        """Called with the number and the process ID of a worker that started."""
        self.on_exited: Callable[[int, str], None]
        """Called with the number of a worker that exited or could not be started, and the reason."""
        self.on_lost: Callable[[], None]
        """Called when the fork server has exited."""

    @property
    def alive(self) -> bool:
        """Whether the fork server can start workers and report their exit."""
        return self._message_socket is not None and self._message_socket.connected

    def startService(self) -> None:
        super().startService()  # type: ignore[no-untyped-call]
        assert threading.active_count() == 1  # a lock that another thread holds would stay locked in the child
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        gc.collect()
        gc.freeze()  # the collector would write to the objects' headers, which copies their pages
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
        """Request a worker; see `SpawnRequest`. Return whether the request was sent."""
        request = json.dumps([number, changed_settings], separators=(",", ":")).encode()
        descriptors = [socket_fd] if log_fd is None else [socket_fd, log_fd]
        return self._message_socket is not None and self._message_socket.send_descriptors(request, *descriptors)

    def close(self) -> None:
        """Make the fork server exit. Its workers continue, but their exit is no longer reported."""
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
    """Run the fork server on its end of the socket pair, until the other end is closed."""
    for signal_number in _MAIN_PROCESS_SIGNALS:
        signal.signal(signal_number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _close_other_descriptors(sock.fileno())
    set_process_name("fork server")
    workers: dict[int, tuple[int, int]] = {}  # pidfd: (worker number, process ID)
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
            except OSError as error:  # out of memory, or too many processes
                _notify(sock, "exited", request.number, str(error))
                continue
            descriptor = os.pidfd_open(pid)
            workers[descriptor] = request.number, pid
            poll.register(descriptor, select.POLLIN)
            _notify(sock, "started", request.number, pid)


def set_process_name(name: str) -> None:
    """Set the name of this process, at most 15 bytes, that top and ps show."""
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
    except ConnectionError:  # closed while messages of ours were unread
        return None
    if not data:
        return None
    number, changed_settings = json.loads(data)
    return SpawnRequest(number, changed_settings, descriptors[0], descriptors[1] if len(descriptors) > 1 else None)


def _notify(sock: socket.socket, event: str, number: int, detail: int | str) -> None:
    with suppress(OSError):  # the main process is gone; the next read reports that
        sock.send(b"{" + json.dumps([event, number, detail]).encode())


def _exit_reason(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"exit status {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


def _run_and_exit(run: Callable[[], object]) -> NoReturn:
    """Call `run` and exit. `os._exit` skips the exit handlers that were inherited from the parent process."""
    status = 1
    try:
        run()
        status = 0
    except SystemExit:  # the error has been logged
        pass
    except BaseException:
        log.failure("process {pid} failed", pid=os.getpid())
    finally:
        with suppress(Exception):
            sys.stdout.flush()
        os._exit(status)


def _close_other_descriptors(*keep: int) -> None:
    """Close all descriptors but the standard streams and `keep`.

    The Python objects that own these descriptors must not be freed, because they would close descriptors that reuse the
    numbers. The calling frames, which never return, hold references to them.
    """
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) not in keep:
            with suppress(OSError):  # the descriptor of os.listdir is already closed
                os.close(int(name))
