"""Reload on SIGHUP, which applies all changed settings or none; and the daemon as a systemd service."""

from __future__ import annotations

import base64
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bcrypt
import pytest
from attrs import evolve
from twisted.internet.defer import Deferred

import dockerproxy
from dockerproxy import settings as settings_module
from dockerproxy.daemon.systemd import Notifier
from dockerproxy.oci.credentials import BasicCredentials
from dockerproxy.oci.names import Registry
from dockerproxy.registry.htpasswd import HtpasswdError
from dockerproxy.reload import (
    Configuration,
    RegistryTable,
    Reloader,
    describe_error,
    reloadable_variables,
    settings_in_force,
)
from dockerproxy.settings import Settings, SettingsError
from dockerproxy.tap import apply_configuration, doctor_settings
from dockerproxy.upstream.authorizer import Authorizer
from tests.support.audit import make_audit_log
from tests.twistd import twistd_command

pytestmark = pytest.mark.slow  # each test starts a daemon

ROOT = Path(dockerproxy.__file__).parent.parent
HUB, TOKENS = Registry.parse("registry-1.docker.io"), Registry.parse("auth.docker.io")
ALIASES = [Registry.parse(name) for name in ("index.docker.io", "docker.io", "registry.hub.docker.com")]
QUAY, LOCAL = Registry.parse("quay.io"), Registry.parse("http://registry.test:5000")


def settings(**variables: str) -> Settings:
    return Settings.from_environment(variables)


def configuration(**variables: str) -> Configuration:
    return Configuration(settings(**variables), variables)


class RecordingNotifier(Notifier):
    """Records the notifications to systemd."""

    def __init__(self) -> None:
        super().__init__("")
        self.messages: list[str] = []

    def _send(self, assignments: str, status: str = "") -> None:
        self.messages.append(f"{assignments.partition('=')[0]} {status}".strip())


