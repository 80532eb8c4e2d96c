"""A hostile registry speaks to browsers and clients under our name: cookies, scripts, pages, permissions, links."""

from __future__ import annotations

import json

import pytest

from tests.e2e.harness.fake_registry import respond_normally
from tests.e2e.harness.http_client import BufferedResponse, request_directly, send_raw_request
from tests.e2e.harness.http_server import HTTPExchange
from tests.e2e.harness.images import TypedContent, sha256_digest
from tests.e2e.harness.registry_daemon import RegistryDaemon
from tests.hostile.conftest import EVIL, HostileNetwork, StartRegistryDaemon

HOSTILE_FIELDS = {
    "Set-Cookie": "session=evil",
    "Refresh": "0;url=https://evil.test/",
    "Clear-Site-Data": '"*"',
    "Service-Worker-Allowed": "/",
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Allow-Credentials": "true",
    "Access-Control-Expose-Headers": "*",
    "Strict-Transport-Security": "max-age=99999999",
    "Content-Security-Policy": "default-src *",
    "Cross-Origin-Resource-Policy": "cross-origin",
    "X-Content-Type-Options": "sniff",
    "Content-Disposition": "inline",
    "Location": "https://evil.test/",
    "Link": "</evil.js>; rel=preload",
    "Alt-Svc": 'h3="evil.test:443"',
    "NEL": "{}",
    "Report-To": "{}",
    "Server": "evil",
    "X-Frame-Options": "ALLOWALL",
}
WANTED_FIELDS = {
    "RateLimit-Limit": "100;w=21600",
    "RateLimit-Remaining": "76;w=21600",
    "Docker-RateLimit-Source": "192.0.2.1",
    "Retry-After": "7",
}
PAGE = b"<script>alert(document.domain)</script>"
TYPES = [
    "text/html", "TEXT/HTML; charset=utf-8", "image/svg+xml", "application/xhtml+xml", "text/xml", "application/xml",
    "text/javascript", "application/javascript", "application/json, text/html", "application/json;x=text/html",
    "application/vnd.evil+xml", "multipart/x-mixed-replace; boundary=x", "text/css", "application/pdf", "",
]  # fmt: skip


def speak(network: HostileNetwork, content_type: str, status: int = 200) -> None:
    """Make the hostile registry answer everything with a page and all fields."""
    fields = {**HOSTILE_FIELDS, **WANTED_FIELDS, "Content-Type": content_type}

    def respond(exchange: HTTPExchange, content: TypedContent | None) -> None:
        if exchange.path == "/v2/":
            respond_normally(exchange, content)
        else:
            exchange.respond(status, fields, content.data if content is not None else PAGE)

    for method in ("GET", "HEAD"):
        network.evil.add_rule(method, "", respond)


def ask(daemon: RegistryDaemon, door: str, path: str) -> BufferedResponse:
    """Request `path` of the hostile registry through a door of the daemon."""
    if door == "interception":
        return daemon.client.get(EVIL + path)
    address = daemon.url if door == "mirror" else f"http://{daemon.http_address}"
    return request_directly("GET", f"{address}{path}?ns=evil.test")


doors = pytest.mark.parametrize("door", ["interception", "mirror", "mirror at the registry's port"])


def assert_data(response: BufferedResponse) -> None:
    """Check that nothing of the hostile registry but data is left."""
    media_type = response.headers["content-type"]
    assert media_type in ("application/octet-stream", "application/json") or media_type.startswith(
        "application/vnd.oci"
    )
    for name, value in HOSTILE_FIELDS.items():
        assert response.headers.get(name.lower()) != value, name


@doors
def test_only_fields_of_the_api_pass(network: HostileNetwork, start_daemon: StartRegistryDaemon, door: str) -> None:
    daemon = start_daemon()
    assert daemon.client.get(f"{EVIL}/v2/").status == 200
    digest = network.evil.put_blob("app", PAGE)
    for status in (403, 404, 503, 429, 200):  # after a 429, manifests are refused for a while
        network.evil.reset_rules()
        speak(network, "text/html", status)
        for path in ("tags/list", "manifests/latest", f"blobs/{digest}", f"referrers/{digest}"):
            response = ask(daemon, door, f"/v2/app/{path}")
            assert_data(response)
            if path == "tags/list" or (status != 200 and (status, response.status) != (404, 200)):
                assert response.headers["ratelimit-remaining"] == "76;w=21600", (status, path)
                assert response.headers["retry-after"] == "7", (status, path)


@doors
def test_nothing_is_sent_as_a_page(network: HostileNetwork, start_daemon: StartRegistryDaemon, door: str) -> None:
    daemon = start_daemon()
    assert daemon.client.get(f"{EVIL}/v2/").status == 200
    for number, content_type in enumerate(TYPES):
        network.evil.reset_rules()
        manifest = TypedContent(
            content_type, json.dumps({"schemaVersion": 2, "x": f"{PAGE.decode()}{number}"}).encode()
        )
        network.evil.put_manifest("app", "page", manifest)
        network.evil.put_manifest("app", sha256_digest(manifest.data), manifest)
        speak(network, content_type)
        for path in ("/v2/_catalog", "/v2/app/tags/list", "/v2/app/manifests/page"):
            assert_data(ask(daemon, door, path))


@doors
def test_a_link_leads_to_the_same_list(network: HostileNetwork, start_daemon: StartRegistryDaemon, door: str) -> None:
    daemon = start_daemon()
    links = {
        '<https://evil.test/v2/app/tags/list?last=9>; rel="next"': "last=9",
        "<//evil.test/x?last=9>; rel=next": "last=9",
        "</evil.js?x>; rel=preload": None,
        "<javascript:alert(1)?x>; rel=next": "x",
    }
    for link, query in links.items():
        fields = {"Content-Type": "application/json", "Link": link}
        network.evil.add_rule("GET", "tags", lambda exchange, _, fields=fields: exchange.respond(200, fields, b"{}"), 1)
        suffix = "" if door == "interception" else "&ns=evil.test"
        expected = None if query is None else f'</v2/app/tags/list?{query}{suffix}>; rel="next"'
        assert ask(daemon, door, "/v2/app/tags/list").headers.get("link") == expected


def test_a_login_in_the_host_is_not_logged(start_daemon: StartRegistryDaemon) -> None:
    """The client itself makes this mistake, and the log is read by others."""
    daemon = start_daemon()
    for port in (daemon.port, daemon.http_port):
        for path in ("/", "/v2/", "/healthz", "/v2/app/tags/list?ns=evil.test"):
            send_raw_request(port, f"GET {path} HTTP/1.1\r\nHost: alice:s3cret@localhost\r\n\r\n".encode())
    send_raw_request(daemon.port, b"CONNECT alice:s3cret@good.test:443 HTTP/1.1\r\nHost: good.test\r\n\r\n")
    send_raw_request(daemon.port, b"GET http://alice:s3cret@good.test/ HTTP/1.1\r\nHost: good.test\r\n\r\n")
    daemon.check_log(["s3cret"])
