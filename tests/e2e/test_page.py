"""The page of a real daemon: its documents, private names, sessions and actions in every process."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from tests.e2e.harness import images
from tests.e2e.harness.daemon import StartDaemon, TwistdDaemon
from tests.e2e.harness.http_client import BufferedResponse, read_response
from tests.e2e.harness.process import wait_until
from tests.e2e.harness.registry_daemon import USERS, write_htpasswd
from tests.e2e.harness.upstreams import Upstreams
from tests.e2e.test_overview import ask_control_socket, live_view, pull, pull_as_alice

PAGES = ("/", "/?range=1h", "/images", "/registries", "/registries/docker.io", "/registries/fake.test", "/clients",
         "/doctor", "/login")  # fmt: skip


class Visitor:
    """A browser with a cookie. Each request is a connection of its own, which any process may get."""

    def __init__(self, daemon: TwistdDaemon) -> None:
        self._port = daemon.port
        self.cookie = ""

    def get(self, path: str) -> BufferedResponse:
        return self._request("GET", path)

    def post(self, path: str, form: dict[str, str], origin: str | None = None) -> BufferedResponse:
        fields = {"Content-Type": "application/x-www-form-urlencoded"}
        fields["Origin"] = f"http://127.0.0.1:{self._port}" if origin is None else origin
        response = self._request("POST", path, urlencode(form), fields)
        self.cookie = response.headers.get("set-cookie", self.cookie).partition(";")[0]
        return response

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


def audited(daemon: TwistdDaemon, action: str) -> list[dict[str, Any]]:
    file = daemon.state_folder / "audit.jsonl"
    lines = file.read_text().splitlines()[1:] if file.is_file() else []
    return [entry for entry in map(json.loads, lines) if entry["action"] == action]


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
    assert len(audited(daemon, "sign-in")) == 2
    of_public = f"/images/{names[1]}"
    if workers == "2":  # pulls are gathered for a minute
        wait_until(lambda: b">MISS<" in administrator.get(of_public).body, "the history of pulls", timeout=90)
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
    assert audited(daemon, "remove") == []
    codes = [administrator.post("/actions/remove", form).headers["location"] for _ in range(2)]
    assert [code.partition("done=")[2] for code in codes] == ["removed", "gone"]
    wait_until(lambda: bool(audited(daemon, "remove")), "the removal is in the audit log")
    (entry,) = audited(daemon, "remove")
    assert (entry["user"], entry["from"]) == ("alice", "127.0.0.1")
    for _ in range(2):
        assert (
            administrator.post("/actions/gc", {"token": form["token"]}).headers["location"] == "/doctor?done=collecting"
        )
    wait_until(lambda: bool(audited(daemon, "gc")), "garbage was collected", timeout=60)
    assert {entry["user"] for entry in audited(daemon, "gc")} == {"alice"}
    pin = {"token": form["token"], "name": f"{names[1]}:1", "where": "cached"}
    for action, done in (("pin", "pinned"), ("unpin", "unpinned"), ("unpin", "unpinned"), ("refresh", "asked")):
        response = administrator.post(f"/actions/{action}", pin)
        assert response.status == 303, response.body
        assert response.headers["location"].endswith(f"done={done}")
    # The log is written in the background, in the order of the actions, and `refresh` was the last one.
    wait_until(lambda: bool(audited(daemon, "refresh")), "the last action is in the audit log")
    for action, times in (("pin", 2), ("unpin", 2), ("refresh", 1)):
        assert [entry["user"] for entry in audited(daemon, action)] == ["alice"] * times, action

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
    socket = str(daemon.state_folder / "run" / "control.sock")
    command = [sys.executable, "-m", "dockerproxy.cli", "page", "--json", "--socket", socket]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    path = json.loads(printed)["path"]
    token = path.partition("link=")[2]
    visitor, late = Visitor(daemon), Visitor(daemon)
    assert b"Sign in as administrator" in visitor.get(path).body
    assert visitor.post("/login", {"link": token}, origin="http://evil.example").status == 403
    assert visitor.post("/login", {"link": token}).status == 303
    assert late.post("/login", {"link": token}).status == 403
    assert b"Collect garbage" in visitor.get("/doctor").body
    assert visitor.post("/logout", {"token": visitor.form_token()}).status == 303
    assert b"Collect garbage" not in visitor.get("/doctor").body
    assert token not in daemon.output_text
    assert [entry["result"] for entry in audited(daemon, "sign-in")] == ["accepted", "refused"]


def test_page_off_is_as_before(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(PAGE="off")
    visitor = Visitor(daemon)
    assert visitor.get("/").headers["content-type"].startswith("text/plain")
    for path in ("/images", "/doctor", "/login", "/assets/page.css", "/api/v1/overview"):
        assert visitor.get(path).status == 404, path
    assert visitor.post("/login", {}).status == 404
