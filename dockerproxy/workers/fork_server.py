"""The fork server: a copy of the main process from before it served clients, which forks the workers.

A forked worker has all modules loaded and shares their memory with the other processes. It also has the same CA and the
same TLS session ticket keys. The main process cannot fork workers itself once it runs, because it has threads and
connections by then. The fork server only waits for requests, forks a worker for each, and reports the exit of workers.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn, Protocol

from attrs import field, frozen
from twisted.application.service import Service
from twisted.logger import Logger, globalLogPublisher

from dockerproxy.daemon.log_stream import inherited_descriptors
from dockerproxy.workers.log_relay import remove_log_observers
from dockerproxy.workers.message_socket import MAX_MESSAGE_SIZE, MessageSocket, socketpair

# The terminal and systemd send these signals to all processes. Only the main process handles them.
_MAIN_PROCESS_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

_MAX_DESCRIPTORS = 2  # in one request

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

    @property
    def descriptors(self) -> list[int]:
        """The descriptors that are sent with the request."""
        return [self.socket_fd] if self.log_fd is None else [self.socket_fd, self.log_fd]


class SpawnObserver(Protocol):
    """Is told what happens to workers and to the fork server."""

    def worker_started(self, number: int, pid: int) -> None:
        """Worker `number` has started as process `pid`."""

    def worker_exited(self, number: int, reason: str) -> None:
        """Worker `number` has exited, or could not be started."""

    def fork_server_lost(self) -> None:
        """The fork server has exited. It reports nothing from now on."""


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
        self._observers: list[SpawnObserver] = []

    def subscribe(self, observer: SpawnObserver) -> None:
        """Report to `observer` from now on."""
        self._observers.append(observer)

    @property
    def alive(self) -> bool:
        """Whether the fork server can start workers and report their exit."""
        return self._message_socket is not None and self._message_socket.connected

    def startService(self) -> None:
        super().startService()  # type: ignore[no-untyped-call]
        if threading.active_count() > 1:
            raise RuntimeError("a lock that another thread holds would stay locked in the fork server")
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
        self._message_socket = MessageSocket(self._reactor, parent_socket, self._on_message, self._on_closed)

    def start(self, request: SpawnRequest) -> None:
        """Request a worker. The caller closes its descriptors of the request. Raise `OSError` if it was not sent."""
        if self._message_socket is None:
            raise BrokenPipeError("the fork server is not running")
        message = [request.number, request.changed_settings, len(request.descriptors)]
        self._message_socket.send_descriptors(message, request.descriptors)

    def close(self) -> None:
        """Make the fork server exit. It kills the workers that still run."""
        if self._message_socket is not None:
            self._message_socket.close()

    def _on_message(self, message: Any) -> None:
        event, number, detail = message
        for observer in self._observers:
            (observer.worker_started if event == "started" else observer.worker_exited)(number, detail)

    def _on_closed(self) -> None:
        with suppress(ChildProcessError):
            os.waitpid(self._pid, os.WNOHANG)
        for observer in self._observers:
            observer.fork_server_lost()


def run_fork_server(sock: socket.socket, run: Callable[[SpawnRequest], object]) -> None:
    """Run the fork server on its end of the socket pair, until the other end is closed."""
    for signal_number in _MAIN_PROCESS_SIGNALS:
        signal.signal(signal_number, signal.SIG_IGN)
    _close_other_descriptors(sock.fileno())
    set_process_name("fork server")
    # A byte arrives in this pipe if a worker exits. A pidfd for each worker would need Linux 5.3, and gVisor has none.
    child_exits, wakeup_fd = os.pipe()
    os.set_blocking(child_exits, False)
    os.set_blocking(wakeup_fd, False)
    signal.set_wakeup_fd(wakeup_fd, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    workers: dict[int, int] = {}  # process ID: worker number
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    poll.register(child_exits, select.POLLIN)
    while True:
        ready = [descriptor for descriptor, _ in poll.poll()]
        if child_exits in ready:
            os.read(child_exits, 4096)
            _report_exits(sock, workers)
        if sock.fileno() in ready and not _fork_requested(sock, workers, run):
            break
    # The main process has exited, and a worker that hangs would keep its ports.
    for pid in workers:
        os.kill(pid, signal.SIGKILL)


def set_process_name(name: str) -> None:
    """Set the name of this process, at most 15 bytes, that top and ps show."""
    with suppress(OSError), open("/proc/self/comm", "w") as file:
        file.write(name)


def _report_exits(sock: socket.socket, workers: dict[int, int]) -> None:
    with suppress(ChildProcessError):
        while (result := os.waitpid(-1, os.WNOHANG))[0]:
            pid, status = result
            _notify(sock, "exited", workers.pop(pid), _exit_reason(status))


def _fork_requested(sock: socket.socket, workers: dict[int, int], run: Callable[[SpawnRequest], object]) -> bool:
    """Receive a request and fork its worker. Return False if the main process is gone."""
    try:
        data, descriptors, _, _ = socket.recv_fds(sock, MAX_MESSAGE_SIZE, _MAX_DESCRIPTORS)
    except ConnectionError:  # closed while messages of ours were unread
        return False
    if not data:
        return False
    number, changed_settings, descriptor_count = json.loads(data)
    try:
        if len(descriptors) < descriptor_count:  # the kernel dropped those that exceed this process's limit
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        log_fd = descriptors[1] if descriptor_count > 1 else None
        request = SpawnRequest(number, changed_settings, descriptors[0], log_fd)
        pid = os.fork()
        if not pid:
            _run_and_exit(partial(_run_worker, request, run))
    except OSError as error:  # out of memory, too many processes, or too many open files
        event: tuple[str, int, int | str] = ("exited", number, f"not started: {error}")
    else:
        workers[pid] = number
        event = ("started", number, pid)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    _notify(sock, *event)
    return True


def _run_worker(request: SpawnRequest, run: Callable[[SpawnRequest], object]) -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _close_other_descriptors(*request.descriptors)
    if request.log_fd is not None:
        os.dup2(request.log_fd, 1)
        os.dup2(request.log_fd, 2)
        os.close(request.log_fd)
    set_process_name(f"worker {request.number}")
    run(request)


def _notify(sock: socket.socket, event: str, number: int, detail: int | str) -> None:
    with suppress(OSError):  # the main process is gone; the next read reports that
        sock.send(json.dumps([event, number, detail]).encode())


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
        if not _has_log():
            os.write(2, traceback.format_exc().encode())
    finally:
        with suppress(Exception):
            sys.stdout.flush()
        os._exit(status)


def _has_log() -> bool:
    """Return whether somebody observes the log. A worker has none before its main function has added one."""
    trace: list[object] = []
    globalLogPublisher({"log_trace": trace})
    return bool(trace)


def _close_other_descriptors(*keep: int) -> None:
    """Close all descriptors but the standard streams, those of the log, and `keep`.

    The Python objects that own these descriptors must not be freed, because they would close descriptors that reuse the
    numbers. The calling frames, which never return, hold references to them.
    """
    kept = {0, 1, 2, *inherited_descriptors(), *keep}
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            with suppress(OSError):  # the descriptor of os.listdir is already closed
                os.close(int(name))
