"""A reload: what may change under a running daemon does, all of it or nothing; and the daemon as systemd runs it."""

from __future__ import annotations

import base64
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from shutil import which
from typing import Any

import bcrypt
import pytest

import dockerproxy
from dockerproxy.daemon.systemd import Notifier
from dockerproxy.oci.names import Host, Registry
from dockerproxy.registry.users import HtpasswdError
from dockerproxy.reload import Reload, Served, sentence
from dockerproxy.settings import Settings, SettingsError
from dockerproxy.upstream.tokens import Tokens

ROOT = Path(dockerproxy.__file__).parent.parent
HUB, TOKENS = Registry.parse("registry-1.docker.io"), Registry.parse("auth.docker.io")
QUAY, LOCAL = Registry.parse("quay.io"), Registry.parse("http://registry.test:5000")


def settings(**given: str) -> Settings:
    return Settings.from_environment(given)


class Told(Notifier):
    """Keeps what systemd is told."""

    def __init__(self) -> None:
        super().__init__("")
        self.messages: list[str] = []

    def _send(self, assignments: str, status: str = "") -> None:
        self.messages.append(f"{assignments.partition('=')[0]} {status}".strip())


class Scene:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = settings(REGISTRIES="quay.io")
        self.served = Served(self.now)
        self.told = Told()
        self.failing: Exception | None = None
        self.logged: list[str] = []
        for level in ("info", "warn", "error"):
            monkeypatch.setattr(f"dockerproxy.reload.log.{level}", self._log(level))
        self.reload = Reload(self._read, self._use, self.now, self.served, self.told)

    def _log(self, level: str) -> Any:
        return lambda form, **fields: self.logged.append(f"{level} {form.format(**fields)}")

    def _read(self) -> Settings:
        if self.failing is not None:
            raise self.failing
        return self.now

    def _use(self, changed: Settings) -> None:
        self.served.use(changed)


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(monkeypatch)


def test_what_is_served() -> None:
    served = Served(settings(REGISTRIES="quay.io http://registry.test:5000"))
    assert list(served.intercepted.values()) == [HUB, QUAY, LOCAL, TOKENS]
    assert served.mirrored == {HUB.host: HUB, QUAY.host: QUAY, LOCAL.host: LOCAL, Host.parse("docker.io"): HUB}
    assert served.status == "serving registry-1.docker.io, quay.io, registry.test:5000"


def test_those_who_hold_the_mappings_see_the_change() -> None:
    served = Served(settings(REGISTRIES="quay.io"))
    intercepted, mirrored, registries = served.intercepted, served.mirrored, served.mirrored.values()
    served.use(settings(REGISTRIES="http://registry.test:5000"))
    assert list(intercepted.values()) == [HUB, LOCAL, TOKENS]
    assert set(mirrored.values()) == set(registries) == {HUB, LOCAL}


def test_a_reload(scene: Scene) -> None:
    scene.now = settings(REGISTRIES="http://registry.test:5000", AUTH_REGISTRIES="quay.io:me:secret")
    scene.reload()
    assert LOCAL.host in scene.served.intercepted
    assert scene.told.messages == ["RELOADING", "READY serving registry-1.docker.io, registry.test:5000"]
    assert scene.logged == ["info reloaded: serving registry-1.docker.io, registry.test:5000"]


def test_what_waits_for_a_restart_is_named(scene: Scene) -> None:
    scene.now = settings(REGISTRIES="quay.io", CACHE_MAX_SIZE="1g", CA_KEY_PASSPHRASE="pass phrase")
    scene.reload()
    scene.reload()
    warnings = [
        f"warn {name} has changed, which takes effect at the next start only"
        for name in ("CACHE_MAX_SIZE", "CA_KEY_PASSPHRASE")
    ]
    assert scene.logged == [*warnings, "info reloaded: serving registry-1.docker.io, quay.io"] * 2


