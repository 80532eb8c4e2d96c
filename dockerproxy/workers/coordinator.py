"""The state that all processes share: the space of the cache, locks, and logins.

Every process sees it as a `Coordinator`. The main process owns the state, so its `LocalCoordinator` works directly. A
worker's `RemoteCoordinator` (`remote`) calls the methods of a `LocalCoordinator` that the main process has for it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol

from attrs import define, field, frozen
from twisted.internet.defer import Deferred

from dockerproxy.cache.ended_logins import EndedLogins
from dockerproxy.cache.pull_counts import PullCounts
from dockerproxy.cache.space import CacheSpace, CacheSpaceManager
from dockerproxy.concurrency import LocalKeyedLock, spawn
from dockerproxy.daemon.refusing_clients import RefusingClients
from dockerproxy.oci.credentials import IDENTITY_TOKEN_USER, BasicCredentials, IdentityToken, Login
from dockerproxy.oci.names import Digest, Host
from dockerproxy.store.layout import IngestKey
from dockerproxy.upstream.login_provider import LocalLoginProvider, ProvidedLogin


class Coordinator(CacheSpace, Protocol):
    """The shared state as one process sees it: a `CacheSpace`, a `KeyedLock`, a `LoginProvider`, and `EndedLogins`."""

    def hold(self, key: str) -> AbstractAsyncContextManager[bool]: ...

    async def get_login(self, host: Host, refused: Login | None, client: str) -> ProvidedLogin | None: ...

    def record_pulls(self, rows: list[dict[str, Any]]) -> None: ...

    def report_login(self, registry: str, setting: str, reason: str) -> None: ...

    def report_pull(self, registry: str, repository: str) -> None: ...

    def report_refusal(self, client: str) -> None: ...

    async def doctor_report(self, quick: bool) -> dict[str, Any]: ...

    async def get_overview(
        self, resource: str, viewer: Sequence[Any], arguments: Mapping[str, str]
    ) -> dict[str, Any]: ...

    async def ask_page_desk(self, question: str, arguments: Sequence[Any]) -> dict[str, Any]: ...


Answer = Callable[[str, Sequence[Any], Mapping[str, str]], Awaitable[dict[str, Any]]]
"""Answers a question about the daemon with a JSON object; see `admin.overview`."""


PageAnswer = Callable[[str, Sequence[Any]], Awaitable[dict[str, Any]]]
"""Answers a question of the page with a JSON object; see `admin.page_desk`."""


DoctorAnswer = Callable[[bool], Awaitable[dict[str, Any]]]
"""Returns the report of `Doctor`; True asks for a quick one."""


@frozen
class Answers:
    """The parts of the main process that answer the questions of all processes."""

    overview: Answer
    page_desk: PageAnswer
    doctor: DoctorAnswer


@define
class SharedState:
    """The shared state in the main process. `record_pull` adds a row to the history of pulls.

    `owners` maps each reserved download to the coordinator of its process. A process may take over an ingest before we
    learn that its previous writer released it. A release is therefore ignored if another process has reserved the same
    key since.
    """

    space: CacheSpaceManager
    ended_logins: EndedLogins
    logins: LocalLoginProvider
    pull_counts: PullCounts
    refusing_clients: RefusingClients
    record_pull: Callable[[dict[str, Any]], object]
    locks: LocalKeyedLock = field(factory=LocalKeyedLock)
    owners: dict[IngestKey, LocalCoordinator] = field(factory=dict, init=False)
    _answers: Answers | None = field(default=None, init=False)

    @property
    def answers(self) -> Answers:
        """The parts that answer questions. Raise RuntimeError before `answer_with`."""
        if self._answers is None:
            raise RuntimeError("a process asks before the daemon is built")
        return self._answers

    def answer_with(self, answers: Answers) -> None:
        """Use `answers` from now on. They know the server, which asks them, so they are built after it."""
        self._answers = answers


@define(eq=False)
class LocalCoordinator(Coordinator):
    """The coordinator of one process in the main process. `close` releases what the process holds."""

    _shared: SharedState
    _waiting_locks: set[int] = field(factory=set, init=False)
    _held_locks: dict[int, Deferred[None]] = field(factory=dict, init=False)

    # cache space

    async def reserve(self, key: IngestKey, size: int, expected_size: int, existing_size: int, client: str) -> str:
        self._shared.owners[key] = self
        return await self._shared.space.reserve(key, size, expected_size, existing_size, client)

    async def record_commit(self, key: IngestKey, size: int) -> None:
        await self._shared.space.record_commit(key, size)

    def release(self, key: IngestKey) -> None:
        """Release a reservation. Do nothing if another process has reserved the key since."""
        if self._shared.owners.get(key) is self:
            del self._shared.owners[key]
            self._shared.space.release(key)

    async def record(self, digest: Digest, size: int, client: str, registry: str) -> None:
        await self._shared.space.record(digest, size, client, registry)

    def touch(self, digest: Digest) -> None:
        self._shared.space.touch(digest)

    def touch_all(self, digests: list[Digest]) -> None:
        """Record that another process has used `digests`."""
        for digest in digests:
            self._shared.space.touch(digest)

    def record_files(self, count: int) -> None:
        self._shared.space.record_files(count)

    async def usage(self) -> tuple[int, int]:
        return await self._shared.space.usage()

    # locks

    @asynccontextmanager
    async def hold(self, key: str) -> AsyncIterator[bool]:
        """Hold the lock of `key`; see `KeyedLock.hold`."""
        async with self._shared.locks.hold(key) as waited:
            yield waited

    def lock(self, key: str, lock_id: int) -> Deferred[bool]:
        """Acquire a lock for another process.

        That process releases it by `unlock` with the same `lock_id`. That also cancels a lock that is still waiting.
        """
        acquired: Deferred[bool] = Deferred()
        self._waiting_locks.add(lock_id)
        spawn(self._hold_until_unlocked(key, lock_id, acquired), f"locking {key} for a worker")
        return acquired

    def unlock(self, lock_id: int) -> None:
        """Release a lock, or give it up if it is still waiting."""
        self._waiting_locks.discard(lock_id)
        released = self._held_locks.pop(lock_id, None)
        if released is not None:
            released.callback(None)

    async def _hold_until_unlocked(self, key: str, lock_id: int, acquired: Deferred[bool]) -> None:
        async with self._shared.locks.hold(key) as waited:
            if lock_id not in self._waiting_locks:
                return
            self._waiting_locks.remove(lock_id)
            released = self._held_locks[lock_id] = Deferred()
            acquired.callback(waited)
            await released

    # logins

    async def get_login(self, host: Host, refused: Login | None, client: str) -> ProvidedLogin | None:
        """Return the login for a registry; see `LoginProvider.get_login`."""
        return await self._shared.logins.get_login(host, refused, client)

    async def get_login_values(self, host: Host, refused: Login | None, client: str) -> list[str] | None:
        """Return the values of `get_login` for another process: the setting, and those of `login_values`."""
        provided = await self.get_login(host, refused, client)
        return None if provided is None else [provided.setting, *login_values(provided.login)]

    def record_pulls(self, rows: list[dict[str, Any]]) -> None:
        """Add rows to the history of pulls, if there is one."""
        for row in rows:
            self._shared.record_pull(row)

    def report_login(self, registry: str, setting: str, reason: str) -> None:
        """Record that a login is refused, or works again; see `EndedLogins.report`."""
        self._shared.ended_logins.report(registry, setting, reason)

    def report_pull(self, registry: str, repository: str) -> None:
        """Count a GET of a manifest; see `PullCounts.add`."""
        self._shared.pull_counts.add(registry, repository)

    # the overview

    async def get_overview(self, resource: str, viewer: Sequence[Any], arguments: Mapping[str, str]) -> dict[str, Any]:
        """Return the answer of the main process about a resource for a viewer."""
        return await self._shared.answers.overview(resource, viewer, arguments)

    # the doctor

    def report_refusal(self, client: str) -> None:
        """Note that a client has refused our certificate."""
        self._shared.refusing_clients.add(client)

    async def doctor_report(self, quick: bool) -> dict[str, Any]:
        """Return the report of `Doctor`."""
        return await self._shared.answers.doctor(quick)

    # the page

    async def ask_page_desk(self, question: str, arguments: Sequence[Any]) -> dict[str, Any]:
        """Return the answer of the main process to a question of the page."""
        return await self._shared.answers.page_desk(question, arguments)

    # the end

    def close(self) -> None:
        """Release the reservations and locks of a process that has exited."""
        self._waiting_locks.clear()
        for key in [key for key, owner in self._shared.owners.items() if owner is self]:
            self.release(key)
        for lock_id in list(self._held_locks):
            self.unlock(lock_id)


def login_values(login: Login) -> list[str]:
    """Return `login` as a list for a message to another process of the daemon."""
    return [login.user, login.token if isinstance(login, IdentityToken) else login.password]


def parse_login(values: list[str] | None) -> Login | None:
    """Return the login that `login_values` returned the values of."""
    if values is None:
        return None
    user, secret = values
    return IdentityToken(secret) if user == IDENTITY_TOKEN_USER else BasicCredentials(user, secret)


def _digests(texts: list[str]) -> list[Digest]:
    return [Digest.parse(text) for text in texts]


_ARGUMENT_PARSERS: Mapping[str, tuple[Callable[[Any], Any], ...]] = {
    "reserve": (IngestKey.parse, int, int, int, str),
    "record_commit": (IngestKey.parse, int),
    "release": (IngestKey.parse,),
    "record": (Digest.parse, int, str, str),
    "touch_all": (_digests,),
    "record_files": (int,),
    "usage": (),
    "lock": (str, int),
    "unlock": (int,),
    "get_login_values": (Host.parse, parse_login, str),
    "record_pulls": (list,),
    "report_login": (str, str, str),
    "get_overview": (str, list, dict),
    "report_pull": (str, str),
    "report_refusal": (str,),
    "doctor_report": (bool,),
    "ask_page_desk": (str, list),
}
"""The methods of `LocalCoordinator` that a worker calls by RPC, with the parsers of their arguments."""


def rpc_handlers(coordinator: LocalCoordinator) -> dict[str, Callable[..., Any]]:
    """Return the RPC handlers of a worker's coordinator."""

    def handler(name: str) -> Callable[..., Any]:
        method, parsers = getattr(coordinator, name), _ARGUMENT_PARSERS[name]
        return lambda *arguments: method(*(parse(value) for parse, value in zip(parsers, arguments, strict=True)))

    return {name: handler(name) for name in _ARGUMENT_PARSERS}
