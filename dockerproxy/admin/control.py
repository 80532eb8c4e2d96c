"""The HTTP API on a Unix socket that the `dockerproxy` command uses.

    GET  /v1/status
    GET  /v1/repositories[?match=GLOB][&where=W]  ls                      lines
    GET  /v1/repositories?name=NAME[&where=W]   ls REPO                   lines
    GET  /v1/names[?prefix=TEXT][&where=W]      names for the shell to propose
    POST /v1/remove   {"names", "where"?, "force"?}  rm
    POST /v1/collect  {"delete_untagged"?, "dry_run"?, "grace"?, "list"?}  gc  lines
    POST /v1/import   {"directory", "force"?}   import                    lines
    POST /v1/check    {"cached"?}               check                     lines

``lines`` responses are newline-delimited JSON, one event per line, sent as the work proceeds:
``{"event": "progress", "phase", "done", "total"}``, the items (``repository``, ``manifest``, ``removed``, ``finding``),
and at the end ``{"event": "result", …}`` or ``{"event": "error", "code", "message"}``. An error before the first line
is sent as ``{"error": {"code", "message", "suggestions"}}``. Only one of gc, import and check runs at a time, in a
process of its own (`operations`). It stops if its client disconnects.
"""

from __future__ import annotations

import json
import os
import pwd
from collections.abc import Awaitable, Callable, Iterator, Mapping
from itertools import islice
from typing import Any, TypeVar

import attrs
from attrs import field, frozen
from twisted.internet.defer import CancelledError, Deferred, TimeoutError
from twisted.logger import Logger

from dockerproxy.admin import inventory
from dockerproxy.admin.arguments import (
    FLAG,
    MAX_BODY,
    NAME,
    NAMES,
    PATH,
    SECONDS,
    TEXT,
    Argument,
    InvalidArguments,
    one_of,
    parse_body,
    parse_pairs,
)
from dockerproxy.admin.deletion import Deleter
from dockerproxy.admin.ndjson import JSON_FIELDS, NDJSONResponse
from dockerproxy.admin.operations import Event, OperationError, Operations
from dockerproxy.admin.resolver import CACHED, HOSTED, ImageResolver, InvalidArgument, NotFound, StoreView
from dockerproxy.cache.ended_logins import EndedLogins
from dockerproxy.cache.space import CacheSpaceManager
from dockerproxy.concurrency import in_thread
from dockerproxy.errors import RegistryError
from dockerproxy.http.request import ClientDisconnected, Request
from dockerproxy.oci.names import Digest
from dockerproxy.oci.routes import parse_query
from dockerproxy.registry.hosted_rules import HostedRules
from dockerproxy.registry.principal import CONTROL_SOCKET, Principal
from dockerproxy.store.disk_access import DiskAccess
from dockerproxy.store.write_probe import StoreProbe, StoreState

_STORE = one_of(HOSTED, CACHED)
LIST = {"name": NAME, "where": _STORE, "match": NAME}
COMPLETE = {"prefix": TEXT, "where": _STORE}
REMOVE = {"names": NAMES, "where": _STORE, "force": FLAG}
COLLECT = {"delete_untagged": FLAG, "dry_run": FLAG, "grace": SECONDS, "list": FLAG}
IMPORT = {"directory": PATH, "force": FLAG}
CHECK = {"cached": FLAG}
"""The arguments of each request."""

_DISK_TIMEOUT = 2.0  # seconds that a status waits for REGISTRY_DIR, which may be on a machine that does not answer
_ROWS_AT_ONCE = 50  # of a list: they are read in a thread, then sent

_OPERATION_STATUSES = {"NOT_UNDERSTOOD": 400, "BUSY": 409}  # by the code of an `OperationError`; otherwise 500

T = TypeVar("T")

log = Logger()


