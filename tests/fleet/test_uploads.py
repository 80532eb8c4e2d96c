"""Requests for upload sessions: passed on to the member that has the bytes, one step, and to nobody else."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

import pytest
from attrs import define, field
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from dockerproxy.errors import Denied, UpstreamTimeout, UpstreamUnreachable
from dockerproxy.fleet.members import Members
from dockerproxy.fleet.uploads import UPLOADS_HOST, SessionDoor, SessionRouter
from dockerproxy.http.headers import Headers
from dockerproxy.http.request import Request
from dockerproxy.oci.routes import route_hosted
from dockerproxy.registry.responses import respond_error
from tests.cache.support.upstream import ScriptedResponse
from tests.conftest import HTTPTestClient

ME, MEMBER, IPV6 = "10.0.0.1:3128", "10.0.0.2:3128", "[fd00::3]:3128"
SESSION = "/v2/a/b/blobs/uploads/01234567-89ab-8123-8123-0123456789ab"


@define
class Consumer:
    """Takes a body. Its `producer` is paused by the test."""

    received: bytearray = field(factory=bytearray)

    def write(self, data: bytes) -> None:
        self.received += data


@define(eq=False, slots=False)
class Fleet:
    """A member, with a transport that records what it sends and answers with `answer`."""

    clock: Clock = field(factory=Clock)
    answer: Any = field(factory=lambda: ScriptedResponse(204))
    sent: list[tuple[str, str, str, Headers]] = field(factory=list)
    bodies: list[Any] = field(factory=list)
    consumers: list[Consumer] = field(factory=list)
    local: list[str] = field(factory=list)
    counted: list[tuple[str, int]] = field(factory=list)

    def __attrs_post_init__(self) -> None:
        self.members = Members(self.clock.seconds)
        self.members.use((ME, MEMBER, IPV6), ME)
        self.router = SessionRouter(self.members, self, self)

    def count_peer_bytes(self, direction: str, size: int) -> None:
        self.counted.append((direction, size))

    async def send(self, member: str, method: str, url: str, headers: Headers, body: Any = None) -> Any:
        self.sent.append((member, method, url, headers))
        self.bodies.append(body)
        if body is not None:
            self.consumers.append(Consumer())
            await body.startProducing(self.consumers[-1])
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def handle(self, request: Request) -> Awaitable[None]:
        request.error_renderer = respond_error
        return self.router.pass_on(request, route_hosted(request.path)) or self._respond(request)

    async def _respond(self, request: Request) -> None:
        self.local.append(f"{request.path}?{request.query}")
        request.respond(200, [], b"here")

    def connect(self) -> HTTPTestClient:
        return HTTPTestClient(self.handle, clock=self.clock)

    def fetch(self, method: str, query: str, path: str = SESSION, body: bytes | None = None, **fields: str) -> Any:
        named = [(name.replace("_", "-"), value) for name, value in fields.items()]
        return self.connect().fetch(method, f"{path}?{query}" if query else path, named, body)


@pytest.fixture
def fleet() -> Fleet:
    return Fleet()


@pytest.mark.parametrize(
    ("query", "local"),
    [
        ("", "?"),
        (f"node={ME}", "?"),
        (f"digest=x&node={ME}", "?digest=x"),
        ("node=10.0.0.1%3A3128&digest=x", "?digest=x"),
    ],
    ids=["no-node", "own", "own-with-digest", "own-escaped"],
)
def test_what_is_here_is_handled_here(fleet: Fleet, query: str, local: str) -> None:
    assert fleet.fetch("PUT", query).body == b"here"
    assert fleet.local == [SESSION + local] and fleet.sent == []


@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE", "PUT"])
def test_a_request_goes_to_the_member_without_the_parameter(fleet: Fleet, method: str) -> None:
    fields = {"range": "0-4", "location": f"{SESSION}?node={MEMBER}", "set-cookie": "a=b", "docker-upload-uuid": "u"}
    fleet.answer = ScriptedResponse(204, fields=fields, length=None)
    response = fleet.fetch(
        method, f"node={MEMBER}&digest=x", Authorization="Basic secret", Cookie="a=b", Forwarded="for=x"
    )
    assert response.status == 204
    assert response.fields("Location") == [fields["location"]] and response.fields("Range") == ["0-4"]
    assert response.fields("Set-Cookie") == [] and response.fields("Docker-Upload-UUID") == ["u"]
    [(member, sent_method, url, headers)] = fleet.sent
    assert (member, sent_method, url) == (MEMBER, method, f"https://{UPLOADS_HOST}{SESSION}?digest=x")
    assert headers.get("authorization") == "Basic secret"
    assert not {"cookie", "forwarded", "host", "expect"} & {name for name, _ in headers}
    assert fleet.local == [] and fleet.bodies == [None]


def test_a_client_is_sent_nowhere_else(fleet: Fleet) -> None:
    for location in ("https://evil.example/v2/", "//evil.example/v2/"):
        fleet.answer = ScriptedResponse(202, fields={"location": location})
        assert fleet.fetch("PATCH", f"node={MEMBER}", body=b"data").fields("Location") == []


def test_a_member_of_ipv6(fleet: Fleet) -> None:
    assert fleet.fetch("GET", "node=%5Bfd00::3%5D:3128").status == 204
    assert fleet.sent[0][0] == IPV6


@pytest.mark.parametrize(
    "node",
    [
        "169.254.169.254:80", "10.0.0.2", "10.0.0.2:22", "localhost:3128", "10.0.0.2:3128@evil.example",
        "evil.example/10.0.0.2:3128", "10.0.0.2:3128%00", "", "10.0.0.002:3128", "%0d%0aHost:x", "x" * 5000,
    ],
)  # fmt: skip
def test_nobody_but_a_member_is_asked(fleet: Fleet, node: str) -> None:
    response = fleet.fetch("PUT", f"node={node}&digest=x", body=b"data")
    assert response.status in (400, 404), node
    assert fleet.sent == [] and fleet.local == []


def test_two_nodes_are_none(fleet: Fleet) -> None:
    assert fleet.fetch("GET", f"node={MEMBER}&node={ME}").status == 400
    assert fleet.fetch("GET", f"node={MEMBER}&n%6fde={ME}").status == 400
    assert fleet.sent == [] and fleet.local == []


@pytest.mark.parametrize("path", ["/v2/a/b/blobs/uploads/", "/v2/a/b/manifests/1", "/v2/a/b/tags/list", "/v2/"])
def test_nothing_else_is_passed_on(fleet: Fleet, path: str) -> None:
    assert fleet.fetch("POST", f"node={MEMBER}", path).body == b"here"
    assert fleet.sent == []


@pytest.mark.parametrize(
    "error", [UpstreamUnreachable("10.0.0.2:3128: refused the connection", "refused"), UpstreamTimeout("timed out")]
)
def test_a_member_that_is_gone_makes_the_client_begin_again(fleet: Fleet, error: Exception) -> None:
    fleet.answer = error
    response = fleet.fetch("PATCH", f"node={MEMBER}", body=b"data")
    assert response.status == 404
    assert b"BLOB_UPLOAD_UNKNOWN" in response.body and b"begin the upload again" in response.body
    assert MEMBER.encode() in response.body


def test_a_member_that_has_left(fleet: Fleet) -> None:
    fleet.members.use((ME,), ME)
    response = fleet.fetch("PATCH", f"node={MEMBER}", body=b"data")
    assert response.status == 404 and b"BLOB_UPLOAD_UNKNOWN" in response.body


def test_a_refusal_of_the_member_is_passed_on(fleet: Fleet) -> None:
    body = b'{"errors":[{"code":"UNAVAILABLE"}]}'
    fleet.answer = ScriptedResponse(503, body, {"retry-after": "5", "content-type": "application/json"})
    response = fleet.fetch("PUT", f"node={MEMBER}&digest=x", body=b"data")
    assert (response.status, response.body, response.fields("Retry-After")) == (503, body, ["5"])


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_is_streamed_with_back_pressure(fleet: Fleet, is_chunked: bool) -> None:
    client = fleet.connect()
    size = 4 << 20
    framing = ("Transfer-Encoding", "chunked") if is_chunked else ("Content-Length", str(size))
    client.send_request("PATCH", f"{SESSION}?node={MEMBER}", [framing, ("Expect", "100-continue")])
    assert client.received == b"HTTP/1.1 100 Continue\r\n\r\n", "the member is there, so the client may send"
    body, consumer = fleet.bodies[0], fleet.consumers[0]
    body.pauseProducing()
    piece = bytes(64 << 10)
    sent = 0
    while client.transport.producerState == "producing":
        client.send(b"%x\r\n%b\r\n" % (len(piece), piece) if is_chunked else piece)
        sent += len(piece)
        assert sent < size, "the client was never paused"
    assert len(consumer.received) <= len(piece)
    body.resumeProducing()
    assert client.transport.producerState == "producing"
    while sent < size:
        client.send(b"%x\r\n%b\r\n" % (len(piece), piece) if is_chunked else piece)
        sent += len(piece)
    client.send(b"0\r\n\r\n" if is_chunked else b"")
    assert len(consumer.received) == size
    assert client.received.partition(b"\r\n\r\n")[2].startswith(b"HTTP/1.1 204")
    assert fleet.counted == [("sent", size)]


def test_a_client_that_disconnects_ends_the_request_to_the_member(fleet: Fleet) -> None:
    client = fleet.connect()
    client.send_request("PATCH", f"{SESSION}?node={MEMBER}", [("Content-Length", "100")])
    client.send(b"some")
    client.disconnect()
    assert client.site.channel_count == 0
    assert fleet.counted == [("sent", 4)]


@define(eq=False)
class Door:
    """The door of the member. Its hosted registry responds when `done` fires."""

    clock: Clock = field(factory=Clock)
    done: Deferred[None] = field(factory=Deferred)
    counted: list[tuple[str, int]] = field(factory=list)
    refuses: bool = False
    timeout: float = 6.0

    def count_peer_bytes(self, direction: str, size: int) -> None:
        self.counted.append((direction, size))

    async def handle_hosted(self, request: Request) -> None:
        while await request.read_chunk():
            pass
        await self.done
        request.respond(201, [])

    def check(self, request: Request) -> None:
        if self.refuses:
            raise Denied("a page of another site")

    def connect(self) -> HTTPTestClient:
        door = SessionDoor(self.clock, self.handle_hosted, self.check, self, self.timeout)
        return HTTPTestClient(door.handle, clock=self.clock, client="10.0.0.1")


def test_a_member_hears_of_a_long_commit() -> None:
    door = Door()
    client = door.connect()
    client.send_request("PUT", f"{SESSION}?digest=x", (), b"data")
    door.clock.pump([1.0] * 9)
    assert client.received == b"HTTP/1.1 102 Processing\r\n\r\n" * 4
    door.done.callback(None)
    assert b"HTTP/1.1 201" in client.received and door.counted == [("received", 4)]
    door.clock.pump([1.0] * 9)
    assert client.received.count(b"102 Processing") == 4


def test_reports_fit_into_what_the_other_side_reads() -> None:
    """A body may take hours. Some reports are left for the time after it."""
    door = Door(timeout=0.03)
    client = door.connect()
    client.send_request("PUT", f"{SESSION}?digest=x", [("Content-Length", "3001")])
    for _ in range(3000):
        client.send(b"x", 0.01)
    in_body = client.received.count(b"102 Processing")
    client.send(b"x")
    door.clock.pump([0.01] * 100)
    assert in_body <= 1000 and client.received.count(b"102 Processing") > in_body
    client.disconnect()


def test_the_door_leads_to_sessions_only() -> None:
    client = Door().connect()
    assert client.fetch("GET", "/v2/_catalog").status == 404
    assert client.fetch("POST", "/v2/a/b/blobs/uploads/").status == 404
    assert client.fetch("GET", "/").status == 404


def test_the_door_refuses_pages() -> None:
    assert Door(refuses=True).connect().fetch("PUT", SESSION).status == 403
