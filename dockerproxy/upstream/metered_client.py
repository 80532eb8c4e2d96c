"""A client for registries that measures them: how long they take to respond, how they fail, how much they send."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, Protocol

from attrs import frozen
from twisted.web.iweb import IBodyProducer

from dockerproxy.errors import RegistryError, UpstreamError
from dockerproxy.http.headers import Headers
from dockerproxy.oci.names import Registry
from dockerproxy.upstream.client import UpstreamClient
from dockerproxy.upstream.connection import Response
from dockerproxy.upstream.registry_request import RegistryRequest


class UpstreamMeter(Protocol):
    """Counts what registries do."""

    def count_upstream(self, registry: Registry, path: str, method: str, status: int, seconds: float) -> None:
        """Count a response with `status`. Its head came `seconds` after the request."""

    def count_failure(self, registry: Registry, reason: str) -> None:
        """Count a request without a response; `reason` is that of the `UpstreamError`."""

    def count_received(self, registry: Registry, size: int) -> None:
        """Count `size` bytes of a response's body."""


@frozen
class MeteredClient:
    """An `UpstreamClient` with a `meter` that counts its requests. `now` returns seconds of a clock that is never set.

    A request with its redirects and a new token is one, and counts for the registry that it was for.
    """

    _client: UpstreamClient
    _meter: UpstreamMeter
    _now: Callable[[], float]

    async def request(self, request: RegistryRequest) -> Response:
        """Send a request; see `UpstreamClient.request`."""
        send = partial(self._client.request, request)
        return await self._measure(request.method, request.registry, request.path, send)

    async def send(
        self,
        method: str,
        registry: Registry,
        path: str,
        headers: Headers,
        body: IBodyProducer | None = None,
        *,
        client_connection: Hashable = None,
    ) -> Response:
        """Send a request as it is; see `UpstreamClient.send`."""
        send = partial(self._client.send, method, registry, path, headers, body, client_connection=client_connection)
        return await self._measure(method, registry, path, send)

    async def _measure(self, method: str, registry: Registry, path: str, send: Callable[[], Any]) -> Response:
        started_at = self._now()
        try:
            response: Response = await send()
        except UpstreamError as error:
            self._meter.count_failure(registry, error.reason)
            raise
        except RegistryError as error:  # the token server's word
            self._meter.count_upstream(registry, path, method, error.status, self._now() - started_at)
            raise
        self._meter.count_upstream(registry, path, method, response.status, self._now() - started_at)
        response.on_received = partial(self._meter.count_received, registry)
        return response
