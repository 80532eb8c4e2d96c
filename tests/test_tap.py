"""The daemon as an operator meets it: a process of twistd's, its environment, its log and its exit status."""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

import dockerproxy

ROOT = Path(dockerproxy.__file__).parent.parent
SECONDS = 60  # for what a machine under load does in one
NOBODY = 65534


def environment(folder: Path, settings: Mapping[str, str]) -> dict[str, str]:
    """Return what the daemon finds in its environment: nothing of ours but where programs are."""
    found = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    if not _is_installed():
        found["PYTHONPATH"] = str(ROOT)
    return {
        **found,
        "HOME": str(folder),
        "STATE_DIR": str(folder / "state"),
        "PROXY_LISTEN": "tcp:0:interface=127.0.0.1",
        "REGISTRY_LISTEN": "tcp:0:interface=127.0.0.1",
        **settings,
    }


def _is_installed() -> bool:
    """Whether this Python finds the project wherever it is started, as in `make test`'s environment."""
    found = subprocess.run(
        [sys.executable, "-c", "import dockerproxy, twisted.plugins.dockerproxy_plugin"],
        cwd="/",
        env={"PATH": os.environ.get("PATH", "")},
        capture_output=True,
        check=False,
    )
    return found.returncode == 0


def twistd() -> list[str]:
    beside = Path(sys.executable).with_name("twistd")
    return [str(beside if beside.exists() else shutil.which("twistd3") or "twistd"), "--nodaemon", "--pidfile="]


class Daemon:
    """The daemon, running."""

    def __init__(self, folder: Path, settings: Mapping[str, str], *options: str, before: Sequence[str] = ()) -> None:
        self.folder = folder
        self.output = folder / "output"
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [*before, *twistd(), "dockerproxy", *options],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment(folder, settings),
                cwd=folder,
            )

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Return the first match of `pattern` in the log; fail with the log where it does not come."""
        end = time.monotonic() + SECONDS
        while (found := re.search(pattern, self.text)) is None:
            assert self.process.poll() is None, self.text
            assert time.monotonic() < end, f"{pattern}:\n{self.text}"
            time.sleep(0.02)  # what another process does is nothing that this one is told of
        return found

    def port(self, setting: str = "PROXY_LISTEN") -> int:
        return int(self.wait_for(rf"listening on 127\.0\.0\.1:(\d+) \({setting}\)")[1])

    def ends(self) -> int:
        """Return the exit status."""
        return self.process.wait(SECONDS)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(SECONDS)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Return a folder that every user can get to; those of pytest are the user's alone."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def start(tmp_path: Path, open_folder: Path) -> Iterator[Any]:
    """Return a function that starts a daemon, in `tmp_path` if it is given no other folder."""
    daemons: list[Daemon] = []

    def run(*options: str, folder: Path = tmp_path, before: Sequence[str] = (), **settings: str) -> Daemon:
        daemon = Daemon(folder, settings, *options, before=before)
        daemons.append(daemon)
        return daemon

    yield run
    for daemon in daemons:
        daemon.stop()
        assert "Traceback" not in daemon.text, daemon.text
        assert "Unhandled" not in daemon.text, daemon.text


def fails(start: Any, *options: str, **settings: Any) -> str:
    """Return the one sentence with which the daemon does not start."""
    daemon = start(*options, **settings)
    assert daemon.ends() not in (0, None), daemon.text
    # Once the log has begun, twistd puts everything into it that is printed.
    logged = re.compile(r"\d{4}-\d\d-\d\dT\S+ \[(?P<source>[^]]+)\] ")
    lines = [(logged.match(line), logged.sub("", line, count=1)) for line in daemon.text.splitlines()]
    sentences = [line for found, line in lines if found is None or found["source"] == "stderr#error"]
    assert len(sentences) == 1, daemon.text
    assert re.fullmatch(r"docker-registry-proxy: \S.*[^.]\.", sentences[0]), daemon.text
    return sentences[0]


def ask(port: int, request: bytes) -> bytes:
    """Return all that is answered, until the daemon closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as connection:
        connection.sendall(request)
        return read_all(connection)


def read_all(connection: socket.socket) -> bytes:
    parts = []
    while data := connection.recv(65536):
        parts.append(data)
    return b"".join(parts)


