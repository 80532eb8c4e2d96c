"""The clients of the soak test: each repeats one job in a thread of its own until `stop` is called."""

from __future__ import annotations

import hashlib
import http.client
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

from attrs import define, field

from bench.content import Resource
from bench.endpoints import Endpoint
from bench.registry_client import UnexpectedStatus, open_connection, push_blob, send_request
from bench.servers import BenchServer

_READ_SIZE = 64 * 1024
_MAX_REQUESTS = 10  # requests on one connection
_LAYER_SIZES = (10_000, 3_000_000)  # bytes of the pushed layers
_PAUSE = 0.02  # seconds between two jobs of a client
_OUTAGE_GRACE = 5.0  # seconds after an outage in which a request may still fail because of it
_UP_SECONDS, _DOWN_SECONDS = 15.0, 2.0  # durations of the upstream registry's states

_OUTAGE_ERRORS = (OSError, http.client.HTTPException)
"""Exceptions that a client may raise while the upstream registry is down. `UnexpectedStatus` is an OSError."""


@define
class FlakyUpstream:
    """The upstream registry, which goes down and comes back, and the time of its last outage."""

    server: BenchServer
    _is_down: bool = False
    _up_since: float = 0.0

    def cycle(self, stop: threading.Event) -> None:
        """Stop and start the registry again and again, until `stop` is set."""
        while not stop.wait(_UP_SECONDS):
            self._is_down = True
            self.server.stop()
            stop.wait(_DOWN_SECONDS)
            self.server.start()
            self._up_since, self._is_down = time.monotonic(), False

    def was_down(self, started: float) -> bool:
        """Return whether an outage may have affected a request that began at `started`."""
        return self._is_down or self._up_since > started - _OUTAGE_GRACE


@define
class SoakClients:
    """All clients, with counters of their completed jobs and a list of their failures."""

    proxy: Endpoint
    hosted: Endpoint
    resources: Sequence[Resource]
    upstream: FlakyUpstream
    counts: Counter[str] = field(factory=Counter)
    failures: list[str] = field(factory=list)
    _stop: threading.Event = field(factory=threading.Event)
    _threads: list[threading.Thread] = field(factory=list)

    def start(self, seed: int) -> None:
        """Start the threads. With the same `seed` each client makes the same random choices."""
        jobs = [*[self._pull] * 4, *[self._abort_download] * 2, *[self._push] * 2]
        for number, job in enumerate(jobs):
            self._start_thread(self._repeat, job, random.Random(f"{seed} {number}"))
        self._start_thread(self.upstream.cycle, self._stop)

    def stop(self) -> None:
        """Ask all threads to end, and wait for them."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _start_thread(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _repeat(self, job: Callable[[random.Random], None], rng: random.Random) -> None:
        while not self._stop.wait(_PAUSE):
            started = time.monotonic()
            try:
                job(rng)
            except _OUTAGE_ERRORS as error:
                # Pushes do not use the upstream registry.
                if job != self._push and self.upstream.was_down(started):
                    self.counts["failed during outage"] += 1
                else:
                    self.failures.append(f"{job.__name__.strip('_')}: {type(error).__name__}: {error}")

    def _pull(self, rng: random.Random) -> None:
        connection = open_connection(self.proxy)
        try:
            for _ in range(rng.randint(1, _MAX_REQUESTS)):
                resource, hasher, received = rng.choice(self.resources), hashlib.sha256(), 0
                connection.request("GET", resource.path)
                response = connection.getresponse()
                if response.status != 200:
                    raise UnexpectedStatus(f"{resource.path} returned {response.status}: {response.read(200)!r}")
                while chunk := response.read(_READ_SIZE):
                    hasher.update(chunk)
                    received += len(chunk)
                if received < resource.size:
                    raise UnexpectedStatus(f"{resource.path} ended at byte {received} of {resource.size}")
                if f"sha256:{hasher.hexdigest()}" != resource.digest:
                    self.failures.append(f"pull: the content of {resource.path} does not match its digest")
                self.counts["pulls"] += 1
        finally:
            connection.close()

    def _abort_download(self, rng: random.Random) -> None:
        resource = rng.choice(self.resources)
        connection = open_connection(self.proxy)
        try:
            connection.request("GET", resource.path)
            connection.getresponse().read(rng.randrange(1, resource.size))
        finally:
            connection.close()
        self.counts["aborted downloads"] += 1

    def _push(self, rng: random.Random) -> None:
        content = rng.randbytes(rng.choice(_LAYER_SIZES))
        sha256_hex, repository = hashlib.sha256(content).hexdigest(), f"soak/{rng.randrange(8)}"
        connection = open_connection(self.hosted)
        try:
            push_blob(connection, repository, content, sha256_hex)
            send_request(connection, 200, "GET", f"/v2/{repository}/blobs/sha256:{sha256_hex}")
            send_request(connection, 202, "DELETE", f"/v2/{repository}/blobs/sha256:{sha256_hex}")
        finally:
            connection.close()
        self.counts["pushes"] += 1
