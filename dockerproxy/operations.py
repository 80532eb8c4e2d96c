"""The process of one long operation: garbage collection, import or verification of a store.

    python -m dockerproxy.operations NAME OPTIONS

NAME is ``gc``, ``import`` or ``check``; OPTIONS is a JSON object. The daemon (`dockerproxy.admin.operations`) starts
this process for each such command, so that neither the processor time nor the memory that it takes is the daemon's.
Both change the store by the same protocol on disk (see `dockerproxy.store.safe_delete`).

The process writes newline-delimited JSON to its standard output: ``{"event": "progress", "phase", "done", "total"}``,
the items (``removed``, ``finding``), and at the end ``{"event": "result", …}`` or ``{"event": "error", "code",
"message"}``. To hold the lock of a repository, it writes ``{"event": "lock", "repository"}``, waits for a line on its
standard input, and writes ``{"event": "unlock"}`` afterwards. If its standard input ends, because the command was
interrupted or the daemon has exited, it stops after the current step.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import attrs

from dockerproxy.store.importer import NotARegistry, Skipped, import_registry
from dockerproxy.store.layout import Layout
from dockerproxy.store.progress import Progress, Stopped
from dockerproxy.store.repository_check import Finding
from dockerproxy.store.scrub import scrub
from dockerproxy.store.sweep import InvalidGracePeriod, RemovedItem, sweep
from dockerproxy.store.tree_reader import UnsafeFile

_REPORT_INTERVAL = 0.2  # seconds between two progress lines, and between two checks whether to stop

_NICENESS = 10
"""It also lowers the priority of disk accesses: Linux derives one from the other (ioprio_set(2))."""

_MIN_MEMORY = 512 * 1024 * 1024
"""Bytes of memory that the process may always use. A collection needs about 0.25 KB for each blob, and for
each link of the largest repository."""

_MEMORY_SHARE = 4  # it may use a fourth of the machine's memory if that is more

_OOM_SCORE_ADJUSTMENT = "500"
"""If the machine runs out of memory, the kernel kills this process rather than the daemon (proc(5))."""

IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGIO)
"""The terminal and systemd send the first three to all processes. The daemon stops this one by closing its input. The
kernel sends SIGIO if somebody opens a file on which the importer has a lease."""


class OperationFailed(Exception):
    """The operation failed. `code` is that of `dockerproxy.admin.operations.OperationError`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