GET = b"GET %b HTTP/1.1\r\nHost: proxy.example\r\nConnection: close\r\n\r\n"


# what keeps it from starting


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("CACHE_MAX_SIZE", "plenty", "'plenty' is not a size"),
        ("REGISTRIES", "http//x", "not a registry"),
        ("PROXY_LISTEN", "3128", "not an endpoint"),
        ("ALLOW_CLIENTS", "10.0.0.0/33", "10.0.0.0/33"),
        ("AUTH_REGISTRIES", "quay.io:only-secret", "AUTH_REGISTRIES"),
        ("CA_CRT_FILE", "/nonexistent/ca.crt", "CA_KEY_FILE"),
        ("LOG_FORMAT", "xml", "text, json"),
    ],
)
def test_a_setting_that_cannot_be_used(start: Any, name: str, value: str, expected: str) -> None:
    sentence = fails(start, **{name: value})
    assert name in sentence
    assert expected in sentence
    assert "secret" not in sentence


@pytest.mark.parametrize("name", ["PROXY_LISTEN", "REGISTRY_LISTEN", "REGISTRY_HTTP_LISTEN"])
def test_a_port_that_is_taken(start: Any, name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        description = f"tcp:{taken.getsockname()[1]}:interface=127.0.0.1"
        sentence = fails(start, **{name: description})
    assert sentence == (f"docker-registry-proxy: {name}: {description} cannot be listened on: Address already in use.")


def test_an_endpoint_that_is_none(start: Any) -> None:
    assert "PROXY_LISTEN: foo:3128 cannot be listened on" in fails(start, PROXY_LISTEN="foo:3128")


def as_nobody(folder: Path) -> list[str]:
    """Return what runs the daemon as a user whom permissions stop; nothing where this one is stopped already."""
    if os.geteuid() != 0:
        return []
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        pytest.skip("permissions do not stop root, and there is no setpriv (Debian package util-linux)")
    before = [setpriv, f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    found = subprocess.run(
        [*before, sys.executable, "-c", "import dockerproxy.tap"],
        cwd=folder,
        env=environment(folder, {}),
        capture_output=True,
        check=False,
    )
    if found.returncode != 0:
        pytest.skip("the project, its Python or the folder for temporary files cannot be read by other users than root")
    return before


@pytest.mark.parametrize("name", ["STATE_DIR", "CACHE_DIR", "REGISTRY_DIR", "CA_DIR"])
@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_that_cannot_be_written(start: Any, open_folder: Path, name: str, exists: bool) -> None:
    before = as_nobody(open_folder)
    state, closed = open_folder / "state", open_folder / "closed"
    state.mkdir()
    closed.mkdir()
    if before:
        os.chown(state, NOBODY, NOBODY)
    closed.chmod(0o555)
    place = closed if exists else closed / "below"
    sentence = fails(start, folder=open_folder, before=before, **{name: str(place)})
    assert str(place) in sentence
    assert "Permission denied" in sentence


@pytest.mark.parametrize("name", ["STATE_DIR", "CACHE_DIR", "REGISTRY_DIR", "CA_DIR"])
def test_a_file_in_a_folders_place(start: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        assert str(tmp_path / "file") in fails(start, **{name: str(place)})


def test_a_key_that_is_another_certificates(start: Any, tmp_path: Path) -> None:
    (certificate, _), (_, key) = make_ca(tmp_path, "one"), make_ca(tmp_path, "other")
    sentence = fails(start, CA_CRT_FILE=str(certificate), CA_KEY_FILE=str(key))
    assert str(key) in sentence or str(certificate) in sentence


def make_ca(folder: Path, name: str) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    files = folder / f"{name}.crt", folder / f"{name}.key"
    files[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return files


@pytest.mark.parametrize("content", [None, b"", b"no certificate\n", bytes(range(256))])
def test_a_file_of_cas_that_is_none(start: Any, tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "upstream-ca.pem"
    if content is not None:
        file.write_bytes(content)
    sentence = fails(start, UPSTREAM_CA_FILE=str(file))
    assert sentence.count("UPSTREAM_CA_FILE") == 1
    assert str(file) in sentence


def test_an_env_file_that_is_not_there(start: Any, tmp_path: Path) -> None:
    sentence = fails(start, "--env-file", str(tmp_path / "missing.env"))
    assert sentence == f"docker-registry-proxy: {tmp_path / 'missing.env'} cannot be read: No such file or directory."


def test_an_env_file_with_a_line_that_is_none(start: Any, tmp_path: Path) -> None:
    (tmp_path / "x.env").write_text("ALLOW_PUSH=true\npassword-secret\n")
    sentence = fails(start, "--env-file", str(tmp_path / "x.env"))
    assert "line 2" in sentence
    assert "secret" not in sentence


def test_a_user_file_that_is_not_there(start: Any, tmp_path: Path) -> None:
    assert str(tmp_path / "users") in fails(start, HTPASSWD_FILE=str(tmp_path / "users"))


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_what_keeps_it_from_starting_is_said_in_json_mode_too(start: Any, log_format: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        description = f"tcp:{taken.getsockname()[1]}:interface=127.0.0.1"
        daemon = start(PROXY_LISTEN=description, LOG_FORMAT=log_format)
        assert daemon.ends() not in (0, None)
    assert daemon.text.count("Address already in use") == 1
    assert "Traceback" not in daemon.text


# what it says while it runs


def test_it_says_what_it_does(start: Any, tmp_path: Path) -> None:
    (tmp_path / "x.env").write_text("REGISTRIES=quay.io http://plain.example:5000\nCACHE_MAX_SIZE=5m\nREGISTRYS=x\n")
    daemon = start("--env-file", str(tmp_path / "x.env"))
    daemon.port("PROXY_LISTEN")
    daemon.port("REGISTRY_LISTEN")
    text = daemon.text
    for told in (
        "intercepting registry-1.docker.io, quay.io, plain.example:5000, auth.docker.io",
        f"cache in {tmp_path}/state/cache (up to 5242880 bytes)",
        f"registry in {tmp_path}/state/registry",
        f"CA in {tmp_path}/state/ca",
        "REGISTRYS is not a setting",
    ):
        assert text.count(told) == 1, told
    assert "REGISTRY_HTTP_LISTEN" not in text


def test_the_environment_wins_over_the_file(start: Any, tmp_path: Path) -> None:
    (tmp_path / "x.env").write_text("CACHE_MAX_SIZE=5m\n")
    daemon = start("--env-file", str(tmp_path / "x.env"), CACHE_MAX_SIZE="6m")
    daemon.wait_for(r"up to 6291456 bytes")


def test_it_answers_and_logs(start: Any, tmp_path: Path) -> None:
    daemon = start()
    port = daemon.port()
    assert ask(port, GET % b"/healthz?key=secret").endswith(b"ok\n")
    pem = ask(port, GET % b"/ca.crt").partition(b"\r\n\r\n")[2]
    refusal = ask(port, b"CONNECT user:secret@quay.io:443 HTTP/1.1\r\nHost: x\r\n\r\n")
    assert refusal.startswith(b"HTTP/1.1 400 ")
    plain = refusal.partition(b"\r\n\r\n")[2]
    daemon.wait_for(r"\[dockerproxy\.access#info\] 127\.0\.0\.1 GET proxy\.example/healthz 200 3 0\.\d{3} -\n")
    daemon.wait_for(r"CONNECT \S* ?400 ")
    assert "secret" not in daemon.text
    daemon.wait_for(r"GET proxy\.example/ca\.crt 200 ")
    metrics = ask(port, GET % b"/metrics").decode()
    assert 'dockerproxy_requests_total{verdict="-",code="2xx"} 2\n' in metrics
    assert 'dockerproxy_requests_total{verdict="-",code="4xx"} 1\n' in metrics
    sent = len(b"ok\n") + len(pem) + len(plain)
    assert f'dockerproxy_sent_bytes_total{{verdict="-"}} {sent}\n' in metrics
    # the registry that is hosted here, under a certificate of the CA that it hands out
    context = ssl.create_default_context(cadata=pem.decode())
    with (
        socket.create_connection(("127.0.0.1", daemon.port("REGISTRY_LISTEN")), timeout=SECONDS) as connection,
        context.wrap_socket(connection, server_hostname="docker-registry.local") as secure,
    ):
        secure.sendall(GET % b"/v2/")
        assert read_all(secure).startswith(b"HTTP/1.1 200 OK")
    for file in (tmp_path / "state" / "ca").iterdir():
        private = b"PRIVATE" in file.read_bytes()
        assert not private or file.stat().st_mode & 0o077 == 0


def test_a_log_of_json_is_nothing_else(start: Any) -> None:
    daemon = start(LOG_FORMAT="json")
    ask(int(daemon.wait_for(r"listening on 127\.0\.0\.1:(\d+) \(PROXY_LISTEN\)")[1]), GET % b"/healthz")
    daemon.wait_for(r"/healthz")
    daemon.process.terminate()
    daemon.ends()
    lines = [json.loads(line) for line in daemon.text.splitlines()]
    assert all(line["message"] and line["level"] and line["time"] for line in lines)
    [access] = [line for line in lines if line["namespace"] == "dockerproxy.access"]
    assert (access["method"], access["path"], access["status"], access["size"]) == ("GET", "/healthz", 200, 3)
    messages = " ".join(line["message"] for line in lines)
    for told in ("intercepting registry-1.docker.io", "cache in ", "Received SIGTERM"):
        assert told in messages


# how it stops


class Far:
    """A server behind a tunnel: a transfer that ends when the test wants it to."""

    def __init__(self) -> None:
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        self.settings = {"TUNNEL_DENY": "none", "TUNNEL_PORTS": str(self.port)}

    def tunnel(self, port: int) -> tuple[socket.socket, socket.socket]:
        """Return both ends of a new tunnel through the daemon at `port`."""
        near = socket.create_connection(("127.0.0.1", port), timeout=SECONDS)
        near.sendall(f"CONNECT 127.0.0.1:{self.port} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert near.recv(1000).startswith(b"HTTP/1.1 200 ")
        return near, self.server.accept()[0]


@pytest.fixture
def far() -> Iterator[Far]:
    far = Far()
    yield far
    far.server.close()


def test_asked_to_stop_it_closes_what_is_idle_and_ends(start: Any) -> None:
    daemon = start()
    with socket.create_connection(("127.0.0.1", daemon.port()), timeout=SECONDS) as idle:
        idle.sendall((GET % b"/healthz").replace(b"Connection: close\r\n", b""))
        assert idle.recv(65536)
        daemon.process.terminate()
        assert idle.recv(65536) == b""
    assert daemon.ends() in (0, -signal.SIGTERM)


@pytest.mark.parametrize("workers", [1, 2])
def test_asked_to_stop_it_lets_transfers_finish(start: Any, far: Far, workers: int) -> None:
    """The last one is logged as well, be it that of a worker, which ends with it."""
    daemon = start(**far.settings, WORKERS=str(workers))
    port = daemon.port()
    if workers > 1:
        daemon.wait_for("worker 1 serves")  # then it gets the second connection
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as idle:
        near, other = far.tunnel(port)  # by then, the daemon has taken the one before it too
        with near, other:
            other.sendall(b"one half, ")
            daemon.process.terminate()
            assert idle.recv(1) == b""
            with pytest.raises(OSError):  # refused, or reset
                ask(port, GET % b"/healthz")
            assert daemon.process.poll() is None
            other.sendall(b"and the other")
            other.close()
            assert read_all(near) == b"one half, and the other"
    assert daemon.ends() in (0, -signal.SIGTERM)
    assert re.search(rf"CONNECT 127\.0\.0\.1:{far.port} 200 23 [\d.]+ PASS\n", daemon.text)


@pytest.mark.parametrize("again", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_twice_it_waits_no_longer(start: Any, far: Far, again: signal.Signals) -> None:
    daemon = start(**far.settings)
    port = daemon.port()
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as idle:
        near, other = far.tunnel(port)
        with near, other:
            daemon.process.terminate()
            assert idle.recv(1) == b""
            daemon.process.send_signal(again)
            with pytest.raises(ConnectionResetError):
                near.recv(1)
    assert daemon.ends() in (0, -signal.SIGTERM)
    assert "asked to stop once more" in daemon.text


def test_an_option_that_it_does_not_know(start: Any) -> None:
    daemon = start("--no-such-option")
    daemon.ends()  # with a status that changed with Twisted's versions
    assert "no-such-option" in daemon.text
    assert "listening" not in daemon.text
