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

from bench.asking import Refused, ask, connect, push_blob
from bench.content import Resource
from bench.servers import Server
from bench.targets import Target

_PIECE = 64 * 1024
_REQUESTS = 10  # on a connection, at most
_LAYERS = (10_000, 3_000_000)  # bytes of what is pushed
_PAUSE = 0.02  # seconds between two things that a client does
_AFTERMATH = 5.0  # seconds after an outage in which an answer may still tell of it
_UP, _DOWN = 15.0, 2.0  # seconds that the registry is there, and is not

_EXPECTED = (OSError, http.client.HTTPException)
"""What a client may meet with where the registry is away; `Refused` is one of them."""


@define
class Upstream:
    """The registry that is pulled from, and when it was away."""

    server: Server
    _down: bool = False
    _back: float = 0.0

    def restart(self, stop: threading.Event) -> None:
        """Have it go away and come back again and again."""
        while not stop.wait(_UP):
            self._down = True
            self.server.stop()
            stop.wait(_DOWN)
            self.server.start()
            self._back, self._down = time.monotonic(), False

    def was_away(self, since: float) -> bool:
        """Tell whether a request that began at `since` may have met with it."""
        return self._down or self._back > since - _AFTERMATH


@define
class Visitors:
    """All of them: what they did, by its name, and what went wrong that should not have."""

    proxy: Target
    hosted: Target
    resources: Sequence[Resource]
    upstream: Upstream
    done: Counter[str] = field(factory=Counter)
    failures: list[str] = field(factory=list)
    _stop: threading.Event = field(factory=threading.Event)
    _threads: list[threading.Thread] = field(factory=list)

    def start(self, seed: int) -> None:
        """Begin. The same `seed` has each of them choose the same."""
        jobs = [*[self._pull] * 4, *[self._leave] * 2, *[self._push] * 2]
        for number, job in enumerate(jobs):
            self._begin(self._repeat, job, random.Random(f"{seed} {number}"))
        self._begin(self.upstream.restart, self._stop)

    def stop(self) -> None:
        """End what they do, and wait for that."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _begin(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _repeat(self, job: Callable[[random.Random], None], chance: random.Random) -> None:
        while not self._stop.wait(_PAUSE):
            began = time.monotonic()
            try:
                job(chance)
            except _EXPECTED as error:
                # Pushes have nothing to do with the registry upstream.
                if job != self._push and self.upstream.was_away(began):
                    self.done["failed in an outage"] += 1
                else:
                    self.failures.append(f"{job.__name__.strip('_')}: {type(error).__name__}: {error}")

    def _pull(self, chance: random.Random) -> None:
        connection = connect(self.proxy)
        try:
            for _ in range(chance.randint(1, _REQUESTS)):
                wanted, hasher, received = chance.choice(self.resources), hashlib.sha256(), 0
                connection.request("GET", wanted.path)
                answer = connection.getresponse()
                if answer.status != 200:
                    raise Refused(f"{wanted.path} was answered {answer.status}: {answer.read(200)!r}")
                while piece := answer.read(_PIECE):
                    hasher.update(piece)
                    received += len(piece)
                if received < wanted.size:
                    raise Refused(f"{wanted.path} broke off at byte {received} of {wanted.size}")
                if f"sha256:{hasher.hexdigest()}" != wanted.digest:
                    self.failures.append(f"pull: {wanted.path} came with another content")
                self.done["pulls"] += 1
        finally:
            connection.close()

    def _leave(self, chance: random.Random) -> None:
        wanted = chance.choice(self.resources)
        connection = connect(self.proxy)
        try:
            connection.request("GET", wanted.path)
            connection.getresponse().read(chance.randrange(1, wanted.size))
        finally:
            connection.close()
        self.done["leavers"] += 1

    def _push(self, chance: random.Random) -> None:
        content = chance.randbytes(chance.choice(_LAYERS))
        encoded, repository = hashlib.sha256(content).hexdigest(), f"soak/{chance.randrange(8)}"
        connection = connect(self.hosted)
        try:
            push_blob(connection, repository, content, encoded)
            ask(connection, 200, "GET", f"/v2/{repository}/blobs/sha256:{encoded}")
            ask(connection, 202, "DELETE", f"/v2/{repository}/blobs/sha256:{encoded}")
        finally:
            connection.close()
        self.done["pushes"] += 1
