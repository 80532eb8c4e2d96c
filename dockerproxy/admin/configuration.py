"""The requests of `dockerproxy config` and `dockerproxy reload`.

GET  /v1/config   {"settings": [{"name", "value", "source", "place", "reload", "pending"}…], "warnings": […]}
POST /v1/reload   {"status", "refused", "warnings", "needing_restart", "problems"}, when the reload has ended
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from attrs import frozen

from dockerproxy.admin.control import ControlHandler
from dockerproxy.admin.ndjson import JSON_FIELDS, NDJSONResponse
from dockerproxy.concurrency import shield
from dockerproxy.http.request import Request
from dockerproxy.registry.principal import Principal


@frozen
class ConfigurationHandlers:
    """Handles the requests. `report` and `reload` return JSON objects; only `reload` changes anything."""

    _report: Callable[[], dict[str, Any]]
    _reload: Callable[[Principal], Coroutine[Any, Any, dict[str, Any]]]

    def handlers(self) -> Mapping[tuple[str, str], ControlHandler]:
        """Return the handlers by method and path."""
        return {("GET", "/v1/config"): self._respond_config, ("POST", "/v1/reload"): self._respond_reload}

    async def _respond_config(self, request: Request, response: NDJSONResponse, principal: Principal) -> None:
        request.respond(200, JSON_FIELDS, json.dumps(self._report()).encode())

    async def _respond_reload(self, request: Request, response: NDJSONResponse, principal: Principal) -> None:
        # To its end even if the command is interrupted: a reload applies all settings, in all processes, or none.
        result = await shield(self._reload(principal), "reloading the settings")
        request.respond(200, JSON_FIELDS, json.dumps(result).encode())