def test_warnings_are_said_again(scene: Scene) -> None:
    scene.now = Settings.from_environment({}, {"REGISTRIE": "quay.io"})
    scene.reload()
    assert scene.logged[0] == "warn REGISTRIE is not a setting and has no effect; is REGISTRIES meant?"


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (SettingsError("REGISTRIES: 'a b' is wrong."), "REGISTRIES: 'a b' is wrong."),
        (HtpasswdError("HTPASSWD_FILE: /x is not UTF-8 text"), "HTPASSWD_FILE: /x is not UTF-8 text."),
        (PermissionError(13, "Permission denied", "/x"), "/x: Permission denied."),
        (OSError(5, "Input/output error"), "Input/output error."),
    ],
)
def test_a_reload_that_cannot_be_changes_nothing(scene: Scene, error: Exception, why: str) -> None:
    assert sentence(error) == why
    scene.failing = error
    scene.reload()
    assert list(scene.served.intercepted.values()) == [HUB, QUAY, TOKENS]
    kept = "serving registry-1.docker.io, quay.io"
    assert scene.told.messages == ["RELOADING", f"READY {kept}; not reloaded: {why}"]
    assert scene.logged == [f"error not reloaded, the settings stay as they were: {why}"]
    scene.failing, scene.now = None, settings()
    scene.reload()
    assert scene.told.messages[-1] == "READY serving registry-1.docker.io"


def test_logins_change() -> None:
    tokens = Tokens(None, lambda: 0.0, None, settings(AUTH_REGISTRIES="quay.io:me:old").auth_registries)  # type: ignore[arg-type]
    tokens.use(settings(AUTH_REGISTRIES="quay.io:me:new").auth_registries)
    login = tokens.effective_login(QUAY)
    assert login is not None
    assert login.password == "new"
    tokens.use({})
    assert tokens.effective_login(QUAY) is None


# the daemon as systemd runs it


