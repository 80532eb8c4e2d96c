"""The worker's side of the state that all processes share, which calls the main process by RPC."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from twisted.internet.defer import Deferred, TimeoutError

from dockerproxy.errors import ServiceOverloaded
from dockerproxy.oci.credentials import Login
from dockerproxy.oci.names import Digest, Host
from dockerproxy.store.layout import IngestKey
from dockerproxy.upstream.login_provider import ProvidedLogin
from dockerproxy.workers.coordinator import Coordinator, login_values, parse_login
from dockerproxy.workers.rpc import RPC, RemoteError

_USE_REPORT_INTERVAL = 5.0  # seconds over which uses of blobs are collected into one message
_MAX_USES_PER_REPORT = 1000  # uses in one message
_DOCTOR_TIMEOUT = 20.0  # seconds; a run takes at most 15
_ANSWER_TIMEOUT = 10.0  # seconds until people are told that the main process does not answer


class RemoteCoordinator(Coordinator):
    """Calls the worker's `LocalCoordinator` in the main process."""

    def __init__(self, reactor: Any, rpc: RPC) -> None:
        self._reactor = reactor
        self._rpc = rpc
        self._unreported_uses: set[Digest] = set()
        self._last_lock_id = 0

    async def reserve(self, key: IngestKey, size: int, expected_size: int, existing_size: int, client: str) -> str:
        """Reserve space for a download; see `CacheSpaceManager.reserve`. Refuse if the main process is gone."""
        try:
            return str(await self._rpc.call("reserve", str(key), size, expected_size, existing_size, client))
        except RemoteError as error:
            return str(error)  # the blob is not cached, but its clients still receive it

    async def record_commit(self, key: IngestKey, size: int) -> None:
        """Count the blob that a reserved download has become."""
        self._rpc.notify("record_commit", str(key), size)

    def release(self, key: IngestKey) -> None:
        """Release the reservation of `key`."""
        self._rpc.notify("release", str(key))

    async def record(self, digest: Digest, size: int, client: str, registry: str) -> None:
        """Count a blob that was written."""
        self._rpc.notify("record", str(digest), size, client, registry)

    def touch(self, digest: Digest) -> None:
        """Record that a blob is used now."""
        if not self._unreported_uses:
            self._reactor.callLater(_USE_REPORT_INTERVAL, self._report_uses)
        self._unreported_uses.add(digest)
        if len(self._unreported_uses) >= _MAX_USES_PER_REPORT:
            self._report_uses()

    def record_files(self, count: int) -> None:
        """Count new links and records."""
        self._rpc.hint("record_files", count)

    async def usage(self) -> tuple[int, int]:
        """Return the bytes used by the cache, and their limit. Raise `RemoteError`."""
        used, limit = await self._rpc.call("usage")
        return int(used), int(limit)

    @asynccontextmanager
    async def hold(self, key: str) -> AsyncIterator[bool]:
        """Hold the lock of `key`; see `KeyedLock.hold`. Raise `RemoteError`."""
        self._last_lock_id += 1
        lock_id = self._last_lock_id
        try:
            yield bool(await self._rpc.call("lock", key, lock_id))
        finally:
            self._rpc.notify("unlock", lock_id)  # also if the caller was cancelled while it waited

    async def get_login(self, host: Host, refused: Login | None, client: str) -> ProvidedLogin | None:
        """Return the login for a registry; see `LoginProvider.get_login`. Return None if the main process is gone."""
        values = None if refused is None else login_values(refused)
        try:
            answer = await self._rpc.call("get_login_values", host.authority, values, client)
        except RemoteError:
            return None
        login = None if answer is None else parse_login(answer[1:])
        return None if login is None else ProvidedLogin(login, str(answer[0]))

    def record_pulls(self, rows: list[dict[str, Any]]) -> None:
        """Add rows to the history of pulls."""
        self._rpc.hint("record_pulls", rows)

    def report_login(self, registry: str, setting: str, reason: str) -> None:
        """Report a login that is refused, or works again."""
        self._rpc.hint("report_login", registry, setting, reason)

    async def get_overview(self, resource: str, viewer: Sequence[Any], arguments: Mapping[str, str]) -> dict[str, Any]:
        """Return the answer of the main process. Raise `ServiceOverloaded` if there is none in time."""
        return await self._ask("get_overview", resource, list(viewer), dict(arguments))

    async def ask_page_desk(self, question: str, arguments: Sequence[Any]) -> dict[str, Any]:
        """Return the answer of the main process. Raise `ServiceOverloaded` if there is none in time."""
        return await self._ask("ask_page_desk", question, list(arguments))

    async def _ask(self, name: str, *arguments: Any, timeout: float = _ANSWER_TIMEOUT) -> dict[str, Any]:
        call = Deferred.fromCoroutine(self._rpc.call(name, *arguments))
        try:
            answer: dict[str, Any] = await call.addTimeout(timeout, self._reactor)
        except (RemoteError, TimeoutError):
            raise ServiceOverloaded(
                f"the main process of docker-registry-proxy has not answered within {timeout:.0f} seconds",
                headers=[("Retry-After", f"{_ANSWER_TIMEOUT:.0f}")],
            ) from None
        return answer

    def report_pull(self, registry: str, repository: str) -> None:
        """Report a GET of a manifest, which a registry may count."""
        self._rpc.hint("report_pull", registry, repository)

    def report_refusal(self, client: str) -> None:
        """Report a client that has refused our certificate."""
        self._rpc.hint("report_refusal", client)

    async def doctor_report(self, quick: bool) -> dict[str, Any]:
        """Return the report of the main process's `Doctor`. Raise `ServiceOverloaded` if there is none in time."""
        return await self._ask("doctor_report", quick, timeout=_ANSWER_TIMEOUT if quick else _DOCTOR_TIMEOUT)

    def _report_uses(self) -> None:
        digests, self._unreported_uses = self._unreported_uses, set()
        if digests:
            self._rpc.hint("touch_all", [str(digest) for digest in digests])
