"""Access control of the hosted registry, tokens of AnonymousPull, and routing by `?ns=`."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from dockerproxy.errors import ServiceOverloaded
from dockerproxy.oci.content import ManifestResponse
from dockerproxy.oci.credentials import BasicCredentials
from dockerproxy.oci.manifests import OCI_MANIFEST
from dockerproxy.oci.names import Digest, Host, Registry, Repository, parse_repository
from dockerproxy.registry.access_control import AccessControl, AllowAll, AnonymousPull, RequireLogin
from dockerproxy.registry.api import RegistryAPI
from dockerproxy.registry.hosted_app import HostedRegistryApp
from dockerproxy.registry.namespaces import KnownNames, NamespacedRegistries
from dockerproxy.registry.principal import Principal
from dockerproxy.registry.upstream import Namespace
from tests.support.audit import make_audit_log

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
        self.users = {"alice": b"hash of wonder"}

    async def check_password(self, credentials: BasicCredentials, client: str = "") -> bool:
        return credentials.user in self.users and credentials.password == "wonder"

    def password_hash(self, user: str) -> bytes | None:
        return self.users.get(user)


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
            HostedRegistryApp(RegistryAPI(clock), backend, access_control, make_audit_log()[0]).handle,
            clock=clock,
            **options,
        )

    return make


def test_allow_all(connect: Any) -> None:
    client = connect(AllowAll())
    for method, path in [("GET", "/v2/"), *READ_REQUESTS, *WRITE_REQUESTS]:
        assert 200 <= client.fetch(method, path).status < 300
    assert client.fetch("GET", "/v2/token").status == 404


@pytest.mark.parametrize(("method", "path"), [("POST", "/v2/a/blobs/uploads/"), ("DELETE", MANIFEST), ("DELETE", BLOB)])
def test_the_user_that_logged_in_reaches_the_backend(
    connect: Any, backend: Any, htpasswd: Any, clock: Clock, method: str, path: str
) -> None:
    for access_control in (
        RequireLogin(htpasswd, REALM),
        AnonymousPull(htpasswd, REALM, b"secret", lambda: 1_750_000_000.0),
    ):
        connect(access_control).fetch(method, path, basic_fields("alice:wonder"))
        assert backend.calls.pop()[1] == Principal("alice", "10.1.2.3", None)


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
        assert 200 <= client.fetch(method, path, basic_fields("alice:wonder")).status < 300
        assert client.finished_requests[-1].user == "alice"
    assert client.fetch("GET", "/v2/token").status == 404
    for fields in NO_LOGINS:
        assert b"authentication required" in client.fetch("GET", "/v2/", fields).body


# Without a login, podman and skopeo send an empty user and password.
NO_LOGINS = [[], basic_fields(":"), basic_fields(""), [("Authorization", "Basic")]]


class TestAnonymousPull:
    @pytest.fixture
    def client(self, connect: Any, htpasswd: Any, clock: Clock) -> Any:
        return connect(AnonymousPull(htpasswd, [REALM], b"s" * 32, clock.seconds), secure=True)

    def token(self, client: Any, fields: list[tuple[str, str]] | None = None) -> str:
        response = client.fetch("GET", f"/v2/token?service={REALM}&scope=repository:a:pull", fields or [])
        assert (response.status, response.headers["Cache-Control"]) == (200, "no-store")
        document = json.loads(response.body)
        assert document["token"] == document["access_token"]
        return str(document["token"])

    def test_read_needs_no_login(self, client: Any) -> None:
        for fields in (*NO_LOGINS, bearer_fields(self.token(client, basic_fields(":")))):
            for method, path in READ_REQUESTS:
                assert client.fetch(method, path, fields).status == 200
                assert client.finished_requests[-1].user is None
            assert client.fetch("PUT", "/v2/a/manifests/1", fields).status == 401
        for fields in NO_LOGINS:  # docker and podman log in only after a challenge
            assert client.fetch("GET", "/v2/", fields).status == 401

    def test_write_needs_a_login(self, client: Any) -> None:
        for method, path in WRITE_REQUESTS:
            for fields in ([], basic_fields("alice:wrong"), bearer_fields(self.token(client))):
                assert client.fetch(method, path, fields).status == 401
            for fields in (
                basic_fields("alice:wonder"),
                bearer_fields(self.token(client, basic_fields("alice:wonder"))),
            ):
                assert 200 <= client.fetch(method, path, fields).status < 300
                assert client.finished_requests[-1].user == "alice"

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

    @pytest.mark.parametrize(
        "change", ["expired", "altered", "foreign", "empty", "not UTF-8", "new password", "deleted user"]
    )
    def test_invalid_tokens(self, client: Any, clock: Clock, connect: Any, htpasswd: Any, change: str) -> None:
        token = self.token(client, basic_fields("alice:wonder"))
        if change == "expired":
            clock.advance(3600)
        elif change == "altered":
            token = token[:50] + ("A" if token[50] != "A" else "B") + token[51:]
        elif change == "foreign":
            token = self.token(
                connect(AnonymousPull(htpasswd, [REALM], b"t" * 32, clock.seconds)), basic_fields("alice:wonder")
            )
        elif change == "empty":
            token = ""
        elif change == "not UTF-8":
            token = base64.urlsafe_b64encode(b"s" * 32 + b"\xff").decode()
        elif change == "new password":
            htpasswd.users["alice"] = b"hash of wonder with another salt"
        else:
            htpasswd.users.clear()
        client = connect(AnonymousPull(htpasswd, [REALM], b"s" * 32, clock.seconds), secure=True)
        assert client.fetch("PUT", "/v2/a/manifests/1", bearer_fields(token)).status == 401

    @pytest.mark.parametrize(
        ("public_url", "secure", "host", "base_url"),
        [
            (None, True, "192.0.2.1", "https://192.0.2.1"),
            (None, False, "192.0.2.1:5000", "http://192.0.2.1:5000"),
            (None, False, "reg.example.com:80", "http://reg.example.com"),
            ("https://reg.example.com", False, "reg.example.com", "https://reg.example.com"),
            ("https://reg.example.com:8443", False, "127.0.0.1:5000", "https://reg.example.com:8443"),
            ("https://reg.example.com", True, "127.0.0.1:5443", "https://reg.example.com"),
            ("https://reg.example.com", True, REALM, f"https://{REALM}"),
            ("https://reg.example.com", False, REALM, "https://reg.example.com"),
            ("https://reg.example.com", False, 'x"y', "https://reg.example.com"),
        ],
    )
    def test_challenge_names_the_public_url(
        self, connect: Any, htpasswd: Any, clock: Clock, public_url: str | None, secure: bool, host: str, base_url: str
    ) -> None:
        url = None if public_url is None else Registry.parse(public_url)
        access_control = AnonymousPull(htpasswd, [REALM], b"s" * 32, clock.seconds, url)
        response = connect(access_control, secure=secure).fetch("GET", "/v2/", [("Host", host)])
        if response.status == 401:  # the parser of request heads may refuse the Host
            challenge = f'Bearer realm="{base_url}/v2/token",service="{REALM}"'
            assert response.fields("WWW-Authenticate") == [challenge]
        else:
            assert '"' in host

    def test_invalid_host(self, client: Any) -> None:
        response = client.fetch("GET", "/v2/", [("Host", 'x"y')])
        assert response.status == 400 or f"https://{REALM}/v2/token" in response.headers["WWW-Authenticate"]


class NamedRegistry:
    """Responds with its name, the namespace and the target."""

    def __init__(self, name: str) -> None:
        self.name = name

    async def handle(self, request: Any, namespace: Namespace | None = None) -> None:
        target = request.path + (f"?{request.query}" if request.query else "")
        words = [self.name, *([] if namespace is None else [str(namespace.host)]), target]
        request.respond(200, [], " ".join(words).encode())


def named_registries(mirror_by_default: bool) -> NamespacedRegistries:
    """Return a hosted registry with the repositories `quay.io/old/app` and `quay.io`, and a mirror of quay.io."""

    async def has_repository(repository: Repository) -> bool:
        return repository in ("quay.io/old/app", "quay.io", "my.app/x")

    mirrored = {Host.parse("quay.io"), Host.parse("docker.io"), Host.parse("registry.example:5000")}
    hosted: Any = NamedRegistry("hosted")
    return NamespacedRegistries(
        hosted, NamedRegistry("mirror").handle, frozenset([REALM]), mirrored, has_repository, mirror_by_default
    )


def test_names_are_known_without_the_storage() -> None:
    """A storage on another machine is asked once a minute, and mirrored images are served while it is silent."""
    now, asked, has, failure = [0.0], [], {"quay.io/ours": True}, [False]

    async def has_repository(repository: Repository) -> bool:
        asked.append(repository)
        if failure[0]:
            raise ServiceOverloaded("the storage does not answer")
        return has.get(repository, False)

    names = KnownNames(has_repository, lambda: now[0])

    def knows(name: str) -> Any:
        results: list[Any] = []
        Deferred.fromCoroutine(names.has_repository(parse_repository(name))).addBoth(results.append)
        return results[0] if isinstance(results[0], bool) else type(results[0].value)

    for _ in range(3):
        assert (knows("quay.io/ours"), knows("quay.io/theirs")) == (True, False)
    assert len(asked) == 2
    failure[0] = True
    for now[0] in (60.0, 120.0):
        assert (knows("quay.io/ours"), knows("quay.io/theirs")) == (True, False)
    assert knows("quay.io/unknown") is ServiceOverloaded
    failure[0], now[0] = False, 180.0
    has["quay.io/theirs"] = True
    assert knows("quay.io/theirs") and knows("quay.io/unknown") is False


@pytest.mark.parametrize("mirror_by_default", [False, True])
@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", "default /v2/"),
        ("?n=1", "default /v2/?n=1"),
        ("?ns=docker.io", "mirror docker.io /v2/"),
        ("?n=1&ns=quay.io:444&last=x", "mirror quay.io:444 /v2/?n=1&last=x"),
        ("?ns=Docker-Registry.local", "hosted /v2/"),
        ("?n=1&ns=docker-registry.local:5443&last=x", "hosted /v2/?n=1&last=x"),
    ],
)
def test_namespace_routing(connect_client: Any, query: str, expected: str, mirror_by_default: bool) -> None:
    response = connect_client(named_registries(mirror_by_default).handle).fetch("GET", "/v2/" + query)
    assert response.body.decode() == expected.replace("default", "mirror" if mirror_by_default else "hosted")


@pytest.mark.parametrize(
    ("path", "at_hosted_port", "at_proxy_port"),
    [
        ("quay.io/team/app/tags/list?n=1", "mirror quay.io /v2/team/app/tags/list?n=1", None),
        ("docker.io/library/x/manifests/1", "mirror docker.io /v2/library/x/manifests/1", None),
        ("registry.example:5000/a/tags/list", "mirror registry.example:5000 /v2/a/tags/list", None),
        ("registry.example%3A5000/a/tags/list", "mirror registry.example:5000 /v2/a/tags/list", None),
        ("QUAY.io/a/tags/list", "mirror quay.io /v2/a/tags/list", None),
        ("quay%2eio/a/tags/list", "mirror quay.io /v2/a/tags/list", None),
        ("quay.io/", "mirror quay.io /v2/", None),
        ("quay.io", "mirror quay.io /v2/", None),
        ("quay.io/_catalog", "mirror quay.io /v2/_catalog", None),
        ("quay.io/new/blobs/uploads/", "mirror quay.io /v2/new/blobs/uploads/", None),
        ("quay.io/old/tags/list", "mirror quay.io /v2/old/tags/list", None),
        # repositories of the hosted registry that exist, and those that are not below a mirrored host
        ("quay.io/old/app/tags/list", "hosted /v2/quay.io/old/app/tags/list", "mirror quay.io /v2/old/app/tags/list"),
        ("quay.io/old/app/blobs/uploads/", "hosted /v2/quay.io/old/app/blobs/uploads/",
         "mirror quay.io /v2/old/app/blobs/uploads/"),
        ("quay.io/tags/list", "hosted /v2/quay.io/tags/list", "mirror quay.io /v2/tags/list"),
        ("my.app/x/tags/list", "hosted /v2/my.app/x/tags/list", "mirror my.app /v2/x/tags/list"),
        ("localhost/x/tags/list", "hosted /v2/localhost/x/tags/list", "mirror localhost /v2/x/tags/list"),
        ("quay.io:444/x/tags/list", "hosted /v2/quay.io:444/x/tags/list", "mirror quay.io:444 /v2/x/tags/list"),
        ("1.2/x/tags/list", "hosted /v2/1.2/x/tags/list", "400"),
        ("a/quay.io/tags/list", "hosted /v2/a/quay.io/tags/list", "mirror /v2/a/quay.io/tags/list"),
        # an escaped slash, which the hosted registry accepts, is no way round the mirrored name
        ("quay.io%2Fnew/blobs/uploads/", "mirror quay.io /v2/new/blobs/uploads/", "400"),
        ("quay.io%2Fold%2Fapp/tags/list", "hosted /v2/quay.io%2Fold%2Fapp/tags/list", "400"),
        ("quay.io/old/app/tags/list?ns=" + REALM, "hosted /v2/quay.io/old/app/tags/list", None),
        ("quay.io/new/blobs/uploads/?ns=" + REALM, "mirror quay.io /v2/new/blobs/uploads/", None),
        ("quay.io/a/tags/list?ns=quay.io", "mirror quay.io /v2/a/tags/list", None),
        ("quay.io:443/a/tags/list?n=1&ns=Quay.io", "mirror quay.io /v2/a/tags/list?n=1", None),
        ("quay.io/old/app/tags/list?ns=quay.io", "mirror quay.io /v2/old/app/tags/list", None),
        ("quay.io/a/tags/list?ns=docker.io", "mirror docker.io /v2/quay.io/a/tags/list", None),
    ],
)  # fmt: skip
def test_a_path_names_a_registry(
    connect_client: Any, path: str, at_hosted_port: str, at_proxy_port: str | None
) -> None:
    for mirror_by_default, expected in ((False, at_hosted_port), (True, at_proxy_port or at_hosted_port)):
        response = connect_client(named_registries(mirror_by_default).handle).fetch("GET", "/v2/" + path)
        assert expected == (response.body.decode() if response.status == 200 else str(response.status))


@pytest.mark.parametrize(
    ("query", "code"), [("?ns=a&ns=b", "UNSUPPORTED"), ("?ns=a/b", "NAME_INVALID"), ("?ns=", "NAME_INVALID")]
)
def test_invalid_namespace(connect_client: Any, query: str, code: str) -> None:
    registries = NamespacedRegistries(None, None, frozenset(), frozenset(), None, False)  # type: ignore[arg-type]
    response = connect_client(registries.handle).fetch("GET", f"/v2/{query}")
    assert (response.status, json.loads(response.body)["errors"][0]["code"]) == (400, code)
