"""The attacker is a web page that somebody in the network looks at.

He has no login and no connection of his own, only a browser that sends what he tells it, with the fields that browsers
send. `test_browser.py` tries the same in Chromium.
"""

from __future__ import annotations

import http.client
import json
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.e2e.harness.http_client import (
    BufferedResponse,
    basic_authorization,
    read_response,
    request_directly,
    send_raw_request,
)
from tests.e2e.harness.images import TypedContent, sha256_digest
from tests.e2e.harness.process import wait_until
from tests.e2e.harness.registry_daemon import HOSTED_REGISTRY_HOST, USERS, RegistryDaemon, write_htpasswd
from tests.hostile.conftest import HostileNetwork, StartRegistryDaemon

HOSTED = f"https://{HOSTED_REGISTRY_HOST}"
UI = "https://ui.example"
BLOB = b"a blob"
DIGEST = sha256_digest(BLOB)
MANIFEST = json.dumps({"schemaVersion": 2, "mediaType": "application/vnd.example+json"}).encode()
MANIFEST_TYPE = {"Content-Type": "application/vnd.example+json"}
SIMPLE_POST = {"Content-Type": "text/plain;charset=UTF-8"}  # a page may send it without asking first

FOREIGN = [
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": f"http://{HOSTED_REGISTRY_HOST}:8080"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors"},
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-User": "?1"},
    {"User-Agent": "Mozilla/5.0 Firefox/140.0", "Referer": "http://evil.example/"},
]
BROWSER = {"User-Agent": "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 Chrome/140.0 Safari/537.36"}


def send(
    port: int, method: str, target: str, fields: Mapping[str, str] | None = None, body: bytes = b""
) -> BufferedResponse:
    """Send a request as it is, with any Host."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
        for name, value in {"Host": "10.0.0.1", **(fields or {}), "Content-Length": str(len(body))}.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        return read_response(connection.getresponse())
    finally:
        connection.close()


def push(daemon: RegistryDaemon) -> None:
    """Push prod/app:latest, as an honest client does."""
    response = send(daemon.http_port, "PUT", "/v2/prod/app/manifests/latest", MANIFEST_TYPE, MANIFEST)
    assert response.status == 201, response.body


def stored_names(daemon: RegistryDaemon) -> list[str]:
    """Return the repositories and upload sessions of the hosted registry."""
    root = daemon.state_folder / "registry"
    return [path.name for path in root.rglob("*") if path.parent.name in ("repositories", "_uploads")]


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:3128", "localhost.evil.example"])
def test_a_rebound_name_does_nothing(start_daemon: StartRegistryDaemon, host: str) -> None:
    daemon = start_daemon()
    push(daemon)
    for port, namespace in ((daemon.http_port, ""), (daemon.port, f"?ns={HOSTED_REGISTRY_HOST}")):
        for method, path in [
            ("GET", "/v2/_catalog"),
            ("GET", "/v2/prod/app/manifests/latest"),
            ("PUT", "/v2/prod/app/manifests/backdoor"),
            ("DELETE", "/v2/prod/app/manifests/latest"),
            ("POST", "/v2/evil/blobs/uploads/"),
            ("GET", "/metrics"),
            ("GET", "/"),
        ]:
            response = send(port, method, path + namespace, {**MANIFEST_TYPE, "Host": host}, MANIFEST)
            assert response.status == 421, (method, path)
            assert b"ALLOWED_HOSTS" in response.body
    assert send(daemon.http_port, "GET", f"http://{host}/v2/_catalog").status == 421
    assert send(daemon.http_port, "GET", "/v2/_catalog").json == {"repositories": ["prod/app"]}
    assert send(daemon.http_port, "GET", "/v2/prod/app/tags/list").json["tags"] == ["latest"]


def test_a_rebound_name_pulls_nothing_from_upstream(network: HostileNetwork, start_daemon: StartRegistryDaemon) -> None:
    network.good.put_manifest("team/app", "latest", TypedContent(MANIFEST_TYPE["Content-Type"], MANIFEST))
    daemon = start_daemon()
    target = "/v2/team/app/manifests/latest?ns=good.test"
    assert send(daemon.port, "GET", target, {"Host": "evil.example"}).status == 421
    assert network.good.requests == []
    for host in ("proxy", "docker-registry.local:3128", "proxy.lan", f"127.0.0.1:{daemon.port}", "[::1]:3128"):
        assert send(daemon.port, "GET", target, {"Host": host}).status == 200, host


def test_set_up_works_by_any_name(start_daemon: StartRegistryDaemon) -> None:
    daemon = start_daemon()
    for port in (daemon.port, daemon.http_port):
        for path in ("/ca.crt", "/setup", "/healthz"):
            assert send(port, "GET", path, {"Host": "proxy.example:3128"}).status == 200


def test_names_and_origins_are_added_by_a_reload(start_daemon: StartRegistryDaemon) -> None:
    """In every process: a connection goes to any of them."""
    daemon = start_daemon()
    env_file = daemon.folder / ".env"
    daemon.stop()
    env_file.write_text("")
    daemon.argv += ["--env-file", str(env_file)]
    daemon.start()
    named, from_ui = {"Host": "proxy.example"}, {"Origin": UI}
    assert send(daemon.port, "GET", "/", named).status == 421
    assert send(daemon.http_port, "GET", "/v2/_catalog", from_ui).status == 403
    env_file.write_text(f"ALLOWED_HOSTS=*.lab.example proxy.example\nCORS_ORIGINS={UI}\n")
    daemon.send_signal(signal.SIGHUP)
    wait_until(lambda: "reloaded: serving" in daemon.output_text, "the reload")
    for _ in range(4):
        assert send(daemon.port, "GET", "/", named).status == 200
        assert send(daemon.port, "GET", "/", {"Host": "other.example"}).status == 421
        response = send(daemon.http_port, "GET", "/v2/_catalog", from_ui)
        assert (response.status, response.headers["access-control-allow-origin"]) == (200, UI)


@pytest.mark.parametrize("fields", FOREIGN, ids=lambda fields: " ".join(fields.values())[:40])
def test_a_foreign_page_writes_nothing(start_daemon: StartRegistryDaemon, fields: dict[str, str]) -> None:
    """Over TLS too: the page's requests are as valid there."""
    daemon = start_daemon()
    push(daemon)
    names = stored_names(daemon)
    requests = [
        ("POST", f"/v2/evil/blobs/uploads/?digest={DIGEST}", BLOB),
        ("POST", "/v2/evil/blobs/uploads/", b""),
        ("PUT", "/v2/prod/app/manifests/backdoor", MANIFEST),
        ("DELETE", "/v2/prod/app/manifests/latest", b""),
        ("OPTIONS", "/v2/prod/app/manifests/latest", b""),
        ("GET", "/v2/_catalog", b""),
        ("GET", "/v2/", b""),
        ("HEAD", "/v2/prod/app/manifests/latest", b""),
        ("GET", "/metrics", b""),
        ("POST", "/healthz", b""),
    ]
    for method, path, body in requests:
        headers = {**SIMPLE_POST, **fields}
        responses = [
            send(daemon.http_port, method, path, headers, body),
            send(daemon.port, method, path, headers, body),
            daemon.client.request(method, HOSTED + path, headers, body),
            daemon.client.request(method, f"http://{HOSTED_REGISTRY_HOST}{path}", headers, body),
        ]
        assert [response.status for response in responses] == [403] * 4, (method, path)
        assert not [name for response in responses for name in response.headers if name.startswith("access-control")]
    for path in ("/", "/ca.crt", "/setup", "/healthz"):
        assert send(daemon.port, "GET", path, fields).status == 200
    assert stored_names(daemon) == names
    assert send(daemon.http_port, "GET", "/v2/prod/app/tags/list").json["tags"] == ["latest"]


