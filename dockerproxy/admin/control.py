"""The HTTP API on a Unix socket that the `dockerproxy` command uses.

    GET  /v1/status
    GET  /v1/repositories                       ls                        lines
    GET  /v1/repositories?name=NAME[&where=W]   ls REPO                   lines
    POST /v1/remove   {"names", "where"?}       rm
    POST /v1/collect  {"delete_untagged"?, "dry_run"?, "grace"?, "list"?}  gc  lines
    POST /v1/import   {"directory", "force"?}   import                    lines
    POST /v1/check    {"cached"?}               check                     lines

``lines`` responses are newline-delimited JSON, one event per line, sent as the work proceeds:
``{"event": "progress", "phase", "done", "total"}``, the items (``repository``, ``manifest``, ``removed``, ``finding``),
and at the end ``{"event": "result", …}`` or ``{"event": "error", "code", "message"}``. An error before the first line
is sent as ``{"error": {"code", "message", "suggestions"}}``. Only one of gc, import and check runs at a time. It is
cancelled if its client disconnects.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import attrs
from attrs import field, frozen
from twisted.internet.defer import CancelledError
from twisted.logger import Logger

from dockerproxy.admin import inventory
from dockerproxy.admin.deletion import Deleter
from dockerproxy.admin.ndjson import JSON_FIELDS, NDJSONResponse
from dockerproxy.admin.resolver import CACHED, HOSTED, ImageResolver, InvalidArgument, NotFound, StoreView
from dockerproxy.cache.space import CacheSpaceManager
from dockerproxy.concurrency import in_thread
from dockerproxy.errors import RegistryError
from dockerproxy.http.request import ClientDisconnected, Request
from dockerproxy.oci.routes import parse_query
from dockerproxy.store.cooperative import CooperativeThread, Progress
from dockerproxy.store.importer import Importer, NotARegistry, Skipped
from dockerproxy.store.scrub import Finding, Scrubber
from dockerproxy.store.sweep import GRACE_PERIOD, RemovedItem, Sweeper

_MAX_BODY = 64 * 1024

log = Logger()


class ControlError(Exception):
    """A request that is refused: the status and code of the response, and a message for the user."""

    def __init__(self, status: int, code: str, message: str, suggestions: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.suggestions = status, code, message, suggestions


class ExclusiveJobs:
    """Runs long operations one at a time, because concurrent ones would invalidate each other's results."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.current: dict[str, Any] | None = None

    async def run(self, name: str, job: Coroutine[Any, Any, Any]) -> Any:
        """Return the result of `job`. Raise `ControlError` if another job is running."""
        if self.current is not None:
            job.close()
            raise ControlError(409, "BUSY", f"the daemon is busy: {self.current['name']} is running; try again later")
        self.current = {"name": name, "since": self._clock()}
        log.info("{operation} started", operation=name)
        try:
            return await job
        finally:
            self.current = None
            log.info("{operation} ended", operation=name)


