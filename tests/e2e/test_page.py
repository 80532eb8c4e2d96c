"""The page of a real daemon: its documents, private names, sessions and actions in every process."""

from __future__ import annotations

import asyncio
import html
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from dockerproxy.admin.viewer import Viewer
from dockerproxy.oci.names import Digest
from dockerproxy.store.layout import Layout
from tests.e2e.harness import images
from tests.e2e.harness.daemon import StartDaemon, TwistdDaemon
from tests.e2e.harness.fake_registry import pause_after
from tests.e2e.harness.http_client import BufferedResponse, read_response
from tests.e2e.harness.images import ACCEPT_MANIFESTS, OCI_CONFIG, OCI_LAYER, TypedContent
from tests.e2e.harness.process import wait_until
from tests.e2e.harness.registry_daemon import USERS, write_htpasswd
from tests.e2e.harness.upstreams import FAKE, Upstreams
from tests.e2e.test_image_pulls import Budget
from tests.e2e.test_overview import ask_control_socket, get, live_view, pull, pull_as_alice, registry_row
from tests.page.demo import IMAGES, DemoOverview, first_event, health

PAGES = ("/", "/?range=1h", "/images", "/registries", "/registries/docker.io", "/registries/fake.test", "/clients",
         "/doctor", "/login")  # fmt: skip


class Visitor:
    """A browser with a cookie. Each request is a connection of its own, which any process may get."""

    def __init__(self, daemon: TwistdDaemon) -> None:
        self._daemon, self._port = daemon, daemon.port
        self.cookie = ""

    def get(self, path: str) -> BufferedResponse:
        return self._request("GET", path)

    def post(self, path: str, form: dict[str, str], origin: str | None = None) -> BufferedResponse:
        fields = {"Content-Type": "application/x-www-form-urlencoded"}
        fields["Origin"] = f"http://127.0.0.1:{self._port}" if origin is None else origin
        response = self._request("POST", path, urlencode(form), fields)
        self.cookie = response.headers.get("set-cookie", self.cookie).partition(";")[0]
        return response

    def sign_in_by_link(self) -> None:
        """Sign in as the administrator whom `dockerproxy page` lets in."""
        link = new_link(self._daemon)
        assert self.post("/login", {"link": link}).status == 303

    def form_token(self) -> str:
        match = re.search(rb'name="token" value="([0-9a-f]{64})"', self.get("/doctor").body)
        assert match is not None
        return match[1].decode()

    def _request(
        self, method: str, path: str, body: str = "", fields: dict[str, str] | None = None
    ) -> BufferedResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        try:
            headers = {"Accept": "text/html", "Cookie": self.cookie, **(fields or {})}
            connection.request(method, path, body, headers)
            return read_response(connection.getresponse())
        finally:
            connection.close()