class ReloadHarness:
    """A `Reloader` whose settings and errors the test sets. Records the log and the notifications to systemd."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = settings(REGISTRIES="quay.io")
        self.registries = RegistryTable(self.current)
        self.notifier = RecordingNotifier()
        self.error: Exception | None = None
        self.apply_error: Exception | None = None
        self.problems: list[str] = []
        self.applied: Deferred[None] | None = None
        self.reads = 0
        self.log_lines: list[str] = []
        for level in ("info", "warn", "error"):
            monkeypatch.setattr(f"dockerproxy.reload.log.{level}", self._log(level))
        self.audit, self.recorded = make_audit_log()
        self.successes: list[bool] = []
        self.reload = Reloader(
            self._read,
            self._apply,
            Configuration(self.current, {}),
            self.registries,
            self.notifier,
            self.audit,
            self.successes.append,
        )

    def _log(self, level: str) -> Any:
        return lambda form, **fields: self.log_lines.append(f"{level} {form.format(**fields)}")

    def _read(self) -> Configuration:
        self.reads += 1
        if self.error is not None:
            raise self.error
        return Configuration(self.current, {})

    async def _apply(self, configuration: Configuration) -> list[str]:
        if self.apply_error is not None:
            raise self.apply_error
        self.registries.update(configuration.settings)
        if self.applied is not None:
            await self.applied
        return self.problems


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> ReloadHarness:
    return ReloadHarness(monkeypatch)


def test_registry_table_from_settings() -> None:
    registries = RegistryTable(settings(REGISTRIES="quay.io http://registry.test:5000"))
    assert list(registries.intercepted.values()) == [HUB, QUAY, LOCAL, TOKENS, *ALIASES]
    served = {registry.host: registry for registry in (HUB, QUAY, LOCAL)}
    assert registries.mirrored == served | {alias.host: HUB for alias in ALIASES}
    assert registries.status == "serving registry-1.docker.io, quay.io, registry.test:5000"


def test_update_changes_the_mappings_in_place() -> None:
    table = RegistryTable(settings(REGISTRIES="quay.io"))
    intercepted, mirrored, registries = table.intercepted, table.mirrored, table.mirrored.values()
    table.update(settings(REGISTRIES="http://registry.test:5000"))
    assert list(intercepted.values()) == [HUB, LOCAL, TOKENS, *ALIASES]
    assert set(mirrored.values()) == set(registries) == {HUB, LOCAL}


def test_reload_applies_new_settings(harness: ReloadHarness) -> None:
    harness.current = settings(REGISTRIES="http://registry.test:5000", AUTH_REGISTRIES="quay.io:me:secret")
    harness.reload()
    assert harness.reads == 1, "another read could differ"
    assert LOCAL.host in harness.registries.intercepted
    assert harness.notifier.messages == ["RELOADING", "READY serving registry-1.docker.io, registry.test:5000"]
    assert harness.log_lines == ["info reloaded: serving registry-1.docker.io, registry.test:5000"]
    assert [(entry["from"], entry["action"], entry["result"]) for entry in harness.recorded] == [
        ("SIGHUP", "reload", "done")
    ]
    assert harness.successes == [True]


def test_settings_that_need_a_restart_are_logged(harness: ReloadHarness) -> None:
    harness.current = settings(REGISTRIES="quay.io", CACHE_MAX_SIZE="1g", CA_KEY_PASSPHRASE="pass phrase")
    harness.reload()
    harness.reload()
    warnings = [
        f"warn {name} has changed; restart the daemon to apply it" for name in ("CACHE_MAX_SIZE", "CA_KEY_PASSPHRASE")
    ]
    assert harness.log_lines == [*warnings, "info reloaded: serving registry-1.docker.io, quay.io"] * 2


@pytest.mark.parametrize(
    ("before", "after", "needing_restart"),
    [("", "10.0.0.1", True), ("10.0.0.1", "", True), ("10.0.0.1 10.0.0.2", "10.0.0.1 10.0.0.3", False)],
    ids=["set", "unset", "changed"],
)
def test_only_a_member_can_get_another_fleet(
    harness: ReloadHarness, before: str, after: str, needing_restart: bool
) -> None:
    harness.reload.initial = Configuration(settings(FLEET=before), {})
    harness.current = settings(FLEET=after)
    harness.reload()
    assert ("warn FLEET has changed; restart the daemon to apply it" in harness.log_lines) is needing_restart


def test_reload_logs_warnings_again(harness: ReloadHarness) -> None:
    harness.current = Settings.from_environment({}, {"REGISTRIE": "quay.io"})
    harness.reload()
    assert harness.log_lines[0] == "warn REGISTRIE is not a setting and has no effect. Did you mean REGISTRIES?"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (SettingsError("REGISTRIES: 'a b' is wrong."), "REGISTRIES: 'a b' is wrong."),
        (HtpasswdError("HTPASSWD_FILE: /x is not UTF-8 text"), "HTPASSWD_FILE: /x is not UTF-8 text."),
        (PermissionError(13, "Permission denied", "/x"), "/x: Permission denied."),
        (OSError(5, "Input/output error"), "Input/output error."),
    ],
)
def test_failed_reload_changes_nothing(harness: ReloadHarness, error: Exception, reason: str) -> None:
    assert describe_error(error) == reason
    harness.error = error
    harness.reload()
    assert (harness.recorded[0]["result"], harness.successes) == (f"not reloaded: {reason}", [False])
    assert list(harness.registries.intercepted.values()) == [HUB, QUAY, TOKENS, *ALIASES]
    status = "serving registry-1.docker.io, quay.io"
    assert harness.notifier.messages == ["RELOADING", f"READY {status}; not reloaded: {reason}"]
    assert harness.log_lines == [f"error not reloaded, the settings are unchanged: {reason}"]
    harness.error, harness.current = None, settings()
    harness.reload()
    assert harness.notifier.messages[-1] == "READY serving registry-1.docker.io"


def test_worker_that_cannot_reload_is_reported(harness: ReloadHarness) -> None:
    harness.problems = ["worker 1 is restarted, because it could not reload: it is hung."]
    harness.reload()
    status = "serving registry-1.docker.io, quay.io"
    assert harness.notifier.messages == ["RELOADING", f"READY {status}; {harness.problems[0]}"]
    assert harness.log_lines == [f"error {harness.problems[0]}", f"info reloaded: {status}"]


@pytest.mark.parametrize("where", ["read", "apply"])
def test_unexpected_error_ends_the_reload(harness: ReloadHarness, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd must not wait for ever for the end of the reload, and the next one works."""
    failures: list[str] = []
    monkeypatch.setattr("dockerproxy.concurrency.log.failure", lambda form, failure, **_: failures.append(str(failure)))
    setattr(harness, "error" if where == "read" else "apply_error", RuntimeError("unexpected"))
    harness.reload()
    status = "serving registry-1.docker.io, quay.io"
    assert harness.notifier.messages == ["RELOADING", f"READY {status}; not reloaded: internal error; see the log"]
    assert len(failures) == 1
    harness.error = harness.apply_error = None
    harness.reload()
    assert harness.notifier.messages[2:] == ["RELOADING", f"READY {status}"]