class Daemon:
    """The pipes to the daemon. `clock` is monotonic, in seconds."""

    def __init__(self, input_fd: int, output_fd: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._input_fd = input_fd
        self._output_fd = output_fd
        self._clock = clock
        self._next_report = 0.0
        self._phase: tuple[str, int | None] = ("", None)
        self._poll = select.poll()
        self._poll.register(input_fd, select.POLLIN)

    def send(self, event: str, **fields: Any) -> None:
        """Send a line. Blocks if the daemon does not read. Raise `Stopped` if the daemon has exited."""
        line = memoryview(json.dumps({"event": event, **fields}).encode() + b"\n")
        try:
            while line:
                line = line[os.write(self._output_fd, line) :]
        except BrokenPipeError:
            raise Stopped from None

    def report(self, phase: str, done: int, total: int | None) -> None:
        """Send a progress line, unless the last one of this phase is too recent. Raise `Stopped` if asked to stop."""
        now = self._clock()
        if now < self._next_report and (phase, total) == self._phase:
            return
        self._next_report, self._phase = now + _REPORT_INTERVAL, (phase, total)
        if self._poll.poll(0):  # nothing is sent between two locks, so this is the end of the input
            raise Stopped
        self.send("progress", phase=phase, done=done, total=total)

    @contextmanager
    def lock(self, repository: str) -> Iterator[None]:
        """Hold the lock of the repository. Raise `Stopped` if asked to stop while waiting for it."""
        self.send("lock", repository=repository)
        if not os.read(self._input_fd, 1):
            raise Stopped
        try:
            yield
        finally:
            self.send("unlock")


def collect_garbage(daemon: Daemon, root: str, *, list: bool = True, **options: Any) -> Any:
    """Run ``gc`` with the `options` of `sweep`. Send the removed items if `list` is true."""
    return sweep(Layout(Path(root)), progress=removal_progress(daemon, is_listed=list), lock=daemon.lock, **options)


def removal_progress(daemon: Daemon, *, is_listed: bool) -> Progress[RemovedItem]:
    """Return the progress of ``gc``, which sends the removed items if `is_listed`."""

    def send_item(item: RemovedItem) -> None:
        if is_listed:
            daemon.send("removed", kind=item.kind, digest=str(item.digest), repository=item.repository, size=item.size)

    return Progress(daemon.report, send_item)


def send_skipped(daemon: Daemon, item: Skipped) -> None:
    """Send what an import has left out."""
    daemon.send("finding", kind=item.kind, what=item.message)


def send_finding(daemon: Daemon, item: Finding) -> None:
    """Send what a check has found."""
    digest = None if item.digest is None else str(item.digest)
    daemon.send("finding", kind=item.kind, what=item.message, repository=item.repository, digest=digest)


def import_directory(daemon: Daemon, root: str, *, directory: str, force: bool = False) -> Any:
    """Run ``import``."""

    progress = Progress(daemon.report, partial(send_skipped, daemon))
    return import_registry(Layout(Path(root)), Path(directory), force=force, progress=progress, lock=daemon.lock)


def check(daemon: Daemon, root: str, *, links: bool, sparse: bool = False) -> Any:
    """Run ``check``. Check the repositories if `links` is true. With `sparse`, indexes may lack manifests."""

    progress = Progress(daemon.report, partial(send_finding, daemon))
    return scrub(Layout(Path(root)), check_links=links, sparse=sparse, progress=progress, lock=daemon.lock)


# Those of a bucket are in `dockerproxy.bucket_operations`.
OPERATIONS: dict[str, Callable[..., Any]] = {"gc": collect_garbage, "import": import_directory, "check": check}


def run(daemon: Daemon, operation: Callable[[Daemon], Any], memory_limit: int) -> None:
    """Run `operation` and send its result, or the error that it raised."""
    send_error = partial(daemon.send, "error")
    with suppress(Stopped):
        try:
            result = attrs.asdict(operation(daemon))
        except (InvalidGracePeriod, NotARegistry) as error:
            send_error(code="NOT_UNDERSTOOD", message=str(error))
        except OperationFailed as error:
            send_error(code=error.code, message=error.message)
        except UnsafeFile as error:
            send_error(code="DISK", message=f"stopped, because {error}")
        except OSError as error:
            send_error(code="DISK", message=f"{error.filename or 'the disk'}: {error.strerror}")
        except MemoryError:
            message = f"the operation needs more than the {memory_limit >> 20} MiB of memory that it may use"
            send_error(code="MEMORY", message=message)
        else:
            daemon.send("result", **result)


def default_memory_limit() -> int:
    """Return the bytes of memory that this process may use."""
    return max(_MIN_MEMORY, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // _MEMORY_SHARE)


def limit_resources(memory_limit: int) -> None:
    """Make this process yield the processor, the disk and the memory to others. Allow it `memory_limit` bytes."""
    # A sandbox may refuse each of these, and the operation works without.
    with suppress(OSError):
        os.nice(_NICENESS)
    with suppress(OSError, ValueError):  # ValueError: the hard limit is lower already
        resource.setrlimit(resource.RLIMIT_DATA, (memory_limit, memory_limit))
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE_ADJUSTMENT)


def main(arguments: Sequence[str]) -> None:
    """Run the operation that the command line names."""
    name, options = arguments
    for signal_number in IGNORED_SIGNALS:
        signal.signal(signal_number, signal.SIG_IGN)
    memory_limit = default_memory_limit()
    limit_resources(memory_limit)
    run(Daemon(0, 1), partial(OPERATIONS[name], **json.loads(options)), memory_limit)


if __name__ == "__main__":
    main(sys.argv[1:])
