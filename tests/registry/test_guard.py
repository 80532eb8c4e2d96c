from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from twisted.internet.task import Clock

from dockerproxy.oci.contents import ManifestAnswer
from dockerproxy.oci.manifests import OCI_MANIFEST
from dockerproxy.oci.names import Digest
from dockerproxy.registry.face import Face
from dockerproxy.registry.guard import Guard, OnlyUsers, Open, ReadByAll
from dockerproxy.registry.own import ByNamespace, Own
from dockerproxy.registry.users import Login

REALM = "docker-registry.local"
MANIFEST = "/v2/a/manifests/1"
BLOB = f"/v2/a/blobs/{Digest.of(b'x')}"
READING = [("GET", "/v2/_catalog"), ("HEAD", MANIFEST), ("GET", MANIFEST), ("GET", "/v2/a/tags/list")]
WRITING = [
    ("POST", "/v2/a/blobs/uploads/"), ("PATCH", "/v2/a/blobs/uploads/x"), ("GET", "/v2/a/blobs/uploads/x"),
    ("PUT", "/v2/a/manifests/1"), ("DELETE", BLOB),
]  # fmt: skip


class Someone:
    """Users, of whom there is one: alice, whose password is wonder."""

    def __init__(self) -> None:
        self.there = {"alice"}

    async def check(self, login: Login) -> bool:
        return login.user in self.there and login.password == b"wonder"

    def knows(self, user: str) -> bool:
        return user in self.there


def basic(text: str) -> list[tuple[str, str]]:
    return [("Authorization", "Basic " + base64.b64encode(text.encode()).decode())]


def bearer(token: str) -> list[tuple[str, str]]:
    return [("Authorization", f"Bearer {token}")]


@pytest.fixture
def users() -> Someone:
    return Someone()


@pytest.fixture
def clock() -> Clock:
    clock = Clock()
    clock.advance(1_750_000_000)
    return clock


@pytest.fixture
def enter(visit: Any, shelf: Any, clock: Clock) -> Any:
    """Return a function that makes a visitor of a registry with a guard."""
    shelf.manifests["1"] = ManifestAnswer(Digest.of(b"{}"), OCI_MANIFEST, 2, b"{}", "-")

    def make(guard: Guard, **options: Any) -> Any:
        return visit(Own(Face(clock), shelf, guard).answer, clock=clock, **options)

    return make


def test_an_open_registry_is_everyones(enter: Any) -> None:
    visitor = enter(Open())
    for method, path in [("GET", "/v2/"), *READING, *WRITING]:
        assert visitor.ask(method, path).status == 200
    assert visitor.ask("GET", "/v2/token").status == 404


def test_users_only(enter: Any, users: Any) -> None:
    visitor = enter(OnlyUsers(users, REALM))
    for method, path in [("GET", "/v2/"), *READING, *WRITING]:
        for fields in ([], basic("alice:wrong"), basic("bob:wonder"), bearer("x"), [("Authorization", "?")]):
            answer = visitor.ask(method, path, fields)
            assert (answer.status, answer.fields("WWW-Authenticate")) == (401, [f'Basic realm="{REALM}"'])
        assert visitor.ask(method, path, basic("alice:wonder")).status == 200
    assert visitor.ask("GET", "/v2/token").status == 404
    # Where they have no login, podman and skopeo show an empty one.
    assert b"a login is needed" in visitor.ask("GET", "/v2/", basic(":")).body


