"""The requests of the control socket for the history of pulls: `dockerproxy why` and `dockerproxy history`.

    GET /v1/why?name=IMAGE[&platform=P]
    GET /v1/history[?name=IMAGE][&since=SECONDS][&client=ADDRESS]   lines, the newest first

Addresses and users are in both, so they are for administrators only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

from attrs import frozen

from dockerproxy.admin.arguments import NAME, InvalidArguments, parse_pairs
from dockerproxy.admin.control import ControlHandler
from dockerproxy.admin.ndjson import JSON_FIELDS, NDJSONResponse
from dockerproxy.admin.resolver import InvalidArgument, parse_name
from dockerproxy.admin.why import Explainer, registry_of, with_explanation
from dockerproxy.concurrency import in_thread
from dockerproxy.http.request import Request
from dockerproxy.oci.docker_hub import shown_name, stored_name
from dockerproxy.oci.names import Digest
from dockerproxy.oci.routes import parse_query
from dockerproxy.registry.principal import Principal
from dockerproxy.store.disk_access import DiskAccess
from dockerproxy.store.pull_history import PullHistory

_WHY = {"name": NAME, "platform": NAME}
_HISTORY = {"name": NAME, "since": NAME, "client": NAME}
_MAX_ROWS = 10_000
_DEFAULT_ROWS = 100  # without a time
_ROWS_AT_ONCE = 50


@frozen
class HistoryHandlers:
    """Responds to these requests."""

    _reactor: Any
    _disk: DiskAccess
    _history: PullHistory
    _explainer: Explainer
    _clock: Callable[[], float]

    @property
    def handlers(self) -> Mapping[tuple[str, str], ControlHandler]:
        """The handlers by method and path."""
        return {("GET", "/v1/why"): self._why, ("GET", "/v1/history"): self._list}

    async def _why(self, request: Request, response: NDJSONResponse, principal: Principal) -> None:
        arguments = parse_pairs(parse_query(request.query), _WHY)
        if "name" not in arguments:
            raise InvalidArguments("the argument 'name' is missing")
        document = await self._disk.run(self._explainer.explain, arguments["name"], arguments.get("platform"))
        request.respond(200, JSON_FIELDS, json.dumps(document).encode())

    async def _list(self, request: Request, response: NDJSONResponse, principal: Principal) -> None:
        arguments = parse_pairs(parse_query(request.query), _HISTORY)
        rows = self._rows(arguments.get("name"), _seconds(arguments.get("since")), arguments.get("client"))
        limit = _MAX_ROWS if "since" in arguments else _DEFAULT_ROWS
        rows, sent, more = islice(rows, limit + 1), 0, False
        while batch := await in_thread(self._reactor, lambda: list(islice(rows, _ROWS_AT_ONCE))):
            for row in batch:
                more = sent >= limit
                if not more:
                    response.send("pull", **row)
                    sent += 1
            await response.drain()
        response.finish(more=more, kept=self._history.lifetime)

    def _rows(self, name: str | None, seconds: float | None, client: str | None) -> Iterator[dict[str, Any]]:
        since = 0.0 if seconds is None else self._clock() - seconds
        if name is None:
            names, tag, digest = None, None, None
        else:
            path, tag, digest = parse_name(name)
            names = _names(path)
        needle = json.dumps(client)[1:-1] if client is not None else ""
        for row in self._history.read(since, needle):
            is_wanted = names is None or (row.get("where"), row.get("repository")) in names
            if is_wanted and _has_reference(row, tag, digest) and client in (None, row.get("client")):
                yield with_explanation(row, registry_of(row))


def _names(path: str) -> set[tuple[str, str]]:
    """Return the stores and names that `path` may mean: an image need not be here any more."""
    stored = stored_name(path)
    names = {("hosted", path), ("cached", path)}
    return names | ({("cached", shown_name(stored))} if stored is not None else set())


def _has_reference(row: Mapping[str, Any], tag: str | None, digest: Digest | None) -> bool:
    if digest is not None:
        return row.get("reference") == str(digest)
    return tag is None or row.get("kind") != "manifest" or row.get("reference") == tag


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 1e9:
        raise InvalidArgument(f"{text[:50]!r} is not a number of seconds")
    return seconds
