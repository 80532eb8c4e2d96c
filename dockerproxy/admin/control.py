"""What `dockerproxy`, the command, asks of the daemon: a small HTTP API on a Unix socket.

    GET  /v1/status
    GET  /v1/repositories                       ls                        lines
    GET  /v1/repositories?name=NAME[&where=W]   ls REPO                   lines
    POST /v1/remove   {"names", "where"?}       rm
    POST /v1/collect  {"delete_untagged"?, "dry_run"?, "grace"?, "list"?}  gc  lines
    POST /v1/import   {"directory", "force"?}   import                    lines
    POST /v1/check    {"cached"?}               check                     lines

``lines`` are JSON objects, one each, sent as things happen: ``{"event": "progress", "phase", "done", "total"}``, what
is found (``repository``, ``manifest``, ``removed``, ``finding``), and at the end ``{"event": "result", …}`` or
``{"event": "error", "code", "message"}``. A request that is refused at once gets ``{"error": {"code", "message",
"suggestions"}}``. Of the last three one runs at a time; it ends when its client goes.
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
from dockerproxy.admin.lines import Lines
from dockerproxy.admin.names import CACHED, HOSTED, Names, NotFound, NotUnderstood, Shelf
from dockerproxy.admin.removing import Remover
from dockerproxy.cache.room import CacheRoom
from dockerproxy.errors import RegistryError
from dockerproxy.http.request import ClientGone, Request
from dockerproxy.oci.routes import parse_query
from dockerproxy.store.check import Checker, Finding
from dockerproxy.store.importing import Importer, NoRegistry, Untaken
from dockerproxy.store.slices import Slices, Watch
from dockerproxy.store.sweep import GRACE, Removed, Sweeper
from dockerproxy.tasks import in_thread

_MAX_BODY = 64 * 1024
_JSON = [("Content-Type", "application/json"), ("Cache-Control", "no-store")]

log = Logger()


class Refused(Exception):
    """A request that cannot be done as asked: the status and code of the answer, and a sentence."""

    def __init__(self, status: int, code: str, message: str, suggestions: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.suggestions = status, code, message, suggestions


class Operations:
    """Long operations, of which one runs at a time: they would spoil each other's results."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.under_way: dict[str, Any] | None = None

    async def alone(self, name: str, work: Coroutine[Any, Any, Any]) -> Any:
        """Return what `work` gives; raise `Refused` while another is under way."""
        if self.under_way is not None:
            work.close()
            raise Refused(409, "BUSY", f"the daemon is busy ({self.under_way['name']}); wait for that to end")
        self.under_way = {"name": name, "since": self._clock()}
        log.info("{operation} began", operation=name)
        try:
            return await work
        finally:
            self.under_way = None
            log.info("{operation} ended", operation=name)