class Unit:
    """`twistd dockerproxy` with sockets handed in, a socket to tell systemd by, and an environment file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "environment"
        self.file.write_text("")
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notify.bind(str(folder / "notify"))
        self.notify.settimeout(30)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, sockets: Mapping[str, socket.socket], **settings: str) -> None:
        """Start with `sockets`, by their names, as the descriptors from 3 on."""
        beside = Path(sys.executable).with_name("twistd")
        twistd = str(beside if beside.exists() else which("twistd3") or "twistd")
        # systemd's child says who it is itself; a shell is as near to that as can be had.
        numbers = [made.fileno() for made in sockets.values()]
        moves = " ".join(f"{3 + place}<&{number}" for place, number in enumerate(numbers, start=20))
        moves += " " + " ".join(f"{3 + place}<&{23 + place}" for place in range(len(numbers)))
        script = f'export LISTEN_PID=$$; exec {moves}; exec "$@"'
        self.process = subprocess.Popen(
            [
                "bash",
                "-c",
                script,
                "bash",
                twistd,
                "--nodaemon",
                "--pidfile=",
                "dockerproxy",
                f"--env-file={self.file}",
            ],
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": str(ROOT),
                "STATE_DIRECTORY": str(self.folder / "state"),
                "NOTIFY_SOCKET": str(self.folder / "notify"),
                "LISTEN_FDS": str(len(sockets)),
                "LISTEN_FDNAMES": ":".join(sockets),
                "PROXY_LISTEN": "systemd:domain=INET6:name=proxy",
                "REGISTRY_LISTEN": "none",
                **settings,
            },
            pass_fds=numbers,
            stdin=subprocess.DEVNULL,
            stdout=(self.folder / "log").open("wb"),
            stderr=subprocess.STDOUT,
            cwd=self.folder,
        )

    def told(self) -> str:
        """Wait for the next message to systemd."""
        return self.notify.recv(65536).decode()

    def reload(self, text: str) -> str:
        """Reload with `text` as the environment file, and return what systemd is told at the end."""
        assert self.process is not None
        self.file.write_text(text)
        self.process.send_signal(signal.SIGHUP)
        assert self.told().startswith("RELOADING=1")
        return self.told()

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.notify.close()


@pytest.fixture
def unit(tmp_path: Path) -> Iterator[Unit]:
    made = Unit(tmp_path)
    yield made
    made.end()


@pytest.fixture(params=["IPv4", "IPv6"])
def door(request: pytest.FixtureRequest) -> Iterator[socket.socket]:
    """A listening socket, as systemd makes one where the kernel has IPv6 and where it has not."""
    family = socket.AF_INET if request.param == "IPv4" else socket.AF_INET6
    with socket.create_server(("127.0.0.1" if request.param == "IPv4" else "::1", 0), family=family) as made:
        yield made


def ask(door: socket.socket, path: str, login: str = "") -> tuple[int, str]:
    """Return status and text of the answer."""
    request = f"GET {path} HTTP/1.1\r\nHost: here\r\nConnection: close\r\n"
    if login:
        request += f"Authorization: Basic {base64.b64encode(login.encode()).decode()}\r\n"
    with socket.create_connection(door.getsockname()[:2], timeout=60) as connection:
        connection.sendall(f"{request}\r\n".encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
    return int(answer.split(" ", 2)[1]), answer


def test_sockets_of_systemd_and_a_reload(unit: Unit, door: socket.socket) -> None:
    unit.start({"proxy": door})
    assert unit.told() == "READY=1\nSTATUS=serving registry-1.docker.io"
    assert ask(door, "/healthz")[0] == 200
    status, text = ask(door, "/v2/a/b/manifests/1?ns=127.0.0.1:1")
    assert (status, "not mirrored here" in text) == (404, True)
    told = unit.reload("REGISTRIES=http://127.0.0.1:1\n")
    assert told == "READY=1\nSTATUS=serving registry-1.docker.io, 127.0.0.1:1"
    status, text = ask(door, "/v2/a/b/manifests/1?ns=127.0.0.1:1")
    assert status != 404, text
    assert "not reloaded: REGISTRIES: " in unit.reload("REGISTRIES=a/b\n")
    assert ask(door, "/v2/a/b/manifests/1?ns=127.0.0.1:1")[0] == status


def test_a_connection_outlives_a_reload(unit: Unit, door: socket.socket) -> None:
    unit.start({"proxy": door})
    unit.told()
    with socket.create_connection(door.getsockname()[:2], timeout=60) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\n")
        unit.reload("REGISTRIES=quay.io\n")
        connection.sendall(b"Host: here\r\nConnection: close\r\n\r\n")
        assert b" 200 " in b"".join(iter(lambda: connection.recv(65536), b""))


def test_users_come_and_go(unit: Unit, door: socket.socket, tmp_path: Path) -> None:
    users = tmp_path / "htpasswd"
    users.write_text(f"me:{bcrypt.hashpw(b'word', bcrypt.gensalt(4)).decode()}\n")
    unit.start({"proxy": door}, REGISTRY_HOSTNAME="here", PROXY_LISTEN="systemd:domain=INET6:name=proxy")
    unit.told()
    hosted = "/v2/a/tags/list?ns=here"
    assert ask(door, hosted)[0] == 404
    unit.reload(f"HTPASSWD_FILE={users}\n")
    assert ask(door, hosted)[0] == 401
    assert ask(door, hosted, "me:word")[0] == 404
    assert "not reloaded: HTPASSWD_FILE: " in unit.reload("HTPASSWD_FILE=/nowhere/htpasswd\n")
    assert ask(door, hosted)[0] == 401
    unit.reload("")
    assert ask(door, hosted)[0] == 404


def test_the_proxy_does_without_the_other_doors(unit: Unit, door: socket.socket, tmp_path: Path) -> None:
    unit.start({"proxy": door}, REGISTRY_HTTP_LISTEN="systemd:domain=INET6:name=http")
    assert unit.told().startswith("READY=1")
    assert ask(door, "/healthz")[0] == 200
    assert (
        "REGISTRY_HTTP_LISTEN: systemd:domain=INET6:name=http cannot be listened on" in (tmp_path / "log").read_text()
    )


def test_but_not_without_its_own(unit: Unit, door: socket.socket) -> None:
    unit.start({"http": door})
    expected = "PROXY_LISTEN: systemd:domain=INET6:name=proxy cannot be listened on: systemd has no such socket."
    assert unit.told() == f"STATUS={expected}"
    assert unit.process is not None
    assert unit.process.wait(60) == 1


def test_a_start_that_cannot_be(unit: Unit, door: socket.socket, tmp_path: Path) -> None:
    unit.start({"proxy": door}, CACHE_MAX_SIZE="much")
    expected = "CACHE_MAX_SIZE: 'much' is not a size such as 512m or 32g."
    assert unit.told() == f"STATUS={expected}"
    assert unit.process is not None
    assert unit.process.wait(60) == os.EX_CONFIG
    assert (tmp_path / "log").read_text() == f"docker-registry-proxy: {expected}\n"


def test_the_end(unit: Unit, door: socket.socket) -> None:
    unit.start({"proxy": door}, WATCHDOG_USEC="1000000")
    messages = [unit.told() for _ in range(3)]
    assert re.fullmatch(r"(READY=1\nSTATUS=[^\n]*|WATCHDOG=1| )+", " ".join(messages))
    assert unit.process is not None
    unit.process.terminate()
    while not (message := unit.told()).startswith("STOPPING=1"):
        assert message == "WATCHDOG=1"
    assert unit.process.wait(60) in (0, -signal.SIGTERM)
