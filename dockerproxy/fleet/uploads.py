"""Upload sessions in a fleet: any member takes a request for one, and passes it on to the member that has its bytes.

The `Location` of a session names that member in its query, ``?node=HOST:PORT``. A request is passed on to members only,
without the parameter, so that it goes one step and no further. It goes over TLS with the CA of the fleet, because it
has the client's Authorization and content that may be private. The other member checks the login as that of any client.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from attrs import frozen
from twisted.web.iweb import IBodyProducer

from dockerproxy.errors import BlobUploadUnknown, NameUnknown, UpstreamError
from dockerproxy.fleet.members import Members
from dockerproxy.fleet.progress import reporting_progress
from dockerproxy.fleet.upstream import PeerMeter
from dockerproxy.http.forwarding import ForwardedResponse, forward_response, request_body_producer
from dockerproxy.http.headers import Headers
from dockerproxy.http.request import Request
from dockerproxy.oci.routes import Kind, Target, pop_parameter, route_hosted
from dockerproxy.registry.responses import respond_error, upstream_fields

UPLOADS_HOST = "uploads.docker-registry-proxy.invalid"
"""The host that members ask for at the proxy port of another one. No name server knows it (RFC 6761, section 6.4)."""

_NODE = "node"
_PASSED_FIELDS = frozenset({"authorization", "content-range", "content-type", "user-agent"})
_MAX_COMMIT = 3600.0  # seconds that a member may take from the start of a request to the response


class SessionTransport(Protocol):
    """Sends requests to members; see `transport.HTTPMemberTransport`."""

    async def send(
        self, member: str, method: str, url: str, headers: Headers, body: IBodyProducer | None = None
    ) -> ForwardedResponse: ...


@frozen
class SessionRouter:
    """Passes requests for upload sessions on to the members that have them."""

    _members: Members
    _transport: SessionTransport
    _meter: PeerMeter

    def pass_on(self, request: Request, target: Target) -> Awaitable[None] | None:
        """Return the awaitable that responds from another member, None if this one has the session.

        Raise `BlobUploadUnknown` if the session is that of a member that is not in the list.
        """
        if target.kind is not Kind.UPLOAD:
            return None
        node, request.query = pop_parameter(request.query, _NODE)
        if node is None or node == self._members.me:
            return None
        if node not in self._members.names:
            raise BlobUploadUnknown("the member that has this upload has left the fleet; begin the upload again")
        return self._pass_on(request, node)

    async def _pass_on(self, request: Request, node: str) -> None:
        headers = Headers.from_lowercase([field for field in request.headers if field[0] in _PASSED_FIELDS])
        url = f"https://{UPLOADS_HOST}{request.path}{f'?{request.query}' if request.query else ''}"
        body = request_body_producer(request)
        try:
            response = await self._transport.send(node, request.method, url, headers, body)
        except UpstreamError as error:
            # Nobody else has the bytes. This code makes clients begin again, and 502 would make some give up.
            raise BlobUploadUnknown(
                f"the member {node}, which has this upload, does not answer ({error.message}); begin the upload again"
            ) from None
        finally:
            self._meter.count_peer_bytes("sent", request.bytes_received)
        fields = upstream_fields(response.headers)
        fields += [("location", value) for value in response.headers.all("location") if value.startswith("/v2/")]
        await forward_response(request, response, fields)


@frozen
class SessionDoor:
    """The door for requests that `SessionRouter` of another member has passed on.

    `handle_hosted` handles them as those of clients: the door gives no right, so that strangers may use it. `check`
    refuses those of web pages.
    """

    _clock: Any
    _handle_hosted: Callable[[Request], Awaitable[None]]
    _check: Callable[[Request], None]
    _meter: PeerMeter
    _timeout: float

    async def handle(self, request: Request) -> None:
        """Respond to `request`. Raise `RegistryError`."""
        request.error_renderer = respond_error
        self._check(request)
        if route_hosted(request.path).kind is not Kind.UPLOAD:
            raise NameUnknown("only requests for upload sessions are passed on")
        try:
            with reporting_progress(self._clock, request, self._timeout, _MAX_COMMIT):
                await self._handle_hosted(request)
        finally:
            self._meter.count_peer_bytes("received", request.bytes_received)