@frozen
class Control:
    """Handles the requests of the control API."""

    _reactor: Any
    _resolver: ImageResolver
    _space: CacheSpaceManager
    _deleter: Deleter
    _sweeper: Sweeper
    _importer: Importer
    _jobs: ExclusiveJobs
    _clock: Callable[[], float]
    _thread: CooperativeThread = field(init=False)
    _start_time: float = field(init=False)

    @_thread.default
    def _make_thread(self) -> CooperativeThread:
        return CooperativeThread(self._reactor)

    @_start_time.default
    def _now(self) -> float:
        return self._clock()

    async def handle(self, request: Request) -> None:
        """Respond to `request`. Errors become responses, except a disconnect or a cancellation."""
        response = NDJSONResponse(self._reactor, request)
        try:
            await self._dispatch(request, response)
        except ControlError as error:
            response.send_error(error.status, error.code, error.message, error.suggestions)
        except NotFound as error:
            response.send_error(404, "NOT_FOUND", str(error), error.suggestions)
        except (InvalidArgument, NotARegistry) as error:
            response.send_error(400, "NOT_UNDERSTOOD", str(error))
        except RegistryError as error:
            response.send_error(error.status, error.code, error.message)
        except OSError as error:
            log.failure("control request {path} failed with a disk error", path=request.path)
            response.send_error(500, "DISK", f"{error.filename or 'the disk'}: {error.strerror}")
        except (ClientDisconnected, CancelledError):
            raise
        except Exception:
            log.failure("control request {path} failed", path=request.path)
            response.send_error(500, "INTERNAL", "internal error in the daemon; see its log")

    async def _dispatch(self, request: Request, response: NDJSONResponse) -> None:
        match request.method, request.path:
            case "GET", "/v1/status":
                request.respond(200, JSON_FIELDS, json.dumps(await in_thread(self._reactor, self._status)).encode())
            case "GET", "/v1/repositories":
                await self._list(dict(parse_query(request.query)), response)
            case "POST", "/v1/remove":
                await self._delete(await _parse_arguments(request, "names", names=list, where=str), request)
            case "POST", "/v1/collect":
                arguments = await _parse_arguments(
                    request, delete_untagged=bool, dry_run=bool, grace=(int, float), list=bool
                )
                await self._jobs.run("gc", self._collect(arguments, response))
            case "POST", "/v1/import":
                arguments = await _parse_arguments(request, "directory", directory=str, force=bool)
                await self._jobs.run("import", self._import(arguments, response))
            case "POST", "/v1/check":
                arguments = await _parse_arguments(request, cached=bool)
                await self._jobs.run("check", self._check(arguments, response))
            case _:
                raise ControlError(
                    404,
                    "UNSUPPORTED",
                    f"this daemon does not support {request.method} {request.path}; is the command of another version?",
                )

    def _status(self) -> dict[str, Any]:
        return {
            "started": self._start_time,
            "operation": self._jobs.current,
            "cache": {"bytes": self._space.index.total, "limit": self._space.index.limit},
            "shelves": {store.kind: _storage_info(store) for store in self._resolver.stores},
        }

    async def _list(self, query: dict[str, str], response: NDJSONResponse) -> None:
        rows: list[inventory.Row] = []

        async def stream_rows(event: str, steps: Iterator[None]) -> None:
            async def send_rows() -> None:
                for row in rows:
                    response.send(event, **row)
                rows.clear()
                await response.drain()

            await self._thread.run(steps, after_slice=send_rows)

        kind = query.get("where")
        if "name" in query:
            ref = await in_thread(self._reactor, self._resolver.resolve, query["name"], kind)
            await stream_rows("manifest", inventory.list_manifests(ref, rows))
            response.finish(where=ref.store.kind, name=ref.repository)
        else:
            for store in self._resolver.stores:
                if kind in (None, store.kind):
                    await stream_rows("repository", inventory.list_repositories(store, rows))
            response.finish()

    async def _delete(self, arguments: dict[str, Any], request: Request) -> None:
        kind = arguments.get("where")
        # Resolve all names first, so that an unknown name changes nothing.
        refs = [await in_thread(self._reactor, self._resolver.resolve, str(name), kind) for name in arguments["names"]]
        results = []
        for ref in refs:
            result = await self._deleter.delete(ref)
            log.info("removed {name} ({kind})", name=str(ref), kind=ref.store.kind)
            results.append({"where": ref.store.kind, "name": str(ref), **attrs.asdict(result)})
        request.respond(200, JSON_FIELDS, json.dumps({"removed": results}).encode())

    async def _collect(self, arguments: dict[str, Any], response: NDJSONResponse) -> None:
        list_items = arguments.pop("list", True)

        def on_item(item: RemovedItem) -> None:
            if list_items:
                response.send(
                    "removed", kind=item.kind, digest=str(item.digest), repository=item.repository, size=item.size
                )

        grace = arguments.pop("grace", GRACE_PERIOD)
        try:
            result = await self._sweeper.sweep(
                **arguments, grace=grace, progress=Progress(response.send_progress, on_item, response.drain)
            )
        except ValueError as error:
            raise InvalidArgument(str(error)) from None
        response.finish(**attrs.asdict(result))

    async def _import(self, arguments: dict[str, Any], response: NDJSONResponse) -> None:
        def on_skipped(item: Skipped) -> None:
            response.send("finding", kind=item.kind, what=item.message)

        directory = Path(arguments["directory"])
        if not directory.is_absolute() or "\0" in str(directory):
            raise InvalidArgument("the directory to import must be an absolute path")
        result = await self._importer.import_from(
            directory,
            force=arguments.get("force", False),
            progress=Progress(response.send_progress, on_skipped, response.drain),
        )
        response.finish(**attrs.asdict(result))

    async def _check(self, arguments: dict[str, Any], response: NDJSONResponse) -> None:
        damaged_digests = []

        def on_finding(finding: Finding) -> None:
            response.send("finding", kind=finding.kind, what=finding.message, repository=finding.repository)
            if finding.kind == "damaged":
                damaged_digests.append(finding.digest)

        kind = CACHED if arguments.get("cached", False) else HOSTED
        store = next(store for store in self._resolver.stores if store.kind == kind)
        scrubber = Scrubber(self._reactor, store.layout, kind == HOSTED)
        result = await scrubber.scrub(Progress(response.send_progress, on_finding, response.drain))
        if kind == CACHED:
            await self._space.purge(digest for digest in damaged_digests if digest is not None)
        response.finish(**attrs.asdict(result))


def _storage_info(store: StoreView) -> dict[str, Any]:
    """Return the directory of `store` and the free bytes of its disk. Blocks."""
    try:
        status = os.statvfs(store.layout.root)
    except OSError:
        return {"directory": str(store.layout.root), "free": None}
    return {"directory": str(store.layout.root), "free": status.f_bavail * status.f_frsize}


async def _parse_arguments(request: Request, required: str | None = None, **types: Any) -> dict[str, Any]:
    """Return the arguments in the JSON body of `request`.

    `types` maps the known arguments to their types. Raise `ControlError` if an argument is unknown, has another type,
    or if `required` is missing.
    """
    content = await request.read_all(_MAX_BODY)
    try:
        arguments = json.loads(content or b"{}")
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        raise ControlError(400, "NOT_UNDERSTOOD", "the request's body is not a JSON object")
    for name, value in arguments.items():
        if name not in types or not isinstance(value, types[name]):
            raise ControlError(400, "NOT_UNDERSTOOD", f"the argument {name!r} is unknown or has a wrong type")
    if required is not None and required not in arguments:
        raise ControlError(400, "NOT_UNDERSTOOD", f"the argument {required!r} is missing")
    return arguments