class TestReadByAll:
    @pytest.fixture
    def visitor(self, enter: Any, users: Any, clock: Clock) -> Any:
        return enter(ReadByAll(users, REALM, b"s" * 32, clock.seconds), secure=True)

    def token(self, visitor: Any, fields: list[tuple[str, str]] | None = None) -> str:
        answer = visitor.ask("GET", f"/v2/token?service={REALM}&scope=repository:a:pull", fields or [])
        assert (answer.status, answer.headers["Cache-Control"]) == (200, "no-store")
        document = json.loads(answer.body)
        assert document["token"] == document["access_token"]
        return str(document["token"])

    def test_reading_needs_nothing(self, visitor: Any) -> None:
        for method, path in READING:
            assert visitor.ask(method, path).status == 200

    def test_writing_needs_a_login(self, visitor: Any) -> None:
        for method, path in WRITING:
            for fields in ([], basic("alice:wrong"), bearer(self.token(visitor))):
                assert visitor.ask(method, path, fields).status == 401
            for fields in (basic("alice:wonder"), bearer(self.token(visitor, basic("alice:wonder")))):
                assert visitor.ask(method, path, fields).status == 200

    def test_dockers_dance(self, visitor: Any) -> None:
        """It is challenged at /v2/ in any case, and so shows its login where it has one."""
        answer = visitor.ask("GET", "/v2/", [("Host", "192.0.2.1:5443")])
        assert answer.status == 401
        assert answer.fields("WWW-Authenticate") == [
            f'Bearer realm="https://192.0.2.1:5443/v2/token",service="{REALM}"'
        ]
        for fields in (None, basic("alice:wonder")):
            assert visitor.ask("GET", "/v2/", bearer(self.token(visitor, fields))).status == 200
        assert visitor.ask("GET", "/v2/", basic("alice:wonder")).status == 200

    def test_a_challenge_tells_the_scope(self, visitor: Any) -> None:
        told = visitor.ask("PUT", "/v2/a/b/manifests/1").headers["WWW-Authenticate"]
        assert told.endswith(',scope="repository:a/b:pull,push"')

    def test_a_wrong_login_gets_no_token(self, visitor: Any) -> None:
        answer = visitor.ask("GET", "/v2/token", basic("alice:wrong"))
        assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, f'Basic realm="{REALM}"')
        assert visitor.ask("POST", "/v2/token", [], b"grant_type=password").status == 405

    @pytest.mark.parametrize("change", ["ended", "altered", "foreign", "empty", "gone"])
    def test_tokens_that_are_no_good(self, visitor: Any, clock: Clock, enter: Any, users: Any, change: str) -> None:
        token = self.token(visitor, basic("alice:wonder"))
        if change == "ended":
            clock.advance(3600)
        elif change == "altered":
            token = token[:50] + ("A" if token[50] != "A" else "B") + token[51:]
        elif change == "foreign":
            token = self.token(enter(ReadByAll(users, REALM, b"t" * 32, clock.seconds)), basic("alice:wonder"))
        elif change == "empty":
            token = ""
        else:
            users.there.clear()
        visitor = enter(ReadByAll(users, REALM, b"s" * 32, clock.seconds), secure=True)
        assert visitor.ask("PUT", "/v2/a/manifests/1", bearer(token)).status == 401

    def test_a_host_that_is_none(self, visitor: Any) -> None:
        told = visitor.ask("GET", "/v2/", [("Host", 'x"y')])
        assert told.status == 400 or f"https://{REALM}/v2/token" in told.headers["WWW-Authenticate"]


@pytest.mark.parametrize(
    ("query", "reached"),
    [
        ("", "otherwise /v2/"),
        ("?n=1", "otherwise /v2/?n=1"),
        ("?ns=docker.io", "mirror /v2/?ns=docker.io"),
        ("?ns=Docker-Registry.local", "own /v2/"),
        ("?n=1&ns=docker-registry.local:5443&last=x", "own /v2/?n=1&last=x"),
        ("?ns=a/b", "mirror /v2/?ns=a/b"),
        ("?ns=", "mirror /v2/?ns="),
    ],
)
def test_which_registry_a_namespace_means(visit: Any, query: str, reached: str) -> None:
    def door(name: str) -> Any:
        async def answer(request: Any) -> None:
            target = request.path + (f"?{request.query}" if request.query else "")
            request.answer(200, [], f"{name} {target}".encode())

        return answer

    door_by_name = ByNamespace(door("own"), door("mirror"), frozenset([REALM]), door("otherwise"))
    assert visit(door_by_name.answer).ask("GET", "/v2/" + query).body.decode() == reached


def test_a_namespace_that_cannot_be_read(visit: Any) -> None:
    async def unused(request: Any) -> None:
        raise AssertionError

    answer = visit(ByNamespace(unused, unused, frozenset(), unused).answer).ask("GET", "/v2/?ns=a&ns=b")
    assert answer.status == 400
