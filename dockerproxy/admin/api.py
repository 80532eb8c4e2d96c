"""The API for scripts and for the page's own script, below `/api/v1/`: the documents of `admin.overview`, and events.

    GET /api/v1/RESOURCE?arguments     a JSON document
    GET /api/v1/live                   Server-Sent Events (`admin.live`)

An error is ``{"error": {"code", "message"}}``. The same documents and events, for administrators, are on the control
socket as `/v1/RESOURCE` and `/v1/live`; those of `status` and `budget` are made there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attrs import frozen

from dockerproxy.admin.control import ControlHandler
from dockerproxy.admin.ndjson import JSON_FIELDS, NDJSONResponse
from dockerproxy.admin.overview import Overview
from dockerproxy.admin.viewer import Viewer, ViewerOf
from dockerproxy.concurrency import FirstUse
from dockerproxy.errors import BadRequest, RegistryError
from dockerproxy.http.request import Request
from dockerproxy.oci.routes import parse_query
from dockerproxy.registry.principal import Principal
from dockerproxy.shares import ClientShares

if TYPE_CHECKING:
    from dockerproxy.admin.live import LiveFeed

API_PREFIX = "/api/v1/"

_MAX_REQUESTS, _REQUESTS_PER_CLIENT = 64, 32  # that are answered at the same time by one process


def api_shares() -> ClientShares:
    """Return the bound of requests that are being answered."""
    return ClientShares("requests for the page and its API", _MAX_REQUESTS, _REQUESTS_PER_CLIENT)


@frozen
class API:
    """Handles requests below `/api/v1/`. `viewer_of` returns the viewer that sends a request, or refuses it."""

    _overview: Overview
    _live: FirstUse[LiveFeed]
    _viewer_of: ViewerOf
    _requests: ClientShares

    async def handle(self, request: Request) -> None:
        """Respond to `request`. Raise `RegistryError`."""
        request.error_renderer = respond_json_error
        viewer = await self._viewer_of(request)
        resource = request.path.removeprefix(API_PREFIX)
        if resource == "live":
            live = await self._live.get()
            await live.send_events(request, viewer, self._viewer_of)
            return
        self._requests.acquire(request.client)
        try:
            document = await self._overview.get(resource, viewer, parse_arguments(request.query))
            await request.respond_long(200, JSON_FIELDS, json.dumps(document).encode())
        finally:
            self._requests.release(request.client)


_ON_CONTROL_SOCKET = ("overview", "registries", "registry", "traffic", "transfers", "images", "image", "manifest")


@frozen
class ControlAPI:
    """The same on the control socket. Its users are administrators."""

    _overview: Overview
    _live: FirstUse[LiveFeed]

    @property
    def handlers(self) -> dict[tuple[str, str], ControlHandler]:
        """The handlers by method and path."""
        documents = {("GET", f"/v1/{resource}"): self.get for resource in _ON_CONTROL_SOCKET}
        return {**documents, ("GET", "/v1/live"): self.live}

    async def get(self, request: Request, response: NDJSONResponse, principal: Principal) -> None:
        """Respond with a document."""
        viewer = Viewer.administrator(principal.user)
        resource = request.path.rpartition("/")[2]
        document = await self._overview.get(resource, viewer, parse_arguments(request.query))
        request.respond(200, JSON_FIELDS, json.dumps(document).encode())

    async def live(self, request: Request, response: NDJSONResponse, principal: Principal) -> None:
        """Respond with the events as lines."""
        live = await self._live.get()
        await live.send_lines(request, Viewer.administrator(principal.user))


def parse_arguments(query: str) -> Mapping[str, str]:
    """Return the arguments in the query of a URL. Raise `BadRequest` if it is broken, or names one twice."""
    pairs = parse_query(query)
    arguments = dict(pairs)
    if len(arguments) < len(pairs):
        raise BadRequest("an argument is given twice")
    return arguments


def respond_json_error(request: Request, error: RegistryError) -> None:
    """Respond with `error` as a JSON object."""
    document: dict[str, Any] = {"error": {"code": error.code, "message": error.message}}
    request.closing = request.closing or request.has_body
    request.respond(error.status, [*JSON_FIELDS, *error.headers], json.dumps(document).encode())
