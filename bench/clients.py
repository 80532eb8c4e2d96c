"""Client processes that run the same job at the same time.

They are processes because threads would share one interpreter lock, and would slow one another down.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from attrs import frozen

from bench.servers import BenchError, BenchServer, ResourceUsage

_POLL_INTERVAL = 0.25  # seconds between calls of `on_poll`


@frozen
class LoadResult(ResourceUsage):
    """The result of one load, which ends with the job of its last client."""

    results: list[Any]
    """The return value of each client's job."""


class ClientPool:
    """A pool of `count` client processes, started once and used for every load. A context manager."""

    def __init__(self, count: int) -> None:
        spawn_context = multiprocessing.get_context("spawn")
        self._connections: list[Connection] = []
        self._processes = []
        for _ in range(count):
            parent_end, child_end = spawn_context.Pipe()
            process = spawn_context.Process(target=run_jobs, args=(child_end,), daemon=True)
            process.start()
            child_end.close()
            self._connections.append(parent_end)
            self._processes.append(process)

    def __enter__(self) -> ClientPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()

    def run(
        self,
        count: int,
        server: BenchServer,
        job: Callable[..., Any],
        *arguments: Any,
        on_poll: Callable[[], None] = lambda: None,
        **options: Any,
    ) -> LoadResult:
        """Run `job`, a function of `bench.loads`, in `count` clients and measure `server`.

        `on_poll` is called every _POLL_INTERVAL until the last client is done. Raises `BenchError` if a client fails.
        """
        pipes = self._connections[:count]
        for pipe in pipes:
            pipe.send((job, arguments, options))
        for pipe in pipes:
            _receive(pipe)
        server_cpu_before, started = server.cpu_seconds(), time.monotonic()
        for pipe in pipes:
            pipe.send(None)
        outcomes = []
        for pipe in pipes:
            while not pipe.poll(_POLL_INTERVAL):
                on_poll()
            outcomes.append(_receive(pipe))
        wall = time.monotonic() - started
        results, cpu = zip(*outcomes, strict=True)
        return LoadResult(wall, server.cpu_seconds() - server_cpu_before, sum(cpu), list(results))


def _receive(pipe: Connection) -> Any:
    try:
        message = pipe.recv()
    except EOFError:
        raise BenchError("A client process ended without a result.") from None
    if isinstance(message, str):
        raise BenchError(f"A client failed:\n{message}")
    return message


def run_jobs(pipe: Connection) -> None:
    """Run the jobs that arrive on `pipe`, until the parent closes it."""
    # A terminal sends SIGINT to the whole process group. The parent terminates its clients itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            job, arguments, options = pipe.recv()
        except EOFError:
            return
        cpu_started = 0.0

        def wait_for_start() -> None:
            nonlocal cpu_started
            pipe.send(None)
            pipe.recv()
            cpu_started = time.process_time()

        try:
            result = job(wait_for_start, *arguments, **options)
            pipe.send((result, time.process_time() - cpu_started))
        except Exception:
            pipe.send(traceback.format_exc())
