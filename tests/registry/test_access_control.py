"""Access control of the hosted registry, tokens of AnonymousPull, and routing by `?ns=`."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from twisted.internet.task import Clock

from dockerproxy.oci.content import ManifestResponse
from dockerproxy.oci.credentials import BasicCredentials
from dockerproxy.oci.manifests import OCI_MANIFEST
from dockerproxy.oci.names import Digest
from dockerproxy.registry.access_control import AccessControl, AllowAll, AnonymousPull, RequireLogin
from dockerproxy.registry.api import RegistryAPI
from dockerproxy.registry.hosted_app import HostedRegistryApp, NamespaceRouter

REALM = "docker-registry.local"
MANIFEST = "/v2/a/manifests/1"
BLOB = f"/v2/a/blobs/{Digest.of(b'x')}"
READ_REQUESTS = [("GET", "/v2/_catalog"), ("HEAD", MANIFEST), ("GET", MANIFEST), ("GET", "/v2/a/tags/list")]
WRITE_REQUESTS = [
    ("POST", "/v2/a/blobs/uploads/"), ("PATCH", "/v2/a/blobs/uploads/x"), ("GET", "/v2/a/blobs/uploads/x"),
    ("PUT", "/v2/a/manifests/1"), ("DELETE", BLOB),
]  # fmt: skip


class FakeHtpasswd:
    """An htpasswd file with one user: alice, whose password is "wonder"."""

    def __init__(self) -> None:
        self.users = {"alice"}

    async def check_password(self, credentials: BasicCredentials, client: str = "") -> bool:
        return credentials.user in self.users and credentials.password == "wonder"

    def has_user(self, user: str) -> bool:
        return user in self.users


def basic_fields(text: str) -> list[tuple[str, str]]:
    return [("Authorization", "Basic " + base64.b64encode(text.encode()).decode())]


def bearer_fields(token: str) -> list[tuple[str, str]]:
    return [("Authorization", f"Bearer {token}")]


@pytest.fixture
def htpasswd() -> FakeHtpasswd:
    return FakeHtpasswd()


@pytest.fixture
def clock() -> Clock:
    clock = Clock()
    clock.advance(1_750_000_000)
    return clock


@pytest.fixture
def connect(connect_client: Any, backend: Any, clock: Clock) -> Any:
    """Return a function that connects a client to a registry with the given access control."""
    backend.manifests["1"] = ManifestResponse(Digest.of(b"{}"), OCI_MANIFEST, 2, b"{}", "-")

    def make(access_control: AccessControl, **options: Any) -> Any:
        return connect_client(
            HostedRegistryApp(RegistryAPI(clock), backend, access_control).handle, clock=clock, **options
        )

    return make


def test_allow_all(connect: Any) -> None:
    client = connect(AllowAll())
    for method, path in [("GET", "/v2/"), *READ_REQUESTS, *WRITE_REQUESTS]:
        assert client.fetch(method, path).status == 200
    assert client.fetch("GET", "/v2/token").status == 404


def test_require_login(connect: Any, htpasswd: Any) -> None:
    client = connect(RequireLogin(htpasswd, REALM))
    for method, path in [("GET", "/v2/"), *READ_REQUESTS, *WRITE_REQUESTS]:
        for fields in (
            [],
            basic_fields("alice:wrong"),
            basic_fields("bob:wonder"),
            bearer_fields("x"),
            [("Authorization", "?")],
        ):
            response = client.fetch(method, path, fields)
            assert (response.status, response.fields("WWW-Authenticate")) == (401, [f'Basic realm="{REALM}"'])
        assert client.fetch(method, path, basic_fields("alice:wonder")).status == 200
    assert client.fetch("GET", "/v2/token").status == 404
    # Without a login, podman and skopeo send an empty user and password.
    assert b"authentication required" in client.fetch("GET", "/v2/", basic_fields(":")).body


class TestAnonymousPull:
    @pytest.fixture
    def client(self, connect: Any, htpasswd: Any, clock: Clock) -> Any:
        return connect(AnonymousPull(htpasswd, REALM, b"s" * 32, clock.seconds), secure=True)

    def token(self, client: Any, fields: list[tuple[str, str]] | None = None) -> str:
        response = client.fetch("GET", f"/v2/token?service={REALM}&scope=repository:a:pull", fields or [])
        assert (response.status, response.headers["Cache-Control"]) == (200, "no-store")
        document = json.loads(response.body)
        assert document["token"] == document["access_token"]
        return str(document["token"])

    def test_read_needs_no_login(self, client: Any) -> None:
        for method, path in READ_REQUESTS:
            assert client.fetch(method, path).status == 200

    def test_write_needs_a_login(self, client: Any) -> None:
        for method, path in WRITE_REQUESTS:
            for fields in ([], basic_fields("alice:wrong"), bearer_fields(self.token(client))):
                assert client.fetch(method, path, fields).status == 401
            for fields in (
                basic_fields("alice:wonder"),
                bearer_fields(self.token(client, basic_fields("alice:wonder"))),
            ):
                assert client.fetch(method, path, fields).status == 200

    def test_docker_login_sequence(self, client: Any) -> None:
        """dockerd gets a challenge at /v2/ in any case, and therefore sends its login if it has one."""
        response = client.fetch("GET", "/v2/", [("Host", "192.0.2.1:5443")])
        assert response.status == 401
        assert response.fields("WWW-Authenticate") == [
            f'Bearer realm="https://192.0.2.1:5443/v2/token",service="{REALM}"'
        ]
        for fields in (None, basic_fields("alice:wonder")):
            assert client.fetch("GET", "/v2/", bearer_fields(self.token(client, fields))).status == 200
        assert client.fetch("GET", "/v2/", basic_fields("alice:wonder")).status == 200

    def test_challenge_has_a_scope(self, client: Any) -> None:
        challenge = client.fetch("PUT", "/v2/a/b/manifests/1").headers["WWW-Authenticate"]
        assert challenge.endswith(',scope="repository:a/b:pull,push"')

    def test_a_wrong_login_gets_no_token(self, client: Any) -> None:
        response = client.fetch("GET", "/v2/token", basic_fields("alice:wrong"))
        assert (response.status, response.headers["WWW-Authenticate"]) == (401, f'Basic realm="{REALM}"')
        assert client.fetch("POST", "/v2/token", [], b"grant_type=password").status == 405

    @pytest.mark.parametrize("change", ["expired", "altered", "foreign", "empty", "deleted user"])
    def test_invalid_tokens(self, client: Any, clock: Clock, connect: Any, htpasswd: Any, change: str) -> None:
        token = self.token(client, basic_fields("alice:wonder"))
        if change == "expired":
            clock.advance(3600)
        elif change == "altered":
            token = token[:50] + ("A" if token[50] != "A" else "B") + token[51:]
        elif change == "foreign":
            token = self.token(
                connect(AnonymousPull(htpasswd, REALM, b"t" * 32, clock.seconds)), basic_fields("alice:wonder")
            )
        elif change == "empty":
            token = ""
        else:
            htpasswd.users.clear()
        client = connect(AnonymousPull(htpasswd, REALM, b"s" * 32, clock.seconds), secure=True)
        assert client.fetch("PUT", "/v2/a/manifests/1", bearer_fields(token)).status == 401

    def test_invalid_host(self, client: Any) -> None:
        response = client.fetch("GET", "/v2/", [("Host", 'x"y')])
        assert response.status == 400 or f"https://{REALM}/v2/token" in response.headers["WWW-Authenticate"]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", "default /v2/"),
        ("?n=1", "default /v2/?n=1"),
        ("?ns=docker.io", "mirror /v2/?ns=docker.io"),
        ("?ns=Docker-Registry.local", "hosted /v2/"),
        ("?n=1&ns=docker-registry.local:5443&last=x", "hosted /v2/?n=1&last=x"),
        ("?ns=a/b", "mirror /v2/?ns=a/b"),
        ("?ns=", "mirror /v2/?ns="),
    ],
)
def test_namespace_routing(connect_client: Any, query: str, expected: str) -> None:
    def make_handler(name: str) -> Any:
        async def handle(request: Any) -> None:
            target = request.path + (f"?{request.query}" if request.query else "")
            request.respond(200, [], f"{name} {target}".encode())

        return handle

    router = NamespaceRouter(
        make_handler("hosted"), make_handler("mirror"), frozenset([REALM]), make_handler("default")
    )
    assert connect_client(router.handle).fetch("GET", "/v2/" + query).body.decode() == expected


def test_invalid_namespace(connect_client: Any) -> None:
    async def unused(request: Any) -> None:
        raise AssertionError

    response = connect_client(NamespaceRouter(unused, unused, frozenset(), unused).handle).fetch(
        "GET", "/v2/?ns=a&ns=b"
    )
    assert response.status == 400