def test_reloads_run_one_after_the_other(harness: ReloadHarness) -> None:
    """SIGHUP may arrive while workers still apply the settings of the previous reload."""
    harness.applied = first = Deferred()
    harness.reload()
    harness.applied = None
    harness.current = settings(REGISTRIES="ghcr.io")
    harness.reload()
    assert harness.notifier.messages == ["RELOADING"]
    first.callback(None)
    assert harness.notifier.messages[1:] == [
        "READY serving registry-1.docker.io, quay.io",
        "RELOADING",
        "READY serving registry-1.docker.io, ghcr.io",
    ]


def test_settings_that_need_a_restart_are_those_of_the_start() -> None:
    """Also for the doctor, and in the main process as in the workers, which hear of the others only."""
    initial = configuration(REGISTRIES="quay.io", REGISTRY_HOSTNAME="a.test", HTTPS_PROXY="http://a.test:8080")
    current = configuration(REGISTRIES="ghcr.io", REGISTRY_HOSTNAME="b.test", UPSTREAM_PROXY="http://b.test:8080")
    in_force = settings_in_force(initial.settings, current.settings)
    assert [str(registry) for registry in in_force.extra_registries] == ["ghcr.io"]
    assert in_force.registry_hostname == ("a.test",)
    assert settings_in_force(initial.settings, initial.settings) == initial.settings
    doctor = doctor_settings(initial, evolve(current, unread=("TYPO",)), ["CACHE_DIR is on NFS"])
    assert doctor.settings.upstream_proxy == initial.settings.upstream_proxy
    assert (doctor.proxy_setting, doctor.unread) == ("HTTPS_PROXY", ("TYPO",))
    assert doctor.warnings == ("CACHE_DIR is on NFS",)


def test_settings_that_cannot_be_applied_add_no_registry_to_the_metrics() -> None:
    calls: list[str] = []

    def note(name: str) -> Any:
        def call(*_: object) -> Any:
            calls.append(name)
            if name == refused:
                raise HtpasswdError("no")

        return call

    def apply() -> Any:
        calls.clear()
        parts: Any = SimpleNamespace(
            reconfigure=note("reconfigure"), configure=note("configure"), prefetch=note("prefetch"),
            reload=note("workers"), metrics=SimpleNamespace(add_registries=note("metrics")),
            logins=SimpleNamespace(configure=note("logins"), prefetch=note("prefetch")),
            ended_logins=SimpleNamespace(clear=note("ended logins")),
        )  # fmt: skip
        new = configuration(REGISTRIES="ghcr.io")
        return apply_configuration(parts, parts, parts, parts, parts, lambda _: parts, new.settings, new)

    refused = "reconfigure"
    with pytest.raises(HtpasswdError):
        apply().send(None)
    assert calls == ["reconfigure"]


