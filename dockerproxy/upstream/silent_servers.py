"""Servers that do not answer, so that only one request waits for the time-out.

A firewall that drops packets, or a server that accepts connections and says nothing, costs each request the whole
time-out, and a cached image has many of them. The process in which a request has found that out connects again and
again in the background, with a request of its own. All processes fail other requests at once until the server answers.

Clients cannot make a server look silent to others, because their requests do not count. An attempt to connect counts,
and `GET /v2/` without anybody's credential, which we send if a request is not answered soon. So a path that hangs says
nothing about its server.

A server that refuses connections at once makes nobody wait, so each request tries it again. All processes know of it
all the same, so that the first one in which it answers can say so (`RegistryStates`).

The listed registries are few. Others are hosts that a client makes up below a wildcard, or that a registry names in a
redirect: the place for these is bounded, with a share for the client of the request, and apart from that of the listed
ones. Without a place, a silence ends by itself, so that one request waits again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from math import inf
from typing import Any, TypeVar

from attrs import define, field
from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger

from dockerproxy.bounded_dict import BoundedDict
from dockerproxy.concurrency import current_client
from dockerproxy.errors import (
    DestinationForbidden,
    RegistryError,
    UpstreamError,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from dockerproxy.oci.names import Registry
from dockerproxy.shares import ClientShares

SILENCE_TTL = 30.0
"""Seconds for which a silence counts after the last news of it."""

PROBE_INTERVAL = 5.0
"""Seconds from a failed attempt to the next one in the background."""

SUSPECT_AFTER = 5.0
"""Seconds without an answer after which a request makes us send one of our own."""

PROBE_TTL = 600.0
"""Seconds after the last request for a server for which we go on asking whether it answers."""

_SLOW = 1.0  # seconds; a server that refuses at once makes nobody wait, and may be back at any moment
_MAX_SERVERS = 256  # that nobody listed
_CLIENT_SHARE = 64  # of those that are asked in the background

log = Logger()
T = TypeVar("T")

Probe = Callable[[], Awaitable[object]]
"""Connects to a server and sends it a request of our own. Raises `UpstreamError` if there is no answer."""

OnChanged = Callable[[str, str, float], object]
"""Gets the arguments of `SilentServers.add`."""

OnStateChanged = Callable[[str, str], object]
"""Gets the origin of a server, and why it cannot be reached, as a sentence; `""` if it answers again."""


@define(eq=False)
class _Server:
    """The last news of a server. Times are `clock.seconds()`."""

    origin: str
    is_listed: bool
    connected_at: float = -inf
    answered_at: float = -inf
    asked_at: float = -inf
    failed_at: float = -inf
    silent_until: float = -inf
    error: UpstreamError | None = None  # None unless it is silent
    failure: str = ""  # why it cannot be reached, silent or not; "" if it answers
    probe: Deferred[None] | None = None
    next_probe: Any = None  # the delayed call of the next one
    asker: str = ""  # the client because of which it is asked in the background
    waiting: set[Deferred[Any]] = field(factory=set)  # requests that end if another one has found out the silence
    ended: set[Deferred[Any]] = field(factory=set)  # those of them that were ended so


class SilentServers:
    """Remembers servers that do not answer. Other processes `add` what this one finds out, if they `subscribe`.

    `probe_limit` is the number of seconds that a probe may take.
    """

    def __init__(self, clock: Any, probe_limit: float) -> None:
        self._clock = clock
        self._probe_limit = probe_limit
        self._listed: dict[str, _Server] = {}
        self._others: BoundedDict[str, _Server] = BoundedDict(_MAX_SERVERS)
        self._active: set[_Server] = set()  # those with a probe, or a next one
        self.places = ClientShares("silent servers that nobody listed", limit=_MAX_SERVERS, share=_CLIENT_SHARE)
        self._is_listed: Callable[[Registry], bool] = lambda server: True
        self._closed = False
        self._subscribers: list[OnChanged] = []
        self._on_silent: Callable[[str], object] = lambda origin: None
        self._on_state_changed: OnStateChanged = lambda origin, failure: None

    def subscribe(self, on_changed: OnChanged) -> None:
        """Call `on_changed` with what this process finds out from now on."""
        self._subscribers.append(on_changed)

    def set_is_listed(self, is_listed: Callable[[Registry], bool]) -> None:
        """Call `is_listed` to learn whether a server is a registry that the administrator has listed."""
        self._is_listed = is_listed

    def set_on_silent(self, on_silent: Callable[[str], object]) -> None:
        """Call `on_silent` with the origin of each server that becomes silent, because its connections are dead."""
        self._on_silent = on_silent

    def set_on_state_changed(self, on_state_changed: OnStateChanged) -> None:
        """Call `on_state_changed` for each server that cannot be reached any more, or can again, in any process."""
        self._on_state_changed = on_state_changed

    def add(self, origin: str, message: str, seconds: float) -> None:
        """Note that another process could not reach a server, because of `message`, which is empty if it answers again.

        A silence counts for some seconds; 0 if the server is not silent.
        """
        server = self._server(origin)
        if seconds <= 0:
            self._end_silence(server)
            self._set_failure(server, message)
        elif server not in self._active:
            self._begin_silence(server, UpstreamTimeout(message), seconds)

    def news(self) -> list[tuple[str, str, float]]:
        """Return the arguments of `add` from which a new process knows what this one does."""
        now = self._clock.seconds()
        servers = [*self._listed.values(), *(self._others.get(origin) for origin in list(self._others))]
        return [
            (server.origin, server.failure, 0.0 if server.error is None else max(0.0, server.silent_until - now))
            for server in servers
            if server is not None and server.failure
        ]

    async def connect(self, origin: Registry, attempt: Callable[[], Awaitable[T]], probe: Probe) -> T:
        """Return the connection that `attempt` makes. Raise its error, or at once the error of a silent server."""
        server = self._server(origin.origin)
        self._check(server)
        started = self._clock.seconds()
        try:
            connection = await self._race(server, attempt)
        except DestinationForbidden:
            raise
        except UpstreamError as error:
            is_slow = isinstance(error, UpstreamTimeout) or self._clock.seconds() - started >= _SLOW
            # Otherwise another attempt has succeeded since: this one has lost a packet.
            if max(server.connected_at, server.answered_at) <= started and server.error is None:
                if is_slow:
                    self._find_silent(server, error, probe)
                else:
                    self._find_unreachable(server, error)
            raise
        server.connected_at = self._clock.seconds()
        if server.failure and server.error is None:
            self._set_failure(server, "")
            self._publish(server, "", 0.0)
        return connection

    async def exchange(self, origin: Registry, send: Callable[[], Awaitable[T]], probe: Probe) -> T:
        """Return the response to a request without a body that `send` sends. Raise its error."""
        server = self._server(origin.origin)
        started = server.asked_at = self._clock.seconds()
        client = current_client.get()  # which a delayed call does not have
        suspicion = self._clock.callLater(SUSPECT_AFTER, self._suspect, server, started, probe, client)
        try:
            response = await self._race(server, send)
        except UpstreamTimeout:
            self._suspect(server, started, probe, client)  # if that has not happened yet
            raise
        finally:
            if suspicion.active():
                suspicion.cancel()
        self._answer(server)
        return response

    def note_answer(self, origin: Registry) -> None:
        """Note that a server has answered a request of our own."""
        self._answer(self._server(origin.origin))

    def close(self) -> None:
        """End all work in the background, and begin none."""
        self._closed = True
        for server in list(self._active):
            self._stop_probing(server)

    # what is known

    def _server(self, origin: str) -> _Server:
        server = self._listed.get(origin) or self._others.get(origin)
        if server is None:
            is_listed = self._is_listed(Registry.parse(origin))
            server = _Server(origin, is_listed)
            if is_listed:
                self._listed[origin] = server
            else:
                self._others[origin] = server
        return server

    def _check(self, server: _Server) -> None:
        """Raise the error of a server that is silent."""
        now = server.asked_at = self._clock.seconds()
        if server.error is not None and now >= server.silent_until:
            server.error = None  # the process that asked has ended
        if server.error is not None:
            raise self._repeat(server, server.error)

    def _repeat(self, server: _Server, error: UpstreamError) -> UpstreamError:
        seconds = self._clock.seconds() - server.failed_at
        return type(error)(f"{error.message} (tried {seconds:.0f} s ago, and again in the background)")

    async def _race(self, server: _Server, begin: Callable[[], Awaitable[T]]) -> T:
        """Return the result of the work, or raise its error, or that of the server if it becomes silent before."""

        async def run() -> T:
            return await begin()

        work: Deferred[T] = Deferred.fromCoroutine(run())
        server.waiting.add(work)
        try:
            return await work
        except CancelledError:
            if work in server.ended and server.error is not None:
                raise self._repeat(server, server.error) from None
            raise
        finally:
            server.waiting.discard(work)
            server.ended.discard(work)

    def _answer(self, server: _Server) -> None:
        """Note that a server has answered."""
        server.answered_at = self._clock.seconds()
        if server.failure:
            self._end_silence(server)
            self._set_failure(server, "")
            self._publish(server, "", 0.0)

    def _find_unreachable(self, server: _Server, error: UpstreamError) -> None:
        """Note that a server refuses connections, if it is silent no more, because it does so at once."""
        if self._closed:
            return  # it is our own end
        self._end_silence(server)
        if server.failure != error.message:
            self._set_failure(server, error.message)
            self._publish(server, error.message, 0.0)

    def _set_failure(self, server: _Server, message: str) -> None:
        changed, server.failure = server.failure != message, message
        if changed:
            self._on_state_changed(server.origin, message)

    def _find_silent(self, server: _Server, error: UpstreamError, probe: Probe) -> None:
        if self._closed:
            return  # it is our own end
        self._begin_silence(server, error, SILENCE_TTL)
        self._publish(server, error.message, SILENCE_TTL)
        if server.probe is None and server.next_probe is None:
            self._schedule_probe(server, probe)

    def _begin_silence(self, server: _Server, error: UpstreamError, seconds: float) -> None:
        self._set_failure(server, error.message)
        server.error, server.failed_at = error, self._clock.seconds()
        server.silent_until = server.failed_at + seconds
        self._on_silent(server.origin)
        for work in list(server.waiting):
            server.ended.add(work)
            work.cancel()

    def _end_silence(self, server: _Server) -> None:
        server.error = None
        if server.next_probe is not None:
            self._stop_probing(server)

    def _publish(self, server: _Server, message: str, seconds: float) -> None:
        for on_changed in self._subscribers:
            on_changed(server.origin, message, seconds)

    # probes

    def _suspect(self, server: _Server, started: float, probe: Probe, client: str) -> None:
        """Ask a server that has not answered since a request was sent, unless it has answered another one."""
        is_idle = server.error is None and server.probe is None and server.next_probe is None
        if server.answered_at <= started and is_idle and self._activate(server, client):
            self._start_probe(server, probe)

    def _activate(self, server: _Server, client: str) -> bool:
        """Return whether the server may be asked in the background. Beyond a bound, a silence ends by itself.

        `client` is the one because of which it would be asked.
        """
        if self._closed:
            return False
        if server not in self._active:
            if not server.is_listed:
                if not self.places.has_room(client):
                    return False
                self.places.add(client)
                server.asker = client
            self._active.add(server)
        return True

    def _deactivate(self, server: _Server) -> None:
        if server in self._active:
            self._active.remove(server)
            if not server.is_listed:
                self.places.release(server.asker)

    def _schedule_probe(self, server: _Server, probe: Probe) -> None:
        if not self._activate(server, current_client.get()):
            return
        server.next_probe = self._clock.callLater(PROBE_INTERVAL, self._start_probe, server, probe)

    def _start_probe(self, server: _Server, probe: Probe) -> None:
        server.next_probe = None
        if self._clock.seconds() - server.asked_at > PROBE_TTL:
            self._stop_probing(server)  # nobody wants to know; the silence ends soon
            return
        if server.error is not None:
            server.silent_until = self._clock.seconds() + self._probe_limit + SILENCE_TTL
            self._publish(server, server.error.message, self._probe_limit + SILENCE_TTL)
        work = Deferred.fromCoroutine(self._probe(server, probe))
        if not work.called:
            server.probe = work
        work.addErrback(lambda failure: log.failure("asking {server} failed", failure, server=server.origin))

    async def _probe(self, server: _Server, probe: Probe) -> None:
        started = self._clock.seconds()
        try:
            await probe()
        except CancelledError:
            return
        except RegistryError as error:
            server.probe = None
            is_slow = isinstance(error, UpstreamTimeout) or self._clock.seconds() - started >= _SLOW
            if server.answered_at <= started and not is_slow and isinstance(error, UpstreamUnreachable):
                self._find_unreachable(server, error)  # it is there, if only to refuse connections
            elif server.answered_at > started or not is_slow:
                self._answer(server)
            elif isinstance(error, UpstreamError):
                self._find_silent(server, error, probe)
            else:
                self._schedule_probe(server, probe)
        else:
            server.probe = None
            self._answer(server)
        finally:
            if server.probe is None and server.next_probe is None:
                self._deactivate(server)

    def _stop_probing(self, server: _Server) -> None:
        self._deactivate(server)
        call, server.next_probe = server.next_probe, None
        if call is not None and call.active():
            call.cancel()
        work, server.probe = server.probe, None
        if work is not None:
            work.cancel()
