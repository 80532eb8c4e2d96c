"""git over HTTPS at a host that is a registry too, such as that of Gitea, Codeberg or GitLab."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import images
from tests.e2e.harness.client_factory import ClientFactory
from tests.e2e.harness.daemon import StartDaemon, TwistdDaemon
from tests.e2e.harness.fake_registry import FakeRegistry
from tests.e2e.harness.http_client import basic_authorization
from tests.e2e.harness.http_server import HTTPExchange
from tests.e2e.harness.process import require_programs
from tests.e2e.harness.upstreams import Upstreams, format_upstream_addresses

USER, PASSWORD = "carol", "her-token"
BIG = 3 << 20  # bytes; git sends more than 1 MiB (http.postBuffer) in chunks


class CodeHost(FakeRegistry):
    """A registry at `/v2/`, and git repositories below `/git/`, which only USER may push to."""

    root: Path

    def handle(self, exchange: HTTPExchange) -> None:
        if not exchange.path.startswith("/git/"):
            super().handle(exchange)
            return
        body = b"".join(exchange.read_body())
        headers = exchange.request.headers
        is_write = "git-receive-pack" in exchange.request.path
        if is_write and headers.get("authorization") != basic_authorization(USER, PASSWORD):
            exchange.respond(401, {"WWW-Authenticate": 'Basic realm="git"'}, b"log in")
            return
        backend = subprocess.run(
            ["git", "http-backend"],
            input=body,
            capture_output=True,
            check=True,
            env={
                "PATH": os.environ["PATH"],
                "GIT_PROJECT_ROOT": str(self.root),
                "GIT_HTTP_EXPORT_ALL": "1",
                "GIT_CONFIG_COUNT": "1",
                "GIT_CONFIG_KEY_0": "safe.directory",
                "GIT_CONFIG_VALUE_0": "*",
                "GIT_PROTOCOL": headers.get("git-protocol", ""),
                "REMOTE_USER": USER if is_write else "",
                "REQUEST_METHOD": exchange.method,
                "PATH_INFO": exchange.path.removeprefix("/git"),
                "QUERY_STRING": exchange.query,
                "CONTENT_TYPE": headers.get("content-type", ""),
                "CONTENT_LENGTH": str(len(body)),
                "HTTP_CONTENT_ENCODING": headers.get("content-encoding", ""),
            },
        )
        head, _, content = backend.stdout.partition(b"\r\n\r\n")
        fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n"))
        exchange.respond(int(fields.pop("Status", "200").split()[0]), fields, content)


@pytest.fixture
def code_host(upstreams: Upstreams, tmp_path: Path) -> Iterator[CodeHost]:
    require_programs("git")
    host = CodeHost(upstreams.ca.leaf("code.test").server_context())
    host.root = tmp_path / "repositories"
    git("init", "--bare", "--initial-branch=main", str(host.root / "app.git"))
    host.start()
    yield host
    host.stop()


@pytest.fixture
def daemon(start_daemon: StartDaemon, code_host: CodeHost) -> TwistdDaemon:
    addresses = format_upstream_addresses({"code.test:443": code_host.port})
    return start_daemon(REGISTRIES="code.test", UPSTREAM_ADDRESSES=addresses)


def git(*arguments: str, daemon: TwistdDaemon | None = None, expected: int = 0, **settings: str) -> str:
    """Run git without anybody's configuration, through the daemon if it is given. Return what it printed."""
    options = {"user.name": "Carol", "user.email": "carol@code.test", **settings}
    if daemon is not None:
        options |= {"http.proxy": daemon.url, "http.sslCAInfo": str(daemon.ca_file)}
    command = ["git", *(part for name, value in options.items() for part in ("-c", f"{name}={value}")), *arguments]
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "GIT_TERMINAL_PROMPT": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == expected, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def commit(folder: Path, data: bytes, message: str) -> None:
    (folder / "data").write_bytes(data)
    git("-C", str(folder), "add", "data")
    git("-C", str(folder), "commit", "--message", message)


@pytest.mark.parametrize("protocol", ["0", "2"])
@pytest.mark.parametrize("continues", ["true", "false"])
def test_clone_and_push(
    code_host: CodeHost, daemon: TwistdDaemon, clients: ClientFactory, tmp_path: Path, protocol: str, continues: str
) -> None:
    """Large and small bodies, in chunks and of known length, with 100-continue, by the client's own login only."""
    options = {"protocol.version": protocol, "http.expectContinue": continues}
    url, login = "https://code.test/git/app.git", f"https://{USER}:{PASSWORD}@code.test/git/app.git"
    first, second = tmp_path / "first", tmp_path / "second"
    git("clone", url, str(first), daemon=daemon, **options)
    commit(first, images.random_bytes(BIG, "git"), "a large file")
    git("-C", str(first), "push", url, "HEAD:main", daemon=daemon, expected=128, **options)
    git("-C", str(first), "push", login, "HEAD:main", daemon=daemon, **options)
    git("clone", "--branch=main", url, str(second), daemon=daemon, **options)
    assert (second / "data").read_bytes() == images.random_bytes(BIG, "git")
    commit(second, b"small", "a small file")
    git("-C", str(second), "push", login, "HEAD:main", daemon=daemon, **options)
    git("-C", str(first), "pull", url, "main", daemon=daemon, **options)
    assert (first / "data").read_bytes() == b"small"
    assert any("chunked" in request.headers.get("transfer-encoding", "") for request in code_host.requests)
    # The registry of the same host is intercepted.
    code_host.put("team/app", "1", images.build_small_image("beside git"))
    skopeo = clients.skopeo(daemon)
    skopeo.pull("code.test/team/app:1")
    code_host.stop()
    try:
        skopeo.pull("code.test/team/app:1")
    finally:
        code_host.start()