def new_link(daemon: TwistdDaemon) -> str:
    """Return the token of a link that signs one browser in."""
    socket = str(daemon.state_folder / "run" / "control.sock")
    command = [sys.executable, "-m", "dockerproxy.cli", "page", "--json", "--socket", socket]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    token: str = json.loads(printed)["path"].partition("/login?link=")[2]
    return token


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_page_shows_private_images_to_administrators_only(
    upstreams: Upstreams, start_daemon: StartDaemon, tmp_path: Path, workers: str
) -> None:
    htpasswd = write_htpasswd(tmp_path)
    daemon = start_daemon(WORKERS=workers, HTPASSWD_FILE=str(htpasswd), ADMIN_USERS="alice")
    repository = f"secretpage/unseen{workers}"
    image = upstreams.push_to_hub(repository, "1", images.build_small_image(repository), owners={"alice"})
    public = images.build_small_image(f"page {workers}")
    upstreams.fake.put(f"page/public-{workers}", "1", public)
    pull_as_alice(upstreams, daemon, repository, image)
    pull(daemon, f"page/public-{workers}", public)
    if workers == "2":
        daemon.restart()  # pulls are gathered for a minute, or until their process ends
    names = [f"docker.io/{repository}", f"fake.test/page/public-{workers}"]

    def walked() -> bool:
        rows = {row["name"] for row in ask_control_socket(daemon, "images")["images"]}
        return rows.issuperset(names)

    wait_until(walked, "the repositories are listed", timeout=60)
    anonymous, administrator = Visitor(daemon), Visitor(daemon)
    paths = [*PAGES, "/images?q=secretpage", f"/images/{names[0]}", f"/images/{names[0]}?tag=1&confirm=remove"]
    everything = b""
    for path in paths:
        response = anonymous.get(path)
        assert response.status == (404 if names[0] in path else 200), (path, response.body)
        everything += response.body.replace(names[0].encode(), b"") if names[0] in path else response.body
    hidden = (b"unseen", image.digest.encode(), *(blob.digest.encode() for blob in image.blobs))
    assert [word for word in hidden if word in everything] == []
    shown = anonymous.get(f"/images/{names[1]}")
    assert shown.status == 200
    assert public.digest.encode() in shown.body
    assert b"docker pull fake.test/page/public" in shown.body

    assert administrator.post("/login", {"user": "alice", "password": "wrong"}).status == 403
    signed_in = administrator.post("/login", {"user": "alice", "password": USERS["alice"]})
    assert signed_in.status == 303
    for path in PAGES:  # whichever process answers
        assert b">alice<" in administrator.get(path).body
    assert names[0].encode() in administrator.get("/images").body
    page = administrator.get(f"/images/{names[0]}")
    assert page.status == 200
    assert image.digest.encode() in page.body
    wait_until(lambda: len(daemon.audit_entries("sign-in")) == 2, "both sign-ins are in the audit log")
    of_public = f"/images/{names[1]}"
    if workers == "2":
        wait_until(lambda: b">MISS<" in administrator.get(of_public).body, "the history of pulls")
        assert b"127.0.0.1</code>" in administrator.get(of_public).body
    assert b">MISS<" not in anonymous.get(of_public).body

    form = {"token": administrator.form_token(), "name": f"{names[1]}:1", "where": "cached"}
    for origin, changes in (("http://evil.example", {}), ("null", {}), (None, {"token": "0" * 64})):
        assert administrator.post("/actions/remove", {**form, **changes}, origin).status == 403
    assert anonymous.post("/actions/remove", form).status == 403
    assert administrator.get("/actions/remove?" + urlencode(form)).status == 404
    assert administrator.post("/actions/pin", form).status == 303
    refused = administrator.post("/actions/remove", form)
    assert refused.status == 403
    assert f"{names[1]}:1 is pinned; unpin it first. Nothing was removed.".encode() in refused.body
    assert administrator.post("/actions/unpin", form).status == 303
    assert daemon.audit_entries("remove") == []
    codes = [administrator.post("/actions/remove", form).headers["location"] for _ in range(2)]
    assert [code.partition("done=")[2] for code in codes] == ["removed", "gone"]
    wait_until(lambda: bool(daemon.audit_entries("remove")), "the removal is in the audit log")
    (entry,) = daemon.audit_entries("remove")
    assert (entry["user"], entry["from"]) == ("alice", "127.0.0.1")
    for _ in range(2):
        assert (
            administrator.post("/actions/gc", {"token": form["token"]}).headers["location"] == "/doctor?done=collecting"
        )
    wait_until(lambda: bool(daemon.audit_entries("gc")), "garbage was collected", timeout=60)
    assert {entry["user"] for entry in daemon.audit_entries("gc")} == {"alice"}
    pin = {"token": form["token"], "name": f"{names[1]}:1", "where": "cached"}
    for action, done in (("pin", "pinned"), ("unpin", "unpinned"), ("unpin", "unpinned"), ("refresh", "asked")):
        response = administrator.post(f"/actions/{action}", pin)
        assert response.status == 303, response.body
        assert response.headers["location"].endswith(f"done={done}")
    # The log is written in the background, in the order of the actions, and `refresh` was the last one.
    wait_until(lambda: bool(daemon.audit_entries("refresh")), "the last action is in the audit log")
    for action, times in (("pin", 2), ("unpin", 2), ("refresh", 1)):
        assert [entry["user"] for entry in daemon.audit_entries(action)] == ["alice"] * times, action

    htpasswd.write_text(htpasswd.read_text().replace("alice:", "other:"))
    wait_until(lambda: b">alice<" not in administrator.get("/").body, "the session ends with the user")


