"""An agent that counts the requests to token servers."""

from __future__ import annotations

from typing import Any, Protocol
from urllib.parse import urlsplit

from attrs import frozen

from dockerproxy.errors import UpstreamError
from dockerproxy.oci.names import Registry
from dockerproxy.upstream.agent import Agent
from dockerproxy.upstream.connection import Response


class TokenMeter(Protocol):
    """Counts what token servers do. `server` is the one that was asked."""

    def count_token_request(self, server: Registry, method: str, status: int) -> None:
        """Count a response."""

    def count_token_failure(self, server: Registry, reason: str) -> None:
        """Count a request without a response; `reason` is that of the `UpstreamError`."""


@frozen
class MeteredAgent:
    """An `Agent` with a `meter` of requests for tokens. Those to `/v2/`, which find the token server, do not count."""

    _agent: Agent
    _meter: TokenMeter

    async def request(self, method: str, url: str, *arguments: Any, **options: Any) -> Response:
        """Send a request; see `Agent.request`."""
        parts = urlsplit(url)
        if parts.path == "/v2/":
            return await self._agent.request(method, url, *arguments, **options)
        server = Registry.parse(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}")
        try:
            response = await self._agent.request(method, url, *arguments, **options)
        except UpstreamError as error:
            self._meter.count_token_failure(server, error.reason)
            raise
        self._meter.count_token_request(server, method, response.status)
        return response
