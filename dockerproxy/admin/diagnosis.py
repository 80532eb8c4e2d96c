"""The request ``GET /v1/doctor[?quick=1]`` of the control API."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from dockerproxy.admin.arguments import one_of, parse_pairs
from dockerproxy.admin.ndjson import JSON_FIELDS, NDJSONResponse
from dockerproxy.http.request import Request
from dockerproxy.oci.routes import parse_query
from dockerproxy.registry.principal import Principal

_ARGUMENTS = {"quick": one_of("1")}


async def handle_doctor(
    report: Callable[[bool], Awaitable[dict[str, Any]]],
    request: Request,
    response: NDJSONResponse,
    principal: Principal,
) -> None:
    """Respond with the `report` of `Doctor`, a quick one if that is asked for."""
    query = parse_pairs(parse_query(request.query), _ARGUMENTS)
    request.respond(200, JSON_FIELDS, json.dumps(await report("quick" in query)).encode())