def test_a_host_that_only_a_wildcard_covers_is_nobodys_to_know(start_daemon: StartDaemon, tmp_path: Path) -> None:
    htpasswd = write_htpasswd(tmp_path)
    daemon = start_daemon(
        REGISTRIES="*.wild.test listed.test",
        UPSTREAM_ADDRESSES="secretcorp.wild.test:443=127.0.0.1:1",
        HTPASSWD_FILE=str(htpasswd),
        ADMIN_USERS="alice",
    )
    assert daemon.client.get("https://secretcorp.wild.test/v2/team/app/manifests/1").status == 502
    anonymous, administrator = Visitor(daemon), Visitor(daemon)
    assert administrator.post("/login", {"user": "alice", "password": USERS["alice"]}).status == 303
    assert b"secretcorp" in administrator.get("/doctor").body
    paths = ("/", "/doctor", "/registries", "/images", "/clients", "/metrics", "/readyz")
    resources = ("overview", "registries", "transfers", "budget", "traffic", "images", "status")
    for path in (*paths, *(f"/api/v1/{resource}" for resource in resources)):
        response = anonymous.get(path)
        assert response.status == 200, path
        assert b"secretcorp" not in response.body, path


@pytest.mark.parametrize("workers", ["1", "4"])
def test_what_is_live_ends_with_the_session(start_daemon: StartDaemon, tmp_path: Path, workers: str) -> None:
    daemon = start_daemon(WORKERS=workers, HTPASSWD_FILE=str(write_htpasswd(tmp_path)), ADMIN_USERS="alice")
    administrator = Visitor(daemon)
    assert administrator.post("/login", {"user": "alice", "password": USERS["alice"]}).status == 303
    with live_view(daemon) as anonymous, live_view(daemon, administrator.cookie) as view:
        wait_until(lambda: bool(view.events and anonymous.events), "both have the state")
        assert administrator.post("/logout", {"token": administrator.form_token()}).status == 303
        wait_until(lambda: view.has_ended, "the stream of the session ends", timeout=60)
        assert not anonymous.has_ended


