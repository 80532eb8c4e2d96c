"""The daemon as a twistd process: its environment, its log, its exit status and its signals."""

from __future__ import annotations

import datetime
import json
import os
import re
import select
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

import dockerproxy
from dockerproxy.daemon.listener_service import SHUTDOWN_GRACE
from tests.support.startup_modules import UNWANTED, is_within
from tests.twistd import twistd_command

pytestmark = pytest.mark.slow  # each test starts a daemon

ROOT = Path(dockerproxy.__file__).parent.parent
TIMEOUT = 60  # seconds; an operation takes well below a second, but the machine may be loaded
NOBODY = 65534


def environment(directory: Path, settings: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the daemon. It has only PATH and LANG of this process, and the package of the tests."""
    variables = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    return {
        **variables,
        "PYTHONPATH": str(ROOT),
        "HOME": str(directory),
        "STATE_DIR": str(directory / "state"),
        "PROXY_LISTEN": "tcp:0:interface=127.0.0.1",
        "REGISTRY_LISTEN": "tcp:0:interface=127.0.0.1",
        **settings,
    }


class TwistdProcess:
    """A running daemon."""

    def __init__(
        self, directory: Path, settings: Mapping[str, str], *options: str, wrapper: Sequence[str] = ()
    ) -> None:
        self.directory = directory
        self.log_path = directory / "output"
        with self.log_path.open("wb") as output:
            self.process = subprocess.Popen(
                [*wrapper, *twistd_command(), "dockerproxy", *options],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment(directory, settings),
                cwd=directory,
            )

    @property
    def log_text(self) -> str:
        return self.log_path.read_text(errors="replace")

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Wait for `pattern` in the log and return its first match. Fail with the text of the log after TIMEOUT."""
        deadline = time.monotonic() + TIMEOUT
        while (match := re.search(pattern, self.log_text)) is None:
            assert self.process.poll() is None, self.log_text
            assert time.monotonic() < deadline, f"{pattern}:\n{self.log_text}"
            time.sleep(0.02)  # poll, because another process sends no notification
        return match

    def port(self, setting: str = "PROXY_LISTEN") -> int:
        return int(self.wait_for(rf"listening on 127\.0\.0\.1:(\d+) \({setting}\)")[1])

    def wait_exit(self) -> int:
        """Wait until the daemon exits, and return its exit status."""
        return self.process.wait(TIMEOUT)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(TIMEOUT)


@pytest.fixture
def world_readable_directory() -> Iterator[Path]:
    """Create a directory that every user can read. The directories of pytest are private to its user."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def start(tmp_path: Path, world_readable_directory: Path) -> Iterator[Any]:
    """Return a function that starts a daemon. Its default directory is `tmp_path`."""
    daemons: list[TwistdProcess] = []

    def start_daemon(
        *options: str, directory: Path = tmp_path, wrapper: Sequence[str] = (), **settings: str
    ) -> TwistdProcess:
        daemon = TwistdProcess(directory, settings, *options, wrapper=wrapper)
        daemons.append(daemon)
        return daemon

    yield start_daemon
    for daemon in daemons:
        daemon.kill()
        assert "Traceback" not in daemon.log_text, daemon.log_text
        assert "Unhandled" not in daemon.log_text, daemon.log_text


def startup_error(start: Any, *options: str, **settings: Any) -> str:
    """Start the daemon, which must fail with exactly one sentence, and return that sentence."""
    daemon = start(*options, **settings)
    assert daemon.wait_exit() not in (0, None), daemon.log_text
    # twistd logs printed text once the log is open, so the sentence may have the prefix of a log line.
    log_prefix = re.compile(r"\d{4}-\d\d-\d\dT\S+ \[(?P<source>[^]]+)\] ")
    lines = [(log_prefix.match(line), log_prefix.sub("", line, count=1)) for line in daemon.log_text.splitlines()]
    messages = [line for prefix, line in lines if prefix is None or prefix["source"] == "stderr#error"]
    assert len(messages) == 1, daemon.log_text
    assert re.fullmatch(r"docker-registry-proxy: \S.*[^.]\.", messages[0]), daemon.log_text
    return messages[0]


def exchange(port: int, request: bytes) -> bytes:
    """Send `request` and return everything that the daemon sends before it closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT) as connection:
        connection.sendall(request)
        return read_all(connection)


