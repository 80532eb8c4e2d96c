"""The login of the proxy's clients (PROXY_HTPASSWD_FILE)."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from dockerproxy.http.request import Request
from dockerproxy.oci.credentials import BasicCredentials
from dockerproxy.proxy.login import ProxyLogin


class CountingUsers:
    """One user, alice, whose password is "wonder", and the number of passwords that were checked."""

    checks = 0

    def has_user(self, user: str) -> bool:
        return user == "alice"

    async def check_password(self, credentials: BasicCredentials, client: str) -> bool:
        self.checks += 1
        return credentials == BasicCredentials("alice", "wonder")


@pytest.fixture
def users() -> CountingUsers:
    return CountingUsers()


@pytest.fixture
def client(connect_client: Any, users: CountingUsers) -> Any:
    async def handle(request: Request) -> None:
        await ProxyLogin(users).check(request)
        request.respond(200, [], b"")

    return connect_client(handle)


def fetch(client: Any, text: str) -> Any:
    encoded = base64.b64encode(text.encode()).decode()
    return client.fetch("GET", "/", [("Proxy-Authorization", f"Basic {encoded}")])


def test_login(client: Any, users: CountingUsers) -> None:
    assert fetch(client, "alice:wonder").status == 200
    response = fetch(client, "alice:guess")
    assert (response.status, users.checks) == (407, 2)
    assert b"is wrong" in response.body


@pytest.mark.parametrize("text", [":", ""])
def test_an_empty_login_is_none(client: Any, users: CountingUsers, text: str) -> None:
    """It is no wrong password, which would delay the client's next login."""
    response = fetch(client, text)
    assert (response.status, users.checks) == (407, 0)
    assert b"needs a user name and a password" in response.body


@pytest.mark.parametrize("texts", [["alice:wonder", "mallory:x"], ["mallory:x", "alice:wonder"], ["alice:wonder"] * 2])
def test_two_logins_are_none(client: Any, users: CountingUsers, texts: list[str]) -> None:
    """Another server might take the other one."""
    fields = [("Proxy-Authorization", f"Basic {base64.b64encode(text.encode()).decode()}") for text in texts]
    assert (client.fetch("GET", "/", fields).status, users.checks) == (407, 0)


def test_each_request_in_a_tunnel_needs_its_user(connect_client: Any, users: CountingUsers) -> None:
    async def handle(request: Request) -> None:
        request.proxy_user = request.path.removeprefix("/")
        await ProxyLogin(users).check(request)
        request.respond(200, [], b"")

    client = connect_client(handle)
    assert client.fetch("GET", "/alice", []).status == 200
    response = client.fetch("GET", "/bob", [])
    assert (response.status, users.checks) == (407, 0)
    assert b"the user that opened this tunnel was removed" in response.body


def test_a_tunnel_may_go_on(users: CountingUsers) -> None:
    assert [ProxyLogin(users).allows(user) for user in ("alice", "bob", None)] == [True, False, False]
    assert [ProxyLogin(None).allows(user) for user in ("alice", None)] == [True, True]