def test_a_link_of_the_command_signs_in_once(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(WORKERS="2")
    token = new_link(daemon)
    path = f"/login?link={token}"
    visitor, late = Visitor(daemon), Visitor(daemon)
    assert b"Sign in as administrator" in visitor.get(path).body
    assert visitor.post("/login", {"link": token}, origin="http://evil.example").status == 403
    assert visitor.post("/login", {"link": token}).status == 303
    assert late.post("/login", {"link": token}).status == 403
    assert b"Collect garbage" in visitor.get("/doctor").body
    assert visitor.post("/logout", {"token": visitor.form_token()}).status == 303
    assert b"Collect garbage" not in visitor.get("/doctor").body
    assert token not in daemon.output_text
    wait_until(lambda: len(daemon.audit_entries("sign-in")) == 2, "both sign-ins are in the audit log")
    assert [entry["result"] for entry in daemon.audit_entries("sign-in")] == ["accepted", "refused"]


def kind(value: object) -> str:
    """Return the type of a JSON value. JavaScript has one for all numbers."""
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__


def differences(demo: Any, real: Any, where: str) -> list[str]:
    """Return where two JSON values differ in keys and types. None may stand for any type."""
    if demo is None or real is None:
        return []
    if kind(demo) != kind(real):
        return [f"{where}: {kind(demo)} is {kind(real)}"]
    if isinstance(demo, dict):
        is_free = where.endswith(".annotations")
        only = {} if is_free else {"the demo": demo.keys() - real.keys(), "the daemon": real.keys() - demo.keys()}
        found = [f"{where}.{key}: of {whose} only" for whose, keys in only.items() for key in sorted(keys)]
        for key in sorted(demo.keys() & real.keys()):
            found += differences(demo[key], real[key], f"{where}.{key}")
        return found
    if isinstance(demo, list) and demo:
        if not real:
            return [f"{where}: nothing to compare with"]
        return sorted({text for mine in demo for text in differences(mine, merged(real), f"{where}[]")})
    return []


def merged(values: list[Any]) -> Any:
    """Return one value for a list of like ones: of JSON objects, one with a value of each key that any of them has."""
    if not isinstance(values[0], dict):
        return values[0]
    result: dict[str, Any] = {}
    for value in values:
        result |= {key: part for key, part in value.items() if part not in (None, []) or key not in result}
    return result


def test_the_demo_has_the_schema_of_a_real_daemon(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    """An administrator's documents and the public ones have the keys and types of real ones."""
    daemon, gate, name = start_daemon(), threading.Event(), "demo/index"
    Budget(upstreams, "demo/", 100, 21600)
    layer = TypedContent(OCI_LAYER, images.random_bytes(3 << 20, "demo"))
    config = TypedContent(OCI_CONFIG, b'{"architecture":"amd64","os":"linux"}')
    child = images.build_image_from_blobs(config, [layer])
    upstreams.fake.put(name, "1", images.build_index({"amd64": child}))
    upstreams.fake.add_rule("GET", layer.digest, pause_after(1 << 20, gate), times=1)
    url = f"{FAKE}/v2/{name}"
    digests = [child.digest, images.build_index({"amd64": child}).digest]
    for reference in ("1", child.digest):
        assert daemon.client.get(f"{url}/manifests/{reference}", Accept=ACCEPT_MANIFESTS).status == 200
    assert daemon.client.get("https://closed.test/v2/a/b/manifests/1").status == 502
    reader = threading.Thread(target=daemon.client.get, args=(f"{url}/blobs/{layer.digest}",))
    reader.start()
    try:
        wait_until(lambda: ask_control_socket(daemon, "transfers")["transfers"], "the download is under way")
        wait_until(lambda: ask_control_socket(daemon, "images")["images"], "the repository is listed", timeout=60)
        wait_until(lambda: registry_row(daemon)["sparkline"], "the counters are sampled", timeout=60)
        found = compare_with_demo(daemon, f"fake.test/{name}", digests)
    finally:
        gate.set()
        reader.join()
    assert not found, "\n".join(found)


def compare_with_demo(daemon: TwistdDaemon, name: str, digests: list[str]) -> list[str]:
    """Return where the demo's documents differ from those of `daemon`, which has an index and its image as `name`."""
    demo, image, found = DemoOverview(), IMAGES[0][0], []
    resources: list[tuple[str, dict[str, str], dict[str, str]]] = [
        ("overview", {}, {}), ("traffic", {}, {}), ("registries", {}, {}), ("budget", {}, {}), ("images", {}, {}),
        ("registry", {"name": "docker.io"}, {"name": "fake.test"}), ("image", {"name": image}, {"name": name}),
    ]  # fmt: skip
    for viewer, ask in ((Viewer.administrator(), ask_control_socket), (Viewer(reads_hosted=True), get)):
        who = "administrator" if viewer.is_admin else "anonymous"
        for resource, made_up, arguments in resources:
            shown = asyncio.run(demo.get(resource, viewer, made_up))
            real = ask(daemon, f"{resource}?{urlencode(arguments)}" if arguments else resource)
            found += differences(shown, real, f"{who} {resource}")
        shown = asyncio.run(demo.get("manifest", viewer, {"name": image, "digest": digests[0]}))
        manifests = [ask(daemon, f"manifest?{urlencode({'name': name, 'digest': digest})}") for digest in digests]
        found += differences(shown, merged(manifests), f"{who} manifest")
    administrator = Viewer.administrator()
    found += differences(asyncio.run(health(False, administrator)), ask_control_socket(daemon, "doctor"), "doctor")
    with live_view(daemon) as view:
        wait_until(lambda: any(event.get("cache") for event in view.events), "the events tell the size of the cache")
        real = {**view.events[0], "cache": next(event["cache"] for event in view.events if event.get("cache"))}
        found += differences(first_event(Viewer()), real, "live")
    return found


def shown_findings(page: BufferedResponse) -> list[tuple[str, str, str]]:
    """Return the findings that a page of the health shows: level, sentence and advice."""
    rows = re.findall(
        r'<li class="(\w+)">.*?<strong>(.*?)</strong>(?:<p>(.*?)</p>)?</div></li>', page.body.decode(), re.DOTALL
    )
    return [(level, html.unescape(sentence), html.unescape(advice)) for level, sentence, advice in rows]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_health_page_equals_the_doctor(start_daemon: StartDaemon, workers: str) -> None:
    """Those that the command prints, in their order; anonymous visitors get the public ones."""
    daemon = start_daemon(WORKERS=workers)
    administrator = Visitor(daemon)
    administrator.sign_in_by_link()
    argv = [sys.executable, "-m", "dockerproxy.cli", "--socket", str(daemon.state_folder / "run/control.sock")]
    printed = subprocess.run([*argv, "doctor", "--json"], capture_output=True, text=True, check=False, timeout=60)
    findings = json.loads(printed.stdout)["findings"]
    assert {finding["level"] for finding in findings} >= {"bad", "ok"}
    expected = [(finding["level"], finding["sentence"], finding["advice"]) for finding in findings]
    assert shown_findings(administrator.get("/doctor")) == expected
    public = [row for row, finding in zip(expected, findings, strict=True) if finding["public"]]
    assert 0 < len(public) < len(expected)
    assert shown_findings(Visitor(daemon).get("/doctor")) == public
    problems = re.search(rb"problems: </span>(\d+)<", administrator.get("/").body)
    assert problems is not None
    assert int(problems[1]) == sum(level != "ok" for level, _, _ in expected)


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_page_while_garbage_is_collected(start_daemon: StartDaemon, workers: str) -> None:
    daemon = start_daemon(WORKERS=workers)
    daemon.stop()
    layout, old = Layout(daemon.state_folder / "registry"), time.time() - 86400
    for number in range(20_000):
        path = Path(layout.blob(Digest.of(b"%d" % number)))
        path.parent.mkdir(parents=True)
        path.write_bytes(b"%d" % number)
        os.utime(path, (old, old))
    daemon.start()
    administrator = Visitor(daemon)
    administrator.sign_in_by_link()
    response = administrator.post("/actions/gc", {"token": administrator.form_token()})
    assert response.headers["location"] == "/doctor?done=collecting"
    shown = []
    while not daemon.audit_entries("gc"):
        for path in ("/doctor", "/", "/images", "/registries"):
            response = administrator.get(path)
            assert response.status == 200, (path, response.body)
            shown.append(b"<strong>gc</strong>" in response.body)
    assert any(shown)
    assert b"No operation is running." in administrator.get("/doctor").body
    assert not Path(layout.blob(Digest.of(b"7"))).exists()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_page_during_reloads(start_daemon: StartDaemon, workers: str) -> None:
    """Pages, sessions and live views go on."""
    daemon = start_daemon(WORKERS=workers)
    administrator, has_ended, statuses = Visitor(daemon), threading.Event(), set()
    administrator.sign_in_by_link()
    rounds = 0

    def look() -> None:
        nonlocal rounds
        while not has_ended.is_set():
            for path in ("/", "/doctor", "/images", "/registries"):
                response = administrator.get(path)
                statuses.add((response.status, b"Sign out" in response.body))
            rounds += 1

    with live_view(daemon) as view:
        wait_until(lambda: view.events, "the first event")
        thread = threading.Thread(target=look)
        thread.start()
        try:
            for _ in range(5):
                offset = daemon.log_offset()
                daemon.send_signal(signal.SIGHUP)
                wait_until(lambda offset=offset: "reloaded: " in daemon.output_text[offset:], "the reload")
            before = rounds
            wait_until(lambda: rounds > before + 1, "all pages were shown after the last reload")
        finally:
            has_ended.set()
            thread.join()
        assert not view.has_ended
    assert statuses == {(200, True)}


def test_page_off_is_as_before(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(PAGE="off")
    visitor = Visitor(daemon)
    assert visitor.get("/").headers["content-type"].startswith("text/plain")
    for path in ("/images", "/doctor", "/login", "/assets/page.css", "/api/v1/overview"):
        assert visitor.get(path).status == 404, path
    assert visitor.post("/login", {}).status == 404


PARAMETERS = {
    "/": ("range", "done"),
    "/images": ("q", "sort", "order", "page", "where", "done", "per_page"),
    "/images/fake.test/page/odd": ("tag", "platform", "page", "where", "confirm", "done"),
    "/registries": ("range",),
    "/registries/fake.test": ("range",),
    "/clients": ("engine",),
    "/doctor": ("done",),
    "/login": ("next", "link"),
    "/api/v1/overview": ("range",),
    "/api/v1/registries": ("range",),
    "/api/v1/registry": ("name", "range"),
    "/api/v1/traffic": ("range", "registry"),
    "/api/v1/transfers": ("x",),
    "/api/v1/budget": ("x",),
    "/api/v1/status": ("x",),
    "/api/v1/images": ("q", "sort", "order", "page", "per_page", "where"),
    "/api/v1/image": ("name", "where", "page"),
    "/api/v1/manifest": ("name", "digest", "where"),
}
"""Each page and each resource of the API, and their parameters."""

MARKUP = "%3Cscript%3Ealert(1)%3C/script%3E%22%27"
ODD = (
    "",
    "+",
    "x" * 1000,
    "x" * 10_000,
    "%C3%A9" * 300,
    "%00",
    "a%00b",
    "%FF",
    "%C3%28",
    "%ED%A0%80",
    "%",
    "%zz",
    "%u0041",
    MARKUP,
    "-1",
    "0",
    "1e9",
    "1.5",
    "NaN",
    "9" * 30,
    "%D9%A1",
    "..%2F..%2Fetc%2Fpasswd",
    "%E2%80%AE",
    "%0D%0ASet-Cookie:x",
    "javascript:alert(1)",
    "//elsewhere.example",
    "*",
    "%5B%5D",
    "sha256:" + "0" * 64,
    "%F0%9F%90%8B",
    "a=b",
    "null",
)
ODD_PATHS = (
    "/images/%00",
    "/images/%FF",
    "/images/%zz",
    "/images/" + "a/" * 300,
    "/images/" + "x" * 5000,
    "/images/..%2F..",
    "/images//",
    f"/images/{MARKUP}",
    "/images/%E2%80%AE",
    "/registries/%2E%2E",
    "/registries/" + "x" * 5000,
    f"/registries/{MARKUP}",
    "/registries/%FF",
    "/api/v1/",
    "/api/v1/images/more",
    "/api/v1/%00",
    "/api/v1/..%2Fstatus",
    f"/api/v1/{MARKUP}",
    "/assets/",
    "/assets/..%2Fpage.py",
    "/assets/%FF",
    "/login/",
    "/doctor/x",
    "/clients/%00",
)


def test_odd_parameters_are_a_result_or_a_400(upstreams: Upstreams, start_daemon: StartDaemon, tmp_path: Path) -> None:
    """Every parameter of every page and resource, sent by a visitor or by an administrator."""
    daemon = start_daemon()
    image = images.build_small_image("odd", size=1000)
    upstreams.fake.put("page/odd", "1", image)
    pull(daemon, "page/odd", image)
    wait_until(lambda: ask_control_socket(daemon, "images")["count"] == 1, "the repository is listed", timeout=60)
    administrator = Visitor(daemon)
    administrator.sign_in_by_link()
    queries = [f"{path}?{name}={value}" for path, names in PARAMETERS.items() for name in names for value in ODD]
    queries += [f"{path}?{name}=1&{name}=2" for path, names in PARAMETERS.items() for name in names]
    queries += [f"{path}?{MARKUP}={MARKUP}&&=&x" for path in PARAMETERS]
    connection = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=30)
    statuses: dict[int, int] = {}
    try:
        for number, path in enumerate((*queries, *ODD_PATHS)):
            is_api, cookie = path.startswith("/api/"), (administrator.cookie if number % 2 else "")
            connection.request("GET", path, headers={"Accept": "text/html", "Cookie": cookie})
            response = read_response(connection.getresponse())
            # A name of nothing is a 404.
            is_name = "?" not in path or re.match(r"/api/v1/(?:registry|traffic|image|manifest)\?", path)
            allowed = (200, 400, 404) if is_name else (200, 400)
            assert response.status in allowed, (path, response.status, response.body[:500])
            assert is_api or b"<script>alert" not in response.body, path
            assert response.headers.get("set-cookie") != "x", path
            assert response.headers["content-type"].startswith("application/json" if is_api else "text/"), path
            if is_api:
                json.loads(response.body)
            statuses[response.status] = statuses.get(response.status, 0) + 1
    finally:
        connection.close()
    assert statuses[200] > 300 and statuses[400] > 300, statuses
    assert "Traceback" not in daemon.output_text


@pytest.mark.parametrize("path", ["/images?q=" + "%C3%A9" * 30, "/images?page=0", "/images?sort=password"])
def test_a_page_that_is_refused_is_still_a_page(start_daemon: StartDaemon, path: str) -> None:
    response = Visitor(start_daemon()).get(path)
    assert response.status == (200 if "q=" in path else 400)
    assert response.body.startswith(b"<!doctype html>")