def test_a_foreign_page_pulls_nothing(network: HostileNetwork, start_daemon: StartRegistryDaemon) -> None:
    """Each pull counts at the registry, and the login of AUTH_REGISTRIES reads what is private."""
    network.good.put_manifest("team/app", "latest", TypedContent(MANIFEST_TYPE["Content-Type"], MANIFEST))
    daemon = start_daemon()
    path = "/v2/team/app/manifests/latest"
    for fields in (*FOREIGN, BROWSER):
        response = send(daemon.port, "GET", f"{path}?ns=good.test", fields)
        assert (response.status, response.error_code) == (403, "DENIED")
    for fields in FOREIGN:  # a browser that uses the proxy and trusts its CA
        assert daemon.client.request("GET", f"https://good.test{path}", fields).status == 403
        assert daemon.client.request("POST", "https://good.test/v2/team/app/blobs/uploads/", fields).status == 403
    assert network.good.requests == []


def test_a_person_and_programs_are_served(start_daemon: StartRegistryDaemon) -> None:
    """The addresses that a person types, and the requests of dockerd, containerd and curl, look like these."""
    daemon = start_daemon()
    push(daemon)
    navigation = {"Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate", **BROWSER}
    for fields in (navigation, BROWSER, {"User-Agent": "docker/28.3.0 go/go1.24.4"}, {}):
        assert send(daemon.http_port, "GET", "/v2/_catalog", fields).json == {"repositories": ["prod/app"]}
        assert send(daemon.port, "GET", "/metrics", fields).status == 200
    assert daemon.client.get(f"{HOSTED}/v2/_catalog").json == {"repositories": ["prod/app"]}


def test_only_the_pages_of_cors_origins_use_the_registry(start_daemon: StartRegistryDaemon) -> None:
    daemon = start_daemon(CORS_ORIGINS=f"{UI} http://ui.lan:8000")
    push(daemon)
    preflight = {"Access-Control-Request-Method": "DELETE", "Access-Control-Request-Headers": "authorization"}
    path = "/v2/prod/app/manifests/latest"
    for origin in (UI, "http://ui.lan:8000"):
        response = send(daemon.http_port, "OPTIONS", path, {"Origin": origin, **preflight})
        assert (response.status, response.headers["access-control-allow-origin"]) == (204, origin)
        response = daemon.client.request("GET", HOSTED + path, {"Origin": origin, "Sec-Fetch-Site": "cross-site"})
        assert (response.status, response.headers["access-control-allow-credentials"]) == (200, "true")
        assert "Docker-Content-Digest" in response.headers["access-control-expose-headers"]
    for origin in ("http://ui.example", f"{UI}:8443", f"{UI}.evil.example", "https://evil.example"):
        assert send(daemon.http_port, "OPTIONS", path, {"Origin": origin, **preflight}).status == 403
        assert send(daemon.http_port, "DELETE", path, {"Origin": origin}).status == 403
    assert send(daemon.http_port, "DELETE", path, {"Origin": UI}).status == 202


