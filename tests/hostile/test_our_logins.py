"""A client without a login uses the proxy's own (AUTH_REGISTRIES) for more than pulls, or to get its session."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from tests.e2e.harness.fake_registry import respond_error, respond_normally
from tests.e2e.harness.http_client import BufferedResponse, ProxyClient, basic_authorization, request_directly
from tests.e2e.harness.images import TypedContent
from tests.e2e.harness.registry_daemon import RegistryDaemon
from tests.hostile.conftest import GOOD, HostileNetwork, StartRegistryDaemon

ADMIN = basic_authorization("admin", "of-everything")
LOGIN = "good.test:admin:of-everything"
SESSION = "SESSION=of-the-administrator"

NO_PULLS = [
    "/v2/x",
    "/v2/search?q=",
    "/v2/token?scope=repository:secret:pull,push&service=x",
    "/v2/users/",
    "/v2/app/blobs/uploads/0",
    "/v2/app/tags/list?access_token=1",
    "/v2/_catalog?_method=DELETE",
    "/token?scope=repository:secret:pull,push",
    "/service/rest/v1/users",
    "/api/users",
]

TRICKS = [
    "/v2/..;/service/rest/v1/users",
    "/v2/.;/x",
    "/v2/..%5cservice",
    "/v2/..\\service",
    "/v2/%2e%2e;/x",
    "/v2/%2e%2e/x",
    "/v2/%2E%2e%2fapi",
    "/v2/%252e%252e/x",
    "/v2/..%3b/x",
    "/v2//admin",
    "/v2/app;x=1/tags/list",
    "/v2/app/tags/list;/",
    "/v2/app/tags/list%3bx",
    "/v2/%c0%ae%c0%ae/x",
    "/v2/app/%00/tags/list",
    "/v2/app/%0d%0a/tags/list",
    "//v2/_catalog",
    "/x/../v2/_catalog",
    "/x/%2e%2e/v2/_catalog",
    "/;x/v2;/_catalog",
    "/%76%32/../api",
    "/.;/v2/_catalog",
    "/\\v2\\_catalog",
    "/%5cv2/_catalog",
    "/v2%2f_catalog",
    "/v2%5c_catalog",
    "/v2/app%2ftags%2flist",
    "/v2/_catalog%2f..%2f..%2fapi",
]


def require_admin(exchange: Any, content: TypedContent | None) -> None:
    """Give nothing without the admin's login; with it, everything, and a session."""
    if exchange.request.headers.get("authorization") != ADMIN:
        respond_error(exchange, 401, "UNAUTHORIZED", WWW_Authenticate='Basic realm="good"', Set_Cookie=SESSION)
    elif content is None and exchange.path != "/v2/":
        fields = {"Content-Type": "application/json", "Set-Cookie": SESSION, "Link": f"<{exchange.path}?last=1>"}
        exchange.respond(200, fields, b'{"secret":"of the administrator"}')
    else:
        respond_normally(exchange, content)


@pytest.fixture
def daemon(network: HostileNetwork, start_daemon: StartRegistryDaemon) -> RegistryDaemon:
    for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH"):
        network.good.add_rule(method, "", require_admin)
    network.good.put_blob("app", b"shared by the administrator")
    daemon = start_daemon(AUTH_REGISTRIES=LOGIN, ALLOW_PUSH="true")
    assert daemon.client.get(f"{GOOD}/v2/").status == 200  # the login is known to be needed, and shared
    return daemon


def send(client: ProxyClient, method: str, target: str, **headers: str) -> BufferedResponse:
    """Send `target` to the good registry as it is written, through the interception."""
    return client.request(method, GOOD + target, headers)


def assert_no_session(response: BufferedResponse) -> None:
    assert "set-cookie" not in response.headers
    assert b"of the administrator" not in response.body