def test_configuration_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers get the variables that the main process parsed, even if the files change meanwhile."""
    env_file, credential = tmp_path / "env", tmp_path / "docker-registry-proxy.auth_registries"
    env_file.write_text("REGISTRIES=quay.io\nANONYMOUS_PULL=true\n")
    credential.write_text("quay.io:me:secret")
    reads: list[str] = []
    read = settings_module.read_config_file
    monkeypatch.setattr(settings_module, "read_config_file", lambda path: reads.append(Path(path).name) or read(path))
    configuration = Configuration.read(
        {"CREDENTIALS_DIRECTORY": str(tmp_path), "ANONYMOUS_PULL": "false"}, str(env_file)
    )
    assert sorted(reads) == [credential.name, env_file.name]
    variables = reloadable_variables(configuration.variables)
    env_file.unlink()
    credential.unlink()
    worker_settings = Settings.from_environment(variables)
    for name in ("extra_registries", "auth_registries", "anonymous_pull"):
        assert getattr(worker_settings, name) == getattr(configuration.settings, name)
    assert [login.password for login in worker_settings.auth_registries.values()] == ["secret"]


def read_configuration(**variables: str) -> Configuration:
    return Configuration.read({"PATH": "/usr/bin:/bin", **variables}, None)


def test_docker_config_is_read_with_the_settings(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"auths": {"quay.io": {"username": "me", "password": "secret"}, "quay.io/team": {}}}')
    file.chmod(0o604)
    configuration = read_configuration(DOCKER_CONFIG_FILE=str(file))
    assert configuration.docker_config.logins == {QUAY.host: BasicCredentials("me", "secret")}
    assert "secret" not in repr(configuration)
    exposed, unused = sorted(configuration.settings.warnings, key=lambda text: "every local user" not in text)
    assert f"every local user can read {file}" in exposed
    assert unused.startswith("DOCKER_CONFIG_FILE: its entry 'quay.io/team' is not used")
    assert read_configuration().docker_config.logins == {}


@pytest.mark.parametrize(
    "content", [None, "", "{", "[]", '{"auths": 7}', '{"credsStore": "a/b"}', "{" + " " * (1 << 20)]
)
def test_an_unusable_docker_config(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "config.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SettingsError) as excinfo:
        read_configuration(DOCKER_CONFIG_FILE=str(file))
    assert str(excinfo.value).startswith(f"DOCKER_CONFIG_FILE: {file} ")
    with pytest.raises(SettingsError, match="cannot be read"):
        read_configuration(DOCKER_CONFIG_FILE=str(tmp_path))


def test_warnings_about_helpers(tmp_path: Path) -> None:
    program = tmp_path / "docker-credential-there"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    file = tmp_path / "config.json"
    file.write_text('{"credsStore": "missing-too", "credHelpers": {"quay.io": "there"}}')
    file.chmod(0o600)
    never_asked = "other.test:there *.x.test:there"
    warnings = read_configuration(
        PATH=str(tmp_path),
        REGISTRIES="quay.io *.pkg.dev a.example.com",
        CREDENTIAL_HELPERS=f"quay.io:missing a.pkg.dev:there *.example.com:there docker.io:there {never_asked}",
        DOCKER_CONFIG_FILE=str(file),
    ).settings.warnings
    assert [warning.partition(",")[0].partition(" in PATH")[0] for warning in warnings] == [
        "CREDENTIAL_HELPERS: there is no program docker-credential-missing",
        "DOCKER_CONFIG_FILE: there is no program docker-credential-missing-too",
        "CREDENTIAL_HELPERS: the helper for other.test is never asked",
        "CREDENTIAL_HELPERS: the helper for *.x.test is never asked",
    ]


def test_reload_replaces_logins() -> None:
    tokens = Authorizer(None, lambda: 0.0, None, settings(AUTH_REGISTRIES="quay.io:me:old").auth_registries)  # type: ignore[arg-type]
    tokens.set_logins(settings(AUTH_REGISTRIES="quay.io:me:new").auth_registries)
    login = tokens.effective_login(QUAY)
    assert login is not None
    assert login.password == "new"
    tokens.set_logins({})
    assert tokens.effective_login(QUAY) is None


# the daemon as a systemd service


class SystemdUnit:
    """`twistd dockerproxy` as a systemd unit: with passed sockets, a notification socket and an environment file."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.env_file = directory / "environment"
        self.env_file.write_text("")
        self.notify_socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notify_socket.bind(str(directory / "notify"))
        self.notify_socket.settimeout(30)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, sockets: Mapping[str, socket.socket], **settings: str) -> None:
        """Start the daemon. It gets `sockets`, which have names, as the descriptors from 3 on."""
        # LISTEN_PID must be the process ID of the daemon. A shell sets it and then executes the daemon.
        numbers = [sock.fileno() for sock in sockets.values()]
        redirections = " ".join(f"{3 + index}<&{number}" for index, number in enumerate(numbers, start=20))
        redirections += " " + " ".join(f"{3 + index}<&{23 + index}" for index in range(len(numbers)))
        script = f'export LISTEN_PID=$$; exec {redirections}; exec "$@"'
        self.process = subprocess.Popen(
            [
                "bash",
                "-c",
                script,
                "bash",
                *twistd_command(),
                "dockerproxy",
                f"--env-file={self.env_file}",
            ],
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": str(ROOT),
                "STATE_DIRECTORY": str(self.directory / "state"),
                "NOTIFY_SOCKET": str(self.directory / "notify"),
                "LISTEN_FDS": str(len(sockets)),
                "LISTEN_FDNAMES": ":".join(sockets),
                "PROXY_LISTEN": "systemd:domain=INET6:name=proxy",
                "REGISTRY_LISTEN": "none",
                **settings,
            },
            pass_fds=numbers,
            stdin=subprocess.DEVNULL,
            stdout=(self.directory / "log").open("wb"),
            stderr=subprocess.STDOUT,
            cwd=self.directory,
        )

    def next_notification(self) -> str:
        """Wait for the next notification to systemd."""
        return self.notify_socket.recv(65536).decode()

    def reload(self, text: str) -> str:
        """Reload with `text` as the environment file. Return the last notification to systemd."""
        assert self.process is not None
        self.env_file.write_text(text)
        self.process.send_signal(signal.SIGHUP)
        assert self.next_notification().startswith("RELOADING=1")
        return self.next_notification()

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.notify_socket.close()


