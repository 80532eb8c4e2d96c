"""The request of `dockerproxy page`: a link that signs one browser in to the page as administrator."""

from __future__ import annotations

import json
from collections.abc import Callable

from attrs import frozen

from dockerproxy.admin.control import ControlHandler
from dockerproxy.admin.ndjson import JSON_FIELDS, NDJSONResponse
from dockerproxy.admin.sessions import LINK_LIFETIME, Sessions
from dockerproxy.errors import Unsupported
from dockerproxy.http.request import Request
from dockerproxy.registry.principal import Principal


@frozen
class SignInLinks:
    """Handles the request. `is_off` says whether PAGE=off. The page is at `proxy_port` of `host`."""

    _sessions: Sessions
    _is_off: Callable[[], bool]
    _proxy_port: int
    _host: str

    @property
    def handlers(self) -> dict[tuple[str, str], ControlHandler]:
        """The handlers by method and path."""
        return {("POST", "/v1/sign-in-link"): self.make_link}

    async def make_link(self, request: Request, response: NDJSONResponse, principal: Principal) -> None:
        """Respond with a new link. Raise `Unsupported`."""
        if self._is_off():
            raise Unsupported("there is no page, because PAGE=off; set PAGE=public, users or admin, and reload")
        token = self._sessions.make_sign_in_link(principal.user or "administrator")
        document = {
            "path": f"/login?link={token}",
            "host": self._host,
            "port": self._proxy_port,
            "seconds": int(LINK_LIFETIME),
        }
        request.respond(200, JSON_FIELDS, json.dumps(document).encode())