def read_all(connection: socket.socket) -> bytes:
    parts = []
    while data := connection.recv(65536):
        parts.append(data)
    return b"".join(parts)


GET = b"GET %b HTTP/1.1\r\nHost: proxy.example\r\nConnection: close\r\n\r\n"


# startup errors


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
def test_invalid_setting(start: Any, name: str, value: str, expected: str) -> None:
    message = startup_error(start, **{name: value})
    assert name in message
    assert expected in message
    assert "secret" not in message


@pytest.mark.parametrize("name", ["PROXY_LISTEN", "REGISTRY_LISTEN", "REGISTRY_HTTP_LISTEN"])
def test_port_in_use(start: Any, name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        description = f"tcp:{server.getsockname()[1]}:interface=127.0.0.1"
        message = startup_error(start, **{name: description})
    assert message == (f"docker-registry-proxy: {name}: cannot listen on {description}: Address already in use.")


def test_unknown_endpoint_type(start: Any) -> None:
    assert "PROXY_LISTEN: cannot listen on foo:3128" in startup_error(start, PROXY_LISTEN="foo:3128")


def unprivileged_wrapper(directory: Path) -> list[str]:
    """Return the command that runs the daemon as an unprivileged user, or nothing if this user is not root."""
    if os.geteuid() != 0:
        return []
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        pytest.skip("running as root, which ignores permissions, and setpriv is missing (Debian package util-linux)")
    wrapper = [setpriv, f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    probe = subprocess.run(
        [*wrapper, sys.executable, "-c", "import dockerproxy.tap"],
        cwd=directory,
        env=environment(directory, {}),
        capture_output=True,
        check=False,
    )
    if probe.returncode != 0:
        pytest.skip("only root can read the project, its Python or the directory for temporary files")
    return wrapper


@pytest.mark.parametrize("name", ["STATE_DIR", "CACHE_DIR", "REGISTRY_DIR", "CA_DIR"])
@pytest.mark.parametrize("exists", [True, False])
def test_unwritable_directory(start: Any, world_readable_directory: Path, name: str, exists: bool) -> None:
    wrapper = unprivileged_wrapper(world_readable_directory)
    state, unwritable = world_readable_directory / "state", world_readable_directory / "closed"
    state.mkdir()
    unwritable.mkdir()
    if wrapper:
        os.chown(state, NOBODY, NOBODY)
    unwritable.chmod(0o555)
    path = unwritable if exists else unwritable / "below"
    message = startup_error(start, directory=world_readable_directory, wrapper=wrapper, **{name: str(path)})
    assert str(path) in message
    assert "Permission denied" in message


@pytest.mark.parametrize("name", ["STATE_DIR", "CACHE_DIR", "REGISTRY_DIR", "CA_DIR"])
def test_file_instead_of_directory(start: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        assert str(tmp_path / "file") in startup_error(start, **{name: str(path)})


def test_key_does_not_match_certificate(start: Any, tmp_path: Path) -> None:
    (certificate, _), (_, key) = make_ca(tmp_path, "one"), make_ca(tmp_path, "other")
    message = startup_error(start, CA_CRT_FILE=str(certificate), CA_KEY_FILE=str(key))
    assert str(key) in message or str(certificate) in message


def make_ca(directory: Path, name: str) -> tuple[Path, Path]:
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
    files = directory / f"{name}.crt", directory / f"{name}.key"
    files[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return files


@pytest.mark.parametrize("content", [None, b"", b"no certificate\n", bytes(range(256))])
def test_invalid_upstream_ca_file(start: Any, tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "upstream-ca.pem"
    if content is not None:
        file.write_bytes(content)
    message = startup_error(start, UPSTREAM_CA_FILE=str(file))
    assert message.count("UPSTREAM_CA_FILE") == 1
    assert str(file) in message


def test_missing_env_file(start: Any, tmp_path: Path) -> None:
    message = startup_error(start, "--env-file", str(tmp_path / "missing.env"))
    assert message == f"docker-registry-proxy: {tmp_path / 'missing.env'} cannot be read: No such file or directory."


def test_malformed_env_file_line(start: Any, tmp_path: Path) -> None:
    (tmp_path / "x.env").write_text("ALLOW_PUSH=true\npassword-secret\n")
    message = startup_error(start, "--env-file", str(tmp_path / "x.env"))
    assert "line 2" in message
    assert "secret" not in message


def test_missing_htpasswd_file(start: Any, tmp_path: Path) -> None:
    assert str(tmp_path / "users") in startup_error(start, HTPASSWD_FILE=str(tmp_path / "users"))


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_startup_error_in_both_log_formats(start: Any, log_format: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        description = f"tcp:{server.getsockname()[1]}:interface=127.0.0.1"
        daemon = start(PROXY_LISTEN=description, LOG_FORMAT=log_format)
        assert daemon.wait_exit() not in (0, None)
    assert daemon.log_text.count("Address already in use") == 1
    assert "Traceback" not in daemon.log_text


# log and metrics


def test_startup_log(start: Any, tmp_path: Path) -> None:
    (tmp_path / "x.env").write_text("REGISTRIES=quay.io http://plain.example:5000\nCACHE_MAX_SIZE=5m\nREGISTRYS=x\n")
    daemon = start("--env-file", str(tmp_path / "x.env"))
    daemon.port("PROXY_LISTEN")
    daemon.port("REGISTRY_LISTEN")
    daemon.wait_for(
        rf"docker-registry-proxy {dockerproxy.__version__} is ready: serving registry-1\.docker\.io, quay\.io"
    )
    text = daemon.log_text
    for expected in (
        "intercepting registry-1.docker.io, quay.io, plain.example:5000, auth.docker.io",
        f"cache in {tmp_path}/state/cache (up to 5.24 MB)",
        f"registry in {tmp_path}/state/registry",
        f"CA in {tmp_path}/state/ca",
        "REGISTRYS is not a setting",
    ):
        assert text.count(expected) == 1, expected
    assert "REGISTRY_HTTP_LISTEN" not in text and "starting on" not in text


def test_the_first_use_loads_what_most_daemons_never_need(start: Any) -> None:
    daemon = start(WORKERS="2", PYTHONVERBOSE="1")  # Python logs each module that it loads
    daemon.wait_for("worker 1 serves")
    assert exchange(daemon.port(), GET % b"/healthz").endswith(b"ok\n")

    # twistd loads twisted.trial, unless it has found all plugins before.
    unwanted = {name for name in UNWANTED if not is_within(name, {"twisted", "unittest"})}

    def loaded() -> set[str]:
        return {name for name in re.findall(r"\bimport '([\w.]+)'", daemon.log_text) if is_within(name, unwanted)}

    assert re.search(r"\bimport 'dockerproxy\.page\.door'", daemon.log_text)
    assert loaded() == set()
    page = b"GET /login HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/html\r\nConnection: close\r\n\r\n"
    assert exchange(daemon.port(), page).startswith(b"HTTP/1.1 200 ")
    assert {"dockerproxy.page.site", "dockerproxy.page.rendering", "jinja2"} <= loaded()
    assert "dockerproxy.admin.pulls" not in loaded()


def test_environment_overrides_env_file(start: Any, tmp_path: Path) -> None:
    (tmp_path / "x.env").write_text("CACHE_MAX_SIZE=5m\n")
    daemon = start("--env-file", str(tmp_path / "x.env"), CACHE_MAX_SIZE="6m")
    daemon.wait_for(r"up to 6\.29 MB")


def test_requests_are_served_and_logged(start: Any, tmp_path: Path) -> None:
    daemon = start()
    port = daemon.port()
    assert exchange(port, GET % b"/healthz?key=secret").endswith(b"ok\n")
    pem = exchange(port, GET % b"/ca.crt").partition(b"\r\n\r\n")[2]
    error_response = exchange(port, b"CONNECT user:secret@quay.io:443 HTTP/1.1\r\nHost: x\r\n\r\n")
    assert error_response.startswith(b"HTTP/1.1 400 ")
    plain = error_response.partition(b"\r\n\r\n")[2]
    daemon.wait_for(r"\[dockerproxy\.access#info\] 127\.0\.0\.1 GET proxy\.example/healthz 200 3 0\.\d{3} - - \"-\"\n")
    daemon.wait_for(r"CONNECT \S* ?400 ")
    assert "secret" not in daemon.log_text
    daemon.wait_for(r"GET proxy\.example/ca\.crt 200 ")
    metrics = exchange(port, (GET % b"/metrics").replace(b"proxy.example", b"localhost")).decode()
    assert 'dockerproxy_requests_total{kind="other",registry="own",verdict="-"} 3.0\n' in metrics
    assert 'dockerproxy_responses_total{code="2xx",registry="own"} 2.0\n' in metrics
    assert 'dockerproxy_responses_total{code="4xx",registry="own"} 1.0\n' in metrics
    sent = len(b"ok\n") + len(pem) + len(plain)
    assert f'dockerproxy_sent_bytes_total{{registry="own",verdict="-"}} {sent}.0\n' in metrics
    # The hosted registry has a certificate of the CA that /ca.crt returned.
    context = ssl.create_default_context(cadata=pem.decode())
    with (
        socket.create_connection(("127.0.0.1", daemon.port("REGISTRY_LISTEN")), timeout=TIMEOUT) as connection,
        context.wrap_socket(connection, server_hostname="docker-registry.local") as secure,
    ):
        secure.sendall(GET % b"/v2/")
        assert read_all(secure).startswith(b"HTTP/1.1 200 OK")
    for file in (tmp_path / "state" / "ca").iterdir():
        private = b"PRIVATE" in file.read_bytes()
        assert not private or file.stat().st_mode & 0o077 == 0


def test_json_log_contains_only_json(start: Any) -> None:
    daemon = start(LOG_FORMAT="json")
    exchange(int(daemon.wait_for(r"listening on 127\.0\.0\.1:(\d+) \(PROXY_LISTEN\)")[1]), GET % b"/healthz")
    daemon.wait_for(r"/healthz")
    daemon.process.terminate()
    daemon.wait_exit()
    lines = [json.loads(line) for line in daemon.log_text.splitlines()]
    assert all(line["message"] and line["level"] and line["time"] for line in lines)
    [access] = [line for line in lines if line["namespace"] == "dockerproxy.access"]
    assert (access["method"], access["path"], access["status"], access["size"]) == ("GET", "/healthz", 200, 3)
    messages = " ".join(line["message"] for line in lines)
    for expected in ("intercepting registry-1.docker.io", "cache in ", "Received SIGTERM"):
        assert expected in messages


# shutdown


class TunnelTarget:
    """A server behind a tunnel. The test controls when the transfer ends."""

    def __init__(self) -> None:
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        self.settings = {"TUNNEL_DENY": "none", "TUNNEL_PORTS": str(self.port)}

    def tunnel(self, port: int) -> tuple[socket.socket, socket.socket]:
        """Open a tunnel through the daemon at `port`, and return its client and its server end."""
        client = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT)
        client.sendall(f"CONNECT 127.0.0.1:{self.port} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
        return client, self.server.accept()[0]


@pytest.fixture
def tunnel_target() -> Iterator[TunnelTarget]:
    target = TunnelTarget()
    yield target
    target.server.close()


def test_sigterm_closes_idle_connections(start: Any) -> None:
    daemon = start()
    with socket.create_connection(("127.0.0.1", daemon.port()), timeout=TIMEOUT) as idle:
        idle.sendall((GET % b"/healthz").replace(b"Connection: close\r\n", b""))
        assert idle.recv(65536)
        daemon.process.terminate()
        assert idle.recv(65536) == b""
    assert daemon.wait_exit() in (0, -signal.SIGTERM)


@pytest.mark.parametrize("workers", [1, 2])
def test_sigterm_lets_transfers_finish(start: Any, tunnel_target: TunnelTarget, workers: int) -> None:
    """The last transfer is logged too, even if a worker serves it and exits right after it."""
    daemon = start(**tunnel_target.settings, WORKERS=str(workers))
    port = daemon.port()
    if workers > 1:
        daemon.wait_for("worker 1 serves")  # then it gets the second connection, because this process has the first one
    with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT) as idle:
        client, upstream = tunnel_target.tunnel(port)  # the daemon has accepted the idle connection by then
        with client, upstream:
            upstream.sendall(b"one half, ")
            daemon.process.terminate()
            assert idle.recv(1) == b""
            with pytest.raises(OSError):  # connection refused or reset
                exchange(port, GET % b"/healthz")
            assert daemon.process.poll() is None
            upstream.sendall(b"and the other")
            upstream.close()
            assert read_all(client) == b"one half, and the other"
    assert daemon.wait_exit() in (0, -signal.SIGTERM)
    assert re.search(rf"CONNECT 127\.0\.0\.1:{tunnel_target.port} 200 23 [\d.]+ PASS - \"-\"\n", daemon.log_text)


@pytest.mark.parametrize("second_signal", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_aborts_transfers(start: Any, tunnel_target: TunnelTarget, second_signal: signal.Signals) -> None:
    daemon = start(**tunnel_target.settings)
    port = daemon.port()
    with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT) as idle:
        client, upstream = tunnel_target.tunnel(port)
        with client, upstream:
            daemon.process.terminate()
            assert idle.recv(1) == b""
            daemon.process.send_signal(second_signal)
            with pytest.raises(ConnectionResetError):
                client.recv(1)
    assert daemon.wait_exit() in (0, -signal.SIGTERM)
    assert "another stop signal" in daemon.log_text


SILENT_NAME_SERVER = """
import socket, time
socket.getaddrinfo = lambda *args, **kwargs: time.sleep(3600)
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_sigterm_is_not_held_up_by_name_lookups(start: Any, tmp_path: Path, workers: int) -> None:
    """Their clients are gone. Sixteen of the look-ups block a thread each, the others wait for one."""
    (tmp_path / "sitecustomize.py").write_text(SILENT_NAME_SERVER)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    daemon = start(PYTHONPATH=path, WORKERS=str(workers), TUNNEL_PORTS="443")
    port = daemon.port()
    if workers > 1:
        daemon.wait_for("worker 1 serves")
    with ExitStack() as stack:
        clients = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT)) for _ in range(200)
        ]
        for number, client in enumerate(clients):
            client.sendall(f"CONNECT name-{number}.example:443 HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert b" 200 " in exchange(port, GET % b"/healthz")  # behind the others; they have been accepted
        assert not select.select(clients, [], [], 0)[0]
    began = time.monotonic()
    daemon.process.terminate()
    assert daemon.wait_exit() in (0, -signal.SIGTERM)
    assert time.monotonic() - began < SHUTDOWN_GRACE
    assert "aborted" not in daemon.log_text


# the clock


def libfaketime() -> str:
    """Return the path of libfaketime, which gives a process another wall clock."""
    paths = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    if not paths:
        pytest.skip("libfaketime is missing (Debian package libfaketime)")
    return str(paths[0])


@pytest.mark.parametrize("workers", [1, 2])
def test_clock_set_back_stops_no_timer(start: Any, tmp_path: Path, workers: int) -> None:
    """The wall clock of all processes is set back by an hour. The watchdog is fed, and time-outs go on."""
    clock, notify_path = tmp_path / "clock", tmp_path / "notify"
    clock.write_text("+0")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify_socket:
        notify_socket.bind(str(notify_path))
        notify_socket.settimeout(TIMEOUT)
        daemon = start(
            LD_PRELOAD=libfaketime(), FAKETIME_TIMESTAMP_FILE=str(clock), FAKETIME_NO_CACHE="1",
            FAKETIME_DONT_FAKE_MONOTONIC="1", NOTIFY_SOCKET=str(notify_path), WATCHDOG_USEC="1000000",
            WORKERS=str(workers), CLIENT_HEADER_TIMEOUT="2s", KEEPALIVE_TIMEOUT="2s",
        )  # fmt: skip
        port = daemon.port()
        if workers > 1:
            daemon.wait_for("worker 1 serves")
        while not notify_socket.recv(65536).startswith(b"READY=1"):
            pass
        with ExitStack() as stack:
            clients = [
                stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT)) for _ in range(4)
            ]
            for client in clients:
                client.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
                assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
            clock.write_text("-3600")
            date = exchange(port, GET % b"/healthz").partition(b"\r\nDate: ")[2].partition(b"\r\n")[0].decode()
            age = datetime.datetime.now(datetime.UTC) - parsedate_to_datetime(date)
            assert age > datetime.timedelta(minutes=59)  # the clock has been set back
            notify_socket.setblocking(False)
            with suppress(BlockingIOError):
                while notify_socket.recv(65536):
                    pass
            notify_socket.settimeout(TIMEOUT)
            assert [notify_socket.recv(65536) for _ in range(4)] == [b"WATCHDOG=1"] * 4
            for client in clients:
                assert client.recv(1) == b""  # KEEPALIVE_TIMEOUT
    daemon.process.terminate()
    assert daemon.wait_exit() in (0, -signal.SIGTERM)


def test_unknown_option(start: Any) -> None:
    daemon = start("--no-such-option")
    daemon.wait_exit()  # the status depends on the version of Twisted
    assert "no-such-option" in daemon.log_text
    assert "listening" not in daemon.log_text


# state directories


def snapshot(directory: Path) -> dict[Path, tuple[int, int, int, int, bytes]]:
    """Return everything that a change to a file or directory below `directory` would change."""
    entries = {}
    for path in directory.rglob("*"):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() else b""
        entries[path] = (status.st_ino, status.st_mode, status.st_mtime_ns, status.st_ctime_ns, content)
    return entries


@contextmanager
def standing_still(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Stop a process with all its threads for the time of the context: it keeps its locks, and writes nothing."""
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    yield
    process.send_signal(signal.SIGCONT)


def wait_for_text(file: Path, text: str) -> None:
    """Wait until `file` is there and `text` is in it, whole: one write of the daemon puts it there."""
    deadline = time.monotonic() + TIMEOUT
    while not file.exists() or text not in file.read_text():
        assert time.monotonic() < deadline, f"{text!r} is not in {file}"
        time.sleep(0.02)


@pytest.mark.parametrize(("setting", "name"), [("CACHE_DIR", "cache"), ("REGISTRY_DIR", "registry")])
def test_second_daemon_touches_nothing(start: Any, tmp_path: Path, setting: str, name: str) -> None:
    (tmp_path / "other").mkdir()
    first = start()
    first.port()
    state = tmp_path / "state"
    for root in (state / "cache", state / "registry"):
        (root / "staging").mkdir(exist_ok=True)
        (root / "staging" / "upload").write_bytes(b"of the first daemon")
    with standing_still(first.process):  # its threads write files of their own at any time
        before = snapshot(state)
        second = start(directory=tmp_path / "other", **{setting: str(state / name)})
        assert second.wait_exit() == os.EX_CONFIG
        assert snapshot(state) == before
    assert second.log_text == (
        f"docker-registry-proxy: {state / name} is in use by the daemon with process ID {first.process.pid}; stop that "
        f"daemon, or set {setting} to another directory.\n"
    )
    assert not (tmp_path / "other" / "state" / "ca").exists()
    assert exchange(first.port(), GET % b"/healthz").endswith(b"ok\n")


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM])
def test_restart_at_once(start: Any, signal_number: signal.Signals) -> None:
    """Workers of the killed daemon may still be there for a moment. They hold no lock."""
    for _ in range(3):
        daemon = start(WORKERS="2")
        daemon.wait_for("worker 1 serves")
        daemon.process.send_signal(signal_number)
        daemon.wait_exit()


def test_lock_of_a_daemonized_process(start: Any, tmp_path: Path) -> None:
    """twistd forks after the directories were opened, and the first process exits."""
    pid_file = tmp_path / "twistd.pid"
    command = [twistd_command()[0], f"--pidfile={pid_file}", f"--logfile={tmp_path / 'log'}", "dockerproxy"]
    subprocess.run(command, cwd=tmp_path, env=environment(tmp_path, {}), check=True, timeout=TIMEOUT)
    pid = int(pid_file.read_text())
    try:
        wait_for_text(tmp_path / "state" / "cache" / "lock", f"{pid}\n")
        assert f"is in use by the daemon with process ID {pid};" in startup_error(start)
    finally:
        os.kill(pid, signal.SIGTERM)
        while Path(f"/proc/{pid}").exists():
            time.sleep(0.02)
    start().port()