@pytest.fixture
def unit(tmp_path: Path) -> Iterator[SystemdUnit]:
    systemd_unit = SystemdUnit(tmp_path)
    yield systemd_unit
    systemd_unit.stop()


@pytest.fixture(params=["IPv4", "IPv6"])
def listening_socket(request: pytest.FixtureRequest) -> Iterator[socket.socket]:
    """Yield a listening socket, as systemd creates it on a host with IPv6 and on one without."""
    family = socket.AF_INET if request.param == "IPv4" else socket.AF_INET6
    with socket.create_server(("127.0.0.1" if request.param == "IPv4" else "::1", 0), family=family) as sock:
        yield sock


def get(listening_socket: socket.socket, path: str, credentials: str = "") -> tuple[int, str]:
    """Send a GET request. Return the status and the text of the response."""
    request = f"GET {path} HTTP/1.1\r\nHost: here\r\nConnection: close\r\n"
    if credentials:
        request += f"Authorization: Basic {base64.b64encode(credentials.encode()).decode()}\r\n"
    with socket.create_connection(listening_socket.getsockname()[:2], timeout=60) as connection:
        connection.sendall(f"{request}\r\n".encode())
        response = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
    return int(response.split(" ", 2)[1]), response


def test_systemd_sockets_and_reload(unit: SystemdUnit, listening_socket: socket.socket) -> None:
    unit.start({"proxy": listening_socket})
    assert unit.next_notification() == "READY=1\nSTATUS=serving registry-1.docker.io"
    assert get(listening_socket, "/healthz")[0] == 200
    status, text = get(listening_socket, "/v2/a/b/manifests/1?ns=127.0.0.1:1")
    assert (status, "not mirrored here" in text) == (404, True)
    notification = unit.reload("REGISTRIES=http://127.0.0.1:1\n")
    assert notification == "READY=1\nSTATUS=serving registry-1.docker.io, 127.0.0.1:1"
    status, text = get(listening_socket, "/v2/a/b/manifests/1?ns=127.0.0.1:1")
    assert status != 404, text
    assert "not reloaded: REGISTRIES: " in unit.reload("REGISTRIES=a/b\n")
    assert get(listening_socket, "/v2/a/b/manifests/1?ns=127.0.0.1:1")[0] == status


def test_connection_survives_reload(unit: SystemdUnit, listening_socket: socket.socket) -> None:
    unit.start({"proxy": listening_socket})
    unit.next_notification()
    with socket.create_connection(listening_socket.getsockname()[:2], timeout=60) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\n")
        unit.reload("REGISTRIES=quay.io\n")
        connection.sendall(b"Host: here\r\nConnection: close\r\n\r\n")
        assert b" 200 " in b"".join(iter(lambda: connection.recv(65536), b""))