def test_a_ui_logs_in(start_daemon: StartRegistryDaemon, tmp_path: Path) -> None:
    """A preflight comes without the login, and the page has to see that it needs one."""
    daemon = start_daemon(CORS_ORIGINS=UI, HTPASSWD_FILE=str(write_htpasswd(tmp_path)))
    preflight = {"Origin": UI, "Access-Control-Request-Method": "GET"}
    assert send(daemon.http_port, "OPTIONS", "/v2/_catalog", preflight).status == 204
    login = {"Authorization": basic_authorization("alice", USERS["alice"])}
    for fields, status in (({}, 401), (login, 200)):
        response = send(daemon.http_port, "GET", "/v2/_catalog", {"Origin": UI, **fields})
        assert (response.status, response.headers["access-control-allow-origin"]) == (status, UI)
    # A browser that remembers the login sends it for any page.
    assert send(daemon.http_port, "GET", "/v2/_catalog", {"Origin": "https://evil.example", **login}).status == 403


def test_what_others_wrote_is_no_page(network: HostileNetwork, start_daemon: StartRegistryDaemon) -> None:
    page = b"<html><script>steal()</script>"
    daemon = start_daemon()
    push(daemon)
    for media_type in ("text/html", "image/svg+xml", "application/xhtml+xml", "text/javascript", "application/xml"):
        response = send(daemon.http_port, "PUT", "/v2/x/manifests/1", {"Content-Type": media_type}, page)
        assert (response.status, response.error_code) == (400, "MANIFEST_INVALID")
    # It was pushed before such types were refused, or another registry wrote the directory.
    for file in (daemon.state_folder / "registry").rglob("*"):
        if file.is_file() and file.read_bytes() == MANIFEST_TYPE["Content-Type"].encode():
            file.write_bytes(b"text/html")
    network.evil.put_manifest("x", "1", TypedContent("text/html", MANIFEST))
    network.evil.put_blob("x", page)
    responses = [
        send(daemon.http_port, "GET", "/v2/prod/app/manifests/latest"),
        daemon.client.get("https://evil.test/v2/x/manifests/1"),
        daemon.client.get("https://evil.test/v2/x/manifests/1"),
        send(daemon.port, "GET", f"/v2/x/blobs/{sha256_digest(page)}?ns=evil.test"),
    ]
    assert [response.status for response in responses] == [200] * 4
    types = {response.headers["content-type"] for response in responses}
    assert types <= {"application/octet-stream", MANIFEST_TYPE["Content-Type"]}
    assert responses[0].headers["content-type"] == "application/octet-stream"


def test_every_response_limits_browsers(network: HostileNetwork, start_daemon: StartRegistryDaemon) -> None:
    network.good.put_blob("team/app", BLOB)
    daemon = start_daemon()
    push(daemon)
    paths = [
        "/", "/ca.crt", "/setup", "/healthz", "/metrics", "/none", "/v2/", "/v2/_catalog", "/v2/prod/app/tags/list",
        "/v2/prod/app/manifests/latest", "/v2/prod/app/manifests/none", f"/v2/team/app/blobs/{DIGEST}?ns=good.test",
        f"/v2/team/app/blobs/{DIGEST}?ns=good.test", "/v2/team/app/tags/list?ns=good.test",
        "/v2/x/tags/list?ns=none.test",
    ]  # fmt: skip
    responses = [send(port, "GET", path) for port in (daemon.port, daemon.http_port) for path in paths]
    responses += [
        daemon.client.get(f"https://good.test/v2/team/app/blobs/{DIGEST}"),
        daemon.client.get("https://good.test/v2/team/none/manifests/1"),
        daemon.client.get(f"{HOSTED}/v2/_catalog"),
        request_directly("GET", f"https://127.0.0.1:{daemon.registry_port}/v2/", context=daemon.client_context),
        send(daemon.port, "BREW", "/"),
        send(daemon.port, "GET", "ftp://x/"),
        send(daemon.port, "CONNECT", "127.0.0.1:443"),
        send_raw_request(daemon.port, b"\r\nno HTTP\r\n\r\n"),
        send_raw_request(daemon.port, b"GET / HTTP/1.1\r\n\r\n"),
    ]
    for response in responses:
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["content-security-policy"] == "sandbox; default-src 'none'; frame-ancestors 'none'"
        assert response.headers["cross-origin-resource-policy"] == "same-origin"
        assert "access-control-allow-origin" not in response.headers