class ControlError(Exception):
    """A request that is refused: the status and code of the response, and a message for the user."""

    def __init__(self, status: int, code: str, message: str, suggestions: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.suggestions = status, code, message, suggestions


async def _ignore_event(event: Event) -> None:
    pass


def _nothing(row: Event) -> Event:
    return {}


UserName = Callable[[int], Awaitable[str]]
"""Returns the name of the local user with an ID."""

DebugReport = Callable[[], Awaitable[dict[str, Any]]]
"""Returns what all processes are doing, as a JSON value."""

DaemonFacts = Callable[[], dict[str, Any]]
"""Returns the version, the processes, the ports and the CA of the daemon, as a JSON value: from memory, at once."""

PullCounter = Callable[[], Mapping[str, int]]
"""Returns the pulls of late by repository, as people write its name; that of a hosted one begins with ``hosted/``.

It is empty if pulls are not counted. It blocks.
"""

ControlHandler = Callable[[Request, NDJSONResponse, Principal], Awaitable[None]]
"""Responds to a request of the local user `Principal`. It may raise the errors that `Control.handle` renders."""


@frozen
class Control:
    """Handles the requests of the control API."""

    _reactor: Any
    _resolver: ImageResolver
    _space: CacheSpaceManager
    _deleter: Deleter
    _operations: Operations
    _rules: HostedRules
    _registry_disk: DiskAccess
    _ended_logins: EndedLogins
    _debug_report: DebugReport
    _facts: DaemonFacts
    _user_name: UserName
    _clock: Callable[[], float]
    _handlers: Mapping[tuple[str, str], ControlHandler] = field(factory=dict)
    """Those of other parts of the daemon, by method and path."""
    _pulls: PullCounter = dict
    _bucket: StoreProbe | None = None
    """The probe of the bucket, if the hosted registry is in one."""
    _bucket_address: str = ""
    """The address of the bucket, if the hosted registry is in one."""
    _start_time: float = field(init=False)

    @_start_time.default
    def _now(self) -> float:
        return self._clock()

    async def handle(self, request: Request) -> None:
        """Respond to `request`. Errors become responses, except a disconnect or a cancellation."""
        response = NDJSONResponse(request)
        try:
            await self._dispatch(request, response)
        except ControlError as error:
            response.send_error(error.status, error.code, error.message, error.suggestions)
        except NotFound as error:
            response.send_error(404, "NOT_FOUND", str(error), error.suggestions)
        except (InvalidArgument, InvalidArguments) as error:
            response.send_error(400, "NOT_UNDERSTOOD", str(error))
        except OperationError as error:
            response.send_error(_OPERATION_STATUSES.get(error.code, 500), error.code, error.message)
        except RegistryError as error:
            response.send_error(error.status, error.code, error.message)
        except OSError as error:
            reason = f"{error.filename or 'the disk'}: {error.strerror or error}"
            log.error("control request {path} failed: {reason}", path=request.path, reason=reason)
            response.send_error(500, "DISK", reason)
        except (ClientDisconnected, CancelledError):
            raise
        except Exception:
            log.failure("control request {path} failed", path=request.path)
            response.send_error(500, "INTERNAL", "internal error in the daemon; see its log")

    async def _dispatch(self, request: Request, response: NDJSONResponse) -> None:
        handler = self._handlers.get((request.method, request.path))
        if handler is not None:
            await handler(request, response, await self._principal(request))
            return
        match request.method, request.path:
            case "GET", "/v1/status":
                request.respond(200, JSON_FIELDS, json.dumps(await self.status()).encode())
            case "GET", "/v1/debug":
                request.respond(200, JSON_FIELDS, json.dumps(await self._debug_report()).encode())
            case "GET", "/v1/names":
                await self._names(request, parse_pairs(parse_query(request.query), COMPLETE))
            case "GET", "/v1/repositories":
                await self._list(parse_pairs(parse_query(request.query), LIST), response)
            case "POST", "/v1/remove":
                await self._delete(request, await _parse_arguments(request, REMOVE, "names"))
            case "POST", "/v1/collect":
                arguments = await _parse_arguments(request, COLLECT)
                await self._run_operation(request, "gc", {"root": self._root(HOSTED), **arguments}, response)
            case "POST", "/v1/import":
                arguments = await _parse_arguments(request, IMPORT, "directory")
                await self._run_operation(request, "import", {"root": self._root(HOSTED), **arguments}, response)
            case "POST", "/v1/check":
                arguments = await _parse_arguments(request, CHECK)
                await self._check(request, CACHED if arguments.get("cached", False) else HOSTED, response)
            case _:
                raise ControlError(
                    404,
                    "UNSUPPORTED",
                    f"this daemon does not support {request.method} {request.path}; is the command of another version?",
                )

    async def status(self) -> dict[str, Any]:
        """Return the state of the daemon as a JSON value."""
        return {
            **self._facts(),
            "started": self._start_time,
            "operation": self._operations.current,
            "refused_logins": self._ended_logins.report_list(),
            "cache": {"bytes": self._space.index.total, "limit": self._space.index.limit},
            "shelves": await self._storages(),
        }

    async def _storages(self) -> dict[str, Any]:
        on_disk = (store for store in self._resolver.stores if self._bucket is None or store.kind != HOSTED)
        storages = {store.kind: await self._storage_info(store) for store in on_disk}
        if self._bucket is None:
            return storages
        bucket: dict[str, Any] = {"directory": self._bucket.place, "file_system": None, "free": None}
        result = await self._bucket.probe()
        if result.state is not StoreState.WRITABLE:
            bucket["error"] = result.details or result.sentence
        return {HOSTED: bucket, **storages}

    async def _storage_info(self, store: StoreView) -> dict[str, Any]:
        info = {"directory": str(store.layout.root), "file_system": None, "free": None}
        try:
            if store.kind != HOSTED:
                return {**info, "free": await in_thread(self._reactor, _free_bytes, store)}
            info["file_system"] = self._registry_disk.file_system
            free = Deferred.fromCoroutine(self._registry_disk.read(_free_bytes, store))
            return {**info, "free": await free.addTimeout(_DISK_TIMEOUT, self._reactor)}
        except RegistryError as error:
            return {**info, "error": error.message}
        except TimeoutError:
            return {**info, "error": f"REGISTRY_DIR has not answered within {_DISK_TIMEOUT:g} s"}

    async def _list(self, query: dict[str, str], response: NDJSONResponse) -> None:
        async def stream_rows(
            store: StoreView, event: str, rows: Iterator[inventory.Row], more: Callable[[Event], Event] = _nothing
        ) -> None:
            def read_some() -> list[inventory.Row]:
                return list(islice(rows, _ROWS_AT_ONCE))

            while batch := await self._in_thread(store.kind, read_some):
                response.send_all(event, [{**row, **more(row)} for row in batch])
                await response.drain()

        kind, resolver = query.get("where"), self._resolver.snapshot()
        if "name" in query:
            ref = await self._in_thread(kind, resolver.resolve, query["name"], kind)
            await stream_rows(ref.store, "manifest", inventory.list_manifests(ref))
            response.finish(where=ref.store.kind, name=ref.name)
        else:
            pulls = await in_thread(self._reactor, self._pulls)

            def count_pulls(row: Event) -> Event:
                name = row["name"] if row["where"] == CACHED else f"hosted/{row['name']}"
                return {"pulls": pulls.get(name, 0) if pulls else None}

            for store in resolver.stores:
                if kind in (None, store.kind):
                    rows = inventory.list_repositories(store, query.get("match"))
                    await stream_rows(store, "repository", rows, count_pulls)
            response.finish()

    async def _names(self, request: Request, query: dict[str, str]) -> None:
        kind = query.get("where")
        names = await self._in_thread(kind, self._resolver.snapshot().complete, query.get("prefix", ""), kind)
        request.respond(200, JSON_FIELDS, json.dumps({"names": names}).encode())

    async def _in_thread(self, kind: str | None, function: Callable[..., T], *args: object) -> T:
        """Return the result of `function`, which reads the store `kind`, or both.

        The cache alone does not wait for REGISTRY_DIR, which may be on a machine that does not answer.
        """
        if kind == CACHED:
            return await in_thread(self._reactor, function, *args)
        return await self._registry_disk.run(function, *args)

    async def _principal(self, request: Request) -> Principal:
        """Return the local user that sent the request, and report it in the access log."""
        uid = request.peer_uid
        request.user = None if uid is None else await self._user_name(uid)
        return Principal(request.user, CONTROL_SOCKET, request.user_agent)

    async def _delete(self, request: Request, arguments: dict[str, Any]) -> None:
        principal = await self._principal(request)
        kind = arguments.get("where")
        # Resolve and check all names first, so that a wrong one changes nothing.
        resolver = self._resolver.snapshot()
        refs = [await self._in_thread(kind, resolver.resolve, name, kind) for name in arguments["names"]]
        for ref in refs:
            reason = None if arguments.get("force", False) else await self._deleter.reason_to_keep(ref)
            if reason is not None:
                raise ControlError(403, "NEEDED", f"{reason}, or use --force (nothing was removed)")
        results = []
        for ref in refs:
            result = await self._deleter.delete(principal, ref)
            results.append({"where": ref.store.kind, "name": str(ref), **attrs.asdict(result)})
        request.respond(200, JSON_FIELDS, json.dumps({"removed": results}).encode())

    async def _check(self, request: Request, kind: str, response: NDJSONResponse) -> None:
        async def on_event(event: Event) -> None:
            # The file is in quarantine already, but the index of the cache still counts the blob.
            if kind == CACHED and event.get("kind") == "damaged":
                await self._space.purge([Digest.parse(event["digest"])])

        sparse = self._rules.allow_sparse_indexes
        options = {"root": self._root(kind), "links": kind == HOSTED, "sparse": sparse}
        await self._run_operation(request, "check", options, response, on_event)

    async def _run_operation(
        self,
        request: Request,
        name: str,
        options: dict[str, Any],
        response: NDJSONResponse,
        on_event: Callable[[Event], Awaitable[None]] = _ignore_event,
    ) -> None:
        async def relay(event: Event) -> None:
            await on_event(event)
            response.send(**event)
            await response.drain()

        principal = await self._principal(request)
        response.finish(**await self._operations.run(principal, name, options, relay))

    def _root(self, kind: str) -> str:
        if kind == HOSTED and self._bucket is not None:
            return self._bucket_address
        return next(str(store.layout.root) for store in self._resolver.stores if store.kind == kind)


def local_user_name(uid: int) -> str:
    """Return the name of the user of this machine with the ID `uid`. Blocks, as another machine may know the names."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def _free_bytes(store: StoreView) -> int | None:
    """Return the free bytes of the disk of `store`; None if they are not known. Blocks."""
    try:
        status = os.statvfs(store.layout.root)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize


async def _parse_arguments(
    request: Request, known: Mapping[str, Argument], required: str | None = None
) -> dict[str, Any]:
    return parse_body(await request.read_all(MAX_BODY), known, required)