def test_reload_changes_htpasswd_file(unit: SystemdUnit, listening_socket: socket.socket, tmp_path: Path) -> None:
    users = tmp_path / "htpasswd"
    users.write_text(f"me:{bcrypt.hashpw(b'word', bcrypt.gensalt(4)).decode()}\n")
    unit.start({"proxy": listening_socket}, REGISTRY_HOSTNAME="here", PROXY_LISTEN="systemd:domain=INET6:name=proxy")
    unit.next_notification()
    hosted = "/v2/a/tags/list?ns=here"
    assert get(listening_socket, hosted)[0] == 404
    unit.reload(f"HTPASSWD_FILE={users}\n")
    assert get(listening_socket, hosted)[0] == 401
    assert get(listening_socket, hosted, "me:word")[0] == 404
    notification = unit.reload("HTPASSWD_FILE=/nowhere/htpasswd\nREGISTRIES=quay.io\n")
    assert "not reloaded: HTPASSWD_FILE: " in notification and "quay.io" not in notification
    assert get(listening_socket, hosted)[0] == 401
    unit.reload("")
    assert get(listening_socket, hosted)[0] == 404


def test_reload_changes_the_users_of_the_proxy(
    unit: SystemdUnit, listening_socket: socket.socket, tmp_path: Path
) -> None:
    users = tmp_path / "htpasswd"
    users.write_text(f"me:{bcrypt.hashpw(b'word', bcrypt.gensalt(4)).decode()}\n")
    unit.start({"proxy": listening_socket}, REGISTRY_HOSTNAME="here", PROXY_LISTEN="systemd:domain=INET6:name=proxy")
    unit.next_notification()
    mirror = "/v2/a/tags/list?ns=not.listed"
    assert get(listening_socket, mirror)[0] == 404
    unit.reload(f"PROXY_HTPASSWD_FILE={users}\n")
    assert get(listening_socket, mirror)[0] == 407
    notification = unit.reload("PROXY_HTPASSWD_FILE=/nowhere/htpasswd\nREGISTRIES=quay.io\n")
    assert "not reloaded: PROXY_HTPASSWD_FILE: " in notification and "quay.io" not in notification
    assert get(listening_socket, mirror)[0] == 407
    unit.reload("")
    assert get(listening_socket, mirror)[0] == 404


def test_missing_registry_socket_is_not_fatal(
    unit: SystemdUnit, listening_socket: socket.socket, tmp_path: Path
) -> None:
    unit.start({"proxy": listening_socket}, REGISTRY_HTTP_LISTEN="systemd:domain=INET6:name=http")
    assert unit.next_notification().startswith("READY=1")
    assert get(listening_socket, "/healthz")[0] == 200
    assert "REGISTRY_HTTP_LISTEN: cannot listen on systemd:domain=INET6:name=http" in (tmp_path / "log").read_text()


def test_missing_proxy_socket_is_fatal(unit: SystemdUnit, listening_socket: socket.socket) -> None:
    unit.start({"http": listening_socket})
    expected = (
        "PROXY_LISTEN: cannot listen on systemd:domain=INET6:name=proxy:"
        " systemd passed no such socket; is its .socket unit active?"
    )
    assert unit.next_notification() == f"STATUS={expected}"
    assert unit.process is not None
    assert unit.process.wait(60) == 1


def test_failed_start_is_reported_to_systemd(
    unit: SystemdUnit, listening_socket: socket.socket, tmp_path: Path
) -> None:
    unit.start({"proxy": listening_socket}, CACHE_MAX_SIZE="much")
    expected = "CACHE_MAX_SIZE: 'much' is not a size such as 512m or 32g."
    assert unit.next_notification() == f"STATUS={expected}"
    assert unit.process is not None
    assert unit.process.wait(60) == os.EX_CONFIG
    assert (tmp_path / "log").read_text() == f"docker-registry-proxy: {expected}\n"


def test_watchdog_and_stopping_notifications(unit: SystemdUnit, listening_socket: socket.socket) -> None:
    unit.start({"proxy": listening_socket}, WATCHDOG_USEC="1000000")
    messages = [unit.next_notification() for _ in range(3)]
    assert re.fullmatch(r"(READY=1\nSTATUS=[^\n]*|WATCHDOG=1| )+", " ".join(messages))
    assert unit.process is not None
    unit.process.terminate()
    while not (message := unit.next_notification()).startswith("STOPPING=1"):
        assert message == "WATCHDOG=1"
    assert unit.process.wait(60) in (0, -signal.SIGTERM)
