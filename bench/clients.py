"""Client processes that do the same job at the same time, so that no client's interpreter holds up another's."""

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

from bench.servers import BenchError, Cost, Server

_LOOK = 0.25  # seconds between calls of `meanwhile`


@frozen
class Load(Cost):
    """What one load came to; it ends with its last client's job."""

    results: list[Any]
    """What each client's job returned."""


class Clients:
    """As many processes as `count`, started once and used for every load. A context manager."""

    def __init__(self, count: int) -> None:
        spawning = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(count):
            ours, theirs = spawning.Pipe()
            process = spawning.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __enter__(self) -> Clients:
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
        server: Server,
        job: Callable[..., Any],
        *arguments: Any,
        meanwhile: Callable[[], None] = lambda: None,
        **options: Any,
    ) -> Load:
        """Let `count` clients do `job` of `bench.loads` and measure `server`; call `meanwhile` now and then.

        Raise `BenchError` where a client fails.
        """
        pipes = self._pipes[:count]
        for pipe in pipes:
            pipe.send((job, arguments, options))
        for pipe in pipes:
            _receive(pipe)
        used, began = server.cpu(), time.monotonic()
        for pipe in pipes:
            pipe.send(None)
        outcomes = []
        for pipe in pipes:
            while not pipe.poll(_LOOK):
                meanwhile()
            outcomes.append(_receive(pipe))
        wall = time.monotonic() - began
        results, cpu = zip(*outcomes, strict=True)
        return Load(wall, server.cpu() - used, sum(cpu), list(results))


def _receive(pipe: Connection) -> Any:
    try:
        message = pipe.recv()
    except EOFError:
        raise BenchError("A client process has died.") from None
    if isinstance(message, str):
        raise BenchError(f"A client failed:\n{message}")
    return message


def _serve(pipe: Connection) -> None:
    """Do jobs as long as there is somebody who asks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; the parent ends us
    while True:
        try:
            job, arguments, options = pipe.recv()
        except EOFError:
            return
        began = 0.0

        def start() -> None:
            nonlocal began
            pipe.send(None)
            pipe.recv()
            began = time.process_time()

        try:
            result = job(start, *arguments, **options)
            pipe.send((result, time.process_time() - began))
        except Exception:
            pipe.send(traceback.format_exc())
