"""The clients of a soak: each in a thread, doing one thing again and again until it is told to stop."""

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
_MAX_REQUESTS = 10  # on a connection, at most
_LAYER_SIZES = (10_000, 3_000_000)  # bytes of what is pushed
_PAUSE = 0.02  # seconds between two things that a client does
_OUTAGE_GRACE = 5.0  # seconds after an outage in which an answer may still tell of it
_UP, _DOWN = 15.0, 2.0  # seconds that the registry is there, and is not

_OUTAGE_ERRORS = (OSError, http.client.HTTPException)
"""What a client may meet with where the registry is away; `Refused` is one of them."""


@define
class FlakyUpstream:
    """The registry that is pulled from, and when it was away."""

    server: BenchServer
    _is_down: bool = False
    _up_since: float = 0.0

    def cycle(self, stop: threading.Event) -> None:
        """Have it go away and come back again and again."""
        while not stop.wait(_UP):
            self._is_down = True
            self.server.stop()
            stop.wait(_DOWN)
            self.server.start()
            self._up_since, self._is_down = time.monotonic(), False

    def was_down(self, started: float) -> bool:
        """Tell whether a request that began at `since` may have met with it."""
        return self._is_down or self._up_since > started - _OUTAGE_GRACE


@define
class SoakClients:
    """All of them: what they did, by its name, and what went wrong that should not have."""

    proxy: Endpoint
    hosted: Endpoint
    resources: Sequence[Resource]
    upstream: FlakyUpstream
    counts: Counter[str] = field(factory=Counter)
    failures: list[str] = field(factory=list)
    _stop: threading.Event = field(factory=threading.Event)
    _threads: list[threading.Thread] = field(factory=list)

    def start(self, seed: int) -> None:
        """Begin. The same `seed` has each of them choose the same."""
        jobs = [*[self._pull] * 4, *[self._abort_download] * 2, *[self._push] * 2]
        for number, job in enumerate(jobs):
            self._start_thread(self._repeat, job, random.Random(f"{seed} {number}"))
        self._start_thread(self.upstream.cycle, self._stop)

    def stop(self) -> None:
        """End what they do, and wait for that."""
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
                # Pushes have nothing to do with the registry upstream.
                if job != self._push and self.upstream.was_down(started):
                    self.counts["failed in an outage"] += 1
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
                    raise UnexpectedStatus(f"{resource.path} was answered {response.status}: {response.read(200)!r}")
                while chunk := response.read(_READ_SIZE):
                    hasher.update(chunk)
                    received += len(chunk)
                if received < resource.size:
                    raise UnexpectedStatus(f"{resource.path} broke off at byte {received} of {resource.size}")
                if f"sha256:{hasher.hexdigest()}" != resource.digest:
                    self.failures.append(f"pull: {resource.path} came with another content")
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
        self.counts["leavers"] += 1

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