def test_the_login_serves_pulls_and_lists(network: HostileNetwork, daemon: RegistryDaemon) -> None:
    """Otherwise a refusal below would prove nothing."""
    digest = network.good.put_blob("app", b"shared by the administrator")
    assert daemon.client.get(f"{GOOD}/v2/app/blobs/{digest}").body == b"shared by the administrator"
    for path in ("/v2/_catalog", "/v2/app/tags/list", "/v2/app/tags/list?n=5&last=x"):
        response = daemon.client.get(GOOD + path, Cookie="mine=1", X_HTTP_Method_Override="DELETE")
        assert (response.status, response.body) == (200, b'{"secret":"of the administrator"}')
        assert "set-cookie" not in response.headers
        request = network.good.requests[-1]
        assert request.headers["authorization"] == ADMIN
        assert not {"cookie", "x-http-method-override"} & set(request.headers)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_the_login_is_shown_for_nothing_but_pulls(network: HostileNetwork, daemon: RegistryDaemon, method: str) -> None:
    for target in NO_PULLS:
        offset = len(network.good.requests)
        response = send(daemon.client, method, target)
        assert response.status == 401, target
        assert b"of the administrator" not in response.body
        for request in network.good.requests[offset:]:
            assert "authorization" not in request.headers, (target, request)


def test_the_login_is_shown_for_no_write(network: HostileNetwork, daemon: RegistryDaemon) -> None:
    for method, target in [
        ("POST", "/v2/app/blobs/uploads/"),
        ("PUT", "/v2/app/manifests/latest"),
        ("DELETE", "/v2/app/manifests/latest"),
        ("PATCH", "/v2/app/blobs/uploads/1"),
        ("DELETE", "/v2/_catalog"),
        ("POST", "/v2/app/tags/list"),
        ("DELETE", "/api/users/1"),
    ]:
        offset = len(network.good.requests)
        assert b"of the administrator" not in send(daemon.client, method, target).body
        assert len(network.good.requests) == offset + 1
        assert "authorization" not in network.good.requests[-1].headers


@pytest.mark.parametrize("door", ["interception", "mirror", "hosted"])
def test_ambiguous_paths_are_asked_of_nobody(network: HostileNetwork, daemon: RegistryDaemon, door: str) -> None:
    offset = len(network.good.requests)
    for target in TRICKS:
        if door == "interception":
            response = send(daemon.client, "GET", target)
        elif door == "mirror":
            response = request_directly("GET", f"{daemon.url}{target}{'&' if '?' in target else '?'}ns=good.test")
        else:
            response = request_directly("GET", f"http://{daemon.http_address}{target}")
        assert response.status in (400, 404), target
        assert response.headers["content-type"].startswith(("application/json", "text/plain")), target
        assert_no_session(response)
    assert network.good.requests[offset:] == []


def test_a_login_shown_on_a_connection_does_not_stay_there(network: HostileNetwork, daemon: RegistryDaemon) -> None:
    """The upstream connection is reused for the next client, and its request has no login."""
    for _ in range(3):
        assert daemon.client.get(f"{GOOD}/v2/_catalog").status == 200
        response = daemon.client.get(f"{GOOD}/api/users")
        assert (response.status, network.good.requests[-1].headers.get("authorization")) == (401, None)
        assert b"of the administrator" not in response.body


def test_clients_log_in_to_web_pages_by_themselves(network: HostileNetwork, daemon: RegistryDaemon) -> None:
    """The web pages and git repositories of an intercepted host are the client's own business, cookies included."""
    response = daemon.client.get(f"{GOOD}/team/app.git/info/refs?service=git-upload-pack", Cookie="mine=1")
    assert (response.status, response.headers["www-authenticate"]) == (401, 'Basic realm="good"')
    assert network.good.requests[-1].headers["cookie"] == "mine=1"
    response = daemon.client.get(f"{GOOD}/caf%C3%A9/a%20b;c//d?x=%2e", Authorization=ADMIN, Cookie="mine=1")
    assert (response.status, response.headers["set-cookie"]) == (200, SESSION)
    assert network.good.requests[-1].path == "/caf%C3%A9/a%20b;c//d?x=%2e"


def test_another_case_of_the_path_is_asked_of_nobody(
    network: HostileNetwork, start_daemon: StartRegistryDaemon
) -> None:
    """Some servers ignore case. By such a path a client would push although ALLOW_PUSH is false."""
    daemon = start_daemon()
    offset = len(network.good.requests)
    paths = [
        ("GET", "/_catalog"),
        ("PUT", "/app/manifests/latest"),
        ("POST", "/app/blobs/uploads/"),
        ("DELETE", "/app/manifests/latest"),
    ]
    for prefix, (method, path) in product(("/V2", "/%562", "//V2", "/x/../V2", "/V2;x", "/%2556%32"), paths):
        assert send(daemon.client, method, prefix + path).status == 400, (method, prefix + path)
    assert network.good.requests[offset:] == []