@frozen
class Control:
    """Answers the requests."""

    _reactor: Any
    _names: Names
    _room: CacheRoom
    _remover: Remover
    _sweeper: Sweeper
    _importer: Importer
    _operations: Operations
    _clock: Callable[[], float]
    _slices: Slices = field(init=False)
    _started: float = field(init=False)

    @_slices.default
    def _make_slices(self) -> Slices:
        return Slices(self._reactor)

    @_started.default
    def _now(self) -> float:
        return self._clock()

    async def answer(self, request: Request) -> None:
        """Answer `request`."""
        lines = Lines(self._reactor, request)
        try:
            await self._answer(request, lines)
        except Refused as refused:
            lines.refuse(refused.status, refused.code, refused.message, refused.suggestions)
        except NotFound as error:
            lines.refuse(404, "NOT_FOUND", str(error), error.suggestions)
        except (NotUnderstood, NoRegistry) as error:
            lines.refuse(400, "NOT_UNDERSTOOD", str(error))
        except RegistryError as error:
            lines.refuse(error.status, error.code, error.message)
        except OSError as error:
            log.failure("{path} failed", path=request.path)
            lines.refuse(500, "DISK", f"{error.filename or 'the disk'}: {error.strerror}")
        except (ClientGone, CancelledError):
            raise
        except Exception:
            log.failure("{path} failed", path=request.path)
            lines.refuse(500, "INTERNAL", "something went wrong in the daemon, its log has it")

    async def _answer(self, request: Request, lines: Lines) -> None:
        match request.method, request.path:
            case "GET", "/v1/status":
                request.answer(200, _JSON, json.dumps(await in_thread(self._reactor, self._status)).encode())
            case "GET", "/v1/repositories":
                await self._list(dict(parse_query(request.query)), lines)
            case "POST", "/v1/remove":
                await self._remove(await _arguments(request, "names", names=list, where=str), request)
            case "POST", "/v1/collect":
                arguments = await _arguments(request, delete_untagged=bool, dry_run=bool, grace=(int, float), list=bool)
                await self._operations.alone("gc", self._collect(arguments, lines))
            case "POST", "/v1/import":
                arguments = await _arguments(request, "directory", directory=str, force=bool)
                await self._operations.alone("import", self._import(arguments, lines))
            case "POST", "/v1/check":
                arguments = await _arguments(request, cached=bool)
                await self._operations.alone("check", self._check(arguments, lines))
            case _:
                raise Refused(404, "UNSUPPORTED", f"this daemon has no {request.method} {request.path}")

    def _status(self) -> dict[str, Any]:
        return {
            "started": self._started,
            "operation": self._operations.under_way,
            "cache": {"bytes": self._room.usage.total, "limit": self._room.usage.limit},
            "shelves": {shelf.where: _place(shelf) for shelf in self._names.shelves},
        }

    async def _list(self, query: dict[str, str], lines: Lines) -> None:
        rows: list[inventory.Row] = []

        async def run(event: str, steps: Iterator[None]) -> None:
            async def tell() -> None:
                for row in rows:
                    lines.send(event, **row)
                rows.clear()
                await lines.ready()

            await self._slices.run(steps, after_slice=tell)

        where = query.get("where")
        if "name" in query:
            named = await in_thread(self._reactor, self._names.find, query["name"], where)
            await run("manifest", inventory.manifests(named, rows))
            lines.finish(where=named.shelf.where, name=named.repository)
        else:
            for shelf in self._names.shelves:
                if where in (None, shelf.where):
                    await run("repository", inventory.repositories(shelf, rows))
            lines.finish()

    async def _remove(self, arguments: dict[str, Any], request: Request) -> None:
        where = arguments.get("where")
        # All of them are found before any of them goes.
        found = [await in_thread(self._reactor, self._names.find, str(name), where) for name in arguments["names"]]
        removed = []
        for named in found:
            gone = await self._remover.remove(named)
            log.info("{named} was removed ({where})", named=str(named), where=named.shelf.where)
            removed.append({"where": named.shelf.where, "name": str(named), **attrs.asdict(gone)})
        request.answer(200, _JSON, json.dumps({"removed": removed}).encode())

    async def _collect(self, arguments: dict[str, Any], lines: Lines) -> None:
        listed = arguments.pop("list", True)

        def removed(thing: Removed) -> None:
            if listed:
                lines.send(
                    "removed", kind=thing.kind, digest=str(thing.digest), repository=thing.repository, size=thing.size
                )

        grace = arguments.pop("grace", GRACE)
        try:
            swept = await self._sweeper.sweep(
                **arguments, grace=grace, watch=Watch(lines.progress, removed, lines.ready)
            )
        except ValueError as error:
            raise NotUnderstood(str(error)) from None
        lines.finish(**attrs.asdict(swept))

    async def _import(self, arguments: dict[str, Any], lines: Lines) -> None:
        def untaken(thing: Untaken) -> None:
            lines.send("finding", kind=thing.kind, what=thing.what)

        directory = Path(arguments["directory"])
        if not directory.is_absolute() or "\0" in str(directory):
            raise NotUnderstood("the directory to import is to be named from the root on")
        imported = await self._importer.take(
            directory, force=arguments.get("force", False), watch=Watch(lines.progress, untaken, lines.ready)
        )
        lines.finish(**attrs.asdict(imported))

    async def _check(self, arguments: dict[str, Any], lines: Lines) -> None:
        damaged = []

        def found(finding: Finding) -> None:
            lines.send("finding", kind=finding.kind, what=finding.what, repository=finding.repository)
            if finding.kind == "damaged":
                damaged.append(finding.digest)

        where = CACHED if arguments.get("cached", False) else HOSTED
        shelf = next(shelf for shelf in self._names.shelves if shelf.where == where)
        checker = Checker(self._reactor, shelf.layout, where == HOSTED)
        checked = await checker.check(Watch(lines.progress, found, lines.ready))
        if where == CACHED:
            await self._room.purge(digest for digest in damaged if digest is not None)
        lines.finish(**attrs.asdict(checked))


def _place(shelf: Shelf) -> dict[str, Any]:
    """Say where a shelf is, and how much room its disk has. Blocks."""
    try:
        status = os.statvfs(shelf.layout.root)
    except OSError:
        return {"directory": str(shelf.layout.root), "free": None}
    return {"directory": str(shelf.layout.root), "free": status.f_bavail * status.f_frsize}


async def _arguments(request: Request, required: str | None = None, **types: Any) -> dict[str, Any]:
    """Return the request's arguments; raise `Refused` for what is not one of those expected."""
    content = await request.read_all(_MAX_BODY)
    try:
        arguments = json.loads(content or b"{}")
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        raise Refused(400, "NOT_UNDERSTOOD", "the request's body is not a JSON object")
    for name, value in arguments.items():
        if name not in types or not isinstance(value, types[name]):
            raise Refused(400, "NOT_UNDERSTOOD", f"{name!r} is not an argument that this daemon takes here")
    if required is not None and required not in arguments:
        raise Refused(400, "NOT_UNDERSTOOD", f"{required!r} is missing")
    return arguments
