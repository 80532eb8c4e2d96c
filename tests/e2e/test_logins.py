"""Logins of the administrator's that serve clients without one: beside other schemes, ended, and from helpers."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import images
from tests.e2e.harness.client_factory import ClientFactory
from tests.e2e.harness.daemon import StartDaemon, TwistdDaemon
from tests.e2e.harness.http_client import BufferedResponse, request_directly
from tests.e2e.harness.images import ACCEPT_MANIFESTS
from tests.e2e.harness.login_registry import BASIC_CHALLENGE, LoginRegistry
from tests.e2e.harness.process import wait_until
from tests.e2e.harness.upstreams import Upstreams, format_upstream_addresses

HOST = "login.test"
USER, PASSWORD = "robot", "pw-of-the-robot-5150"
IMAGES = {name: images.build_small_image(f"login-{name}") for name in ("private", "public")}
PRIVATE, PUBLIC = (
    [f"{name}/app/manifests/1", f"{name}/app/blobs/{image.layers[0].digest}"] for name, image in IMAGES.items()
)


@pytest.fixture(scope="module")
def registry(upstreams: Upstreams) -> Iterator[LoginRegistry]:
    registry = LoginRegistry(upstreams.ca.leaf(HOST, "*.login.test").server_context(), USER, PASSWORD)
    for name, image in IMAGES.items():
        registry.put(f"{name}/app", "1", image)
    registry.start()
    yield registry
    registry.stop()


@pytest.fixture
def settings(upstreams: Upstreams, registry: LoginRegistry) -> dict[str, str]:
    """The settings with which the daemon reaches the registry under its names, without a login."""
    registry.reset()
    registry.password = PASSWORD
    names = (HOST, "one.login.test", "two.login.test")
    addresses = {f"{name}:443": registry.port for name in names}
    upstream_addresses = f"{upstreams.settings['UPSTREAM_ADDRESSES']} {format_upstream_addresses(addresses)}"
    return {"REGISTRIES": HOST, "UPSTREAM_ADDRESSES": upstream_addresses}


@pytest.mark.slow
@pytest.mark.parametrize(
    "challenges",
    [["Negotiate", "NTLM", BASIC_CHALLENGE], [f"{BASIC_CHALLENGE}, nEGOTIATE"]],
    ids=["lines", "one line"],
)
def test_basic_beside_other_schemes(
    start_daemon: StartDaemon,
    clients: ClientFactory,
    registry: LoginRegistry,
    settings: dict[str, str],
    challenges: list[str],
) -> None:
    """skopeo and podman also send an empty login, which is none."""
    registry.challenges = challenges
    daemon = start_daemon(**settings, AUTH_REGISTRIES=f"{HOST}:{USER}:{PASSWORD}")
    clients.skopeo(daemon).pull(f"{HOST}/private/app:1")
    assert clients.podman(daemon).run("pull", f"{HOST}/private/app:1").returncode == 0
    clients.docker(daemon).run_checked("pull", f"{HOST}/private/app:1")
    for empty in ("Basic Og==", "Basic Og", "basic  Og==", "Basic"):
        assert daemon.client.get(f"https://{HOST}/v2/", Authorization=empty).status == 200
        response = daemon.client.get(f"https://{HOST}/v2/private/app/tags/list", Authorization=empty)
        assert response.status != 401, empty


@pytest.mark.parametrize("status", [401, 403])
def test_an_ended_login(
    start_daemon: StartDaemon, registry: LoginRegistry, settings: dict[str, str], status: int
) -> None:
    """Public images go on, private ones are refused with the reason, and each process says nothing twice."""
    daemon = start_daemon(**settings, WORKERS="2", AUTH_REGISTRIES=f"{HOST}:{USER}:{PASSWORD}")
    assert [_get(daemon, path).status for path in PUBLIC + PRIVATE] == [200] * 4
    registry.requests.clear()
    registry.password = "pw-another-one-77"
    registry.refusal_status = status
    registry.public.add("public/app")
    for _ in range(4):  # by both processes
        assert [_get(daemon, path).status for path in PUBLIC] == [200, 200]
        for path in PRIVATE:
            response = _get(daemon, path)
            assert response.status == 401
            assert (
                f"the login for {HOST} in AUTH_REGISTRIES is refused ({HOST} answered {status})"
                in response.body.decode()
            )
            assert PASSWORD.encode() not in response.body
    assert daemon.output_text.count(f"THE LOGIN FOR {HOST} IN AUTH_REGISTRIES IS REFUSED") == 1
    refused = [request for request in registry.requests if "authorization" in request.headers]
    assert len(refused) < 15  # the first requests of each process, and one question about the login
    for command, exit_status in (("status", 1), ("debug", 0)):  # `status` says that something is bad
        text = _run_command(daemon, command, exit_status)
        assert f"login for {HOST} (AUTH_REGISTRIES) refused since" in text
        assert PASSWORD not in text
    daemon.check_log([PASSWORD])


@pytest.fixture
def helper(tmp_path: Path, registry: LoginRegistry) -> HelperScript:
    return HelperScript(tmp_path / "helpers", registry)


class HelperScript:
    """A credential helper ``docker-credential-test``, which knows the registry's password of the moment."""

    def __init__(self, folder: Path, registry: LoginRegistry) -> None:
        folder.mkdir()
        self._registry = registry
        self._password_file = folder / "password"
        self._runs_file = folder / "runs"
        self.path = f"{folder}:{os.environ['PATH']}"
        self.user = USER
        self.change_password(PASSWORD)
        self.write_answer()

    def write_answer(self) -> None:
        """Make the helper answer with the user and the password."""
        answer = f'{{"ServerURL":"%s","Username":"{self.user}","Secret":"%s"}}'
        self.write(
            f"server=$(cat); echo $server >>{self._runs_file}\nprintf '{answer}' $server $(cat {self._password_file})"
        )

    def write(self, text: str) -> None:
        """Replace the shell script."""
        file = Path(self.path.partition(":")[0]) / "docker-credential-test"
        file.write_text(f"#!/bin/sh\n{text}\n")
        file.chmod(0o755)

    def change_password(self, password: str) -> None:
        self._password_file.write_text(password)
        self._registry.password = password

    @property
    def runs(self) -> list[str]:
        """The servers that it was asked for."""
        return self._runs_file.read_text().split() if self._runs_file.exists() else []


@pytest.mark.slow
@pytest.mark.parametrize("source", ["CREDENTIAL_HELPERS", "wildcard", "credHelpers", "credsStore"])
def test_clients_pull_with_the_login_of_a_helper(
    start_daemon: StartDaemon, clients: ClientFactory, settings: dict[str, str], helper: HelperScript, tmp_path: Path,
    source: str,
) -> None:  # fmt: skip
    config_file = tmp_path / "config.json"
    config_file.write_text(
        json.dumps({"credsStore": "test"} if source == "credsStore" else {"credHelpers": {HOST: "test"}})
    )
    settings |= {
        "CREDENTIAL_HELPERS": {"CREDENTIAL_HELPERS": f"{HOST}:test"},
        "wildcard": {"CREDENTIAL_HELPERS": "*.login.test:test", "REGISTRIES": "*.login.test"},
    }.get(source, {"DOCKER_CONFIG_FILE": str(config_file)})
    host = "one.login.test" if source == "wildcard" else HOST
    daemon = start_daemon(**settings, WORKERS="2", PATH=helper.path)
    clients.skopeo(daemon).pull(f"{host}/private/app:1")
    clients.docker(daemon).run_checked("pull", f"{host}/private/app:1")
    assert clients.podman(daemon).run("pull", f"{host}/private/app:1").returncode == 0
    assert helper.runs.count(host) == 1  # for all processes
    assert set(helper.runs) <= {host, "https://index.docker.io/v1/"}
    daemon.check_log([PASSWORD])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["password", "identity token"])
def test_docker_hub_with_the_login_of_a_helper(
    start_daemon: StartDaemon, clients: ClientFactory, upstreams: Upstreams, helper: HelperScript, kind: str
) -> None:
    """It has docker's name for helpers, and a token server. An identity token that ends is renewed."""
    name = f"alice/helper-{kind.partition(' ')[0]}"
    upstreams.push_to_hub(name, "1", images.build_small_image(name, oci=False), owners={"alice"})
    helper.user, password = "alice", upstreams.users["alice"]
    if kind == "identity token":
        helper.user, password = "<token>", "identity-token-0815"
        upstreams.token_server.identity_tokens[password] = "alice"
    helper.write_answer()
    helper.change_password(password)
    daemon = start_daemon(WORKERS="2", PATH=helper.path, CREDENTIAL_HELPERS="https://index.docker.io/v1/:test")
    clients.docker(daemon).run_checked("pull", f"{name}:1")
    clients.skopeo(daemon).pull(f"docker.io/{name}:1")
    assert set(helper.runs) == {"https://index.docker.io/v1/"}
    if kind == "identity token":
        del upstreams.token_server.identity_tokens[password]
        upstreams.token_server.identity_tokens["identity-token-4711"] = "alice"
        helper.change_password("identity-token-4711")
        other = f"{name}-other"
        upstreams.push_to_hub(other, "1", images.build_small_image(other), owners={"alice"})
        clients.skopeo(daemon).pull(f"docker.io/{other}:1")
        daemon.check_log(["identity-token-0815", "identity-token-4711"])


@pytest.mark.slow
def test_an_ended_login_of_docker_hub(start_daemon: StartDaemon, clients: ClientFactory, upstreams: Upstreams) -> None:
    """Its token server refuses it. Public images go on with real clients, cold and cached."""
    upstreams.push_to_hub("library/goes-on", "1", images.build_small_image("goes-on", oci=False))
    upstreams.push_to_hub("alice/ended", "1", images.build_small_image("ended", oci=False), owners={"alice"})
    daemon = start_daemon(WORKERS="2", AUTH_REGISTRIES="auth.docker.io:alice:pw-that-has-ended")
    docker = clients.docker(daemon)
    for _ in ("cold", "cached"):
        docker.run_checked("pull", "goes-on:1")
        clients.skopeo(daemon).pull("docker.io/library/goes-on:1")
        docker.remove_all_images()
    private = clients.skopeo(daemon).try_pull("docker.io/alice/ended:1")
    assert private.returncode != 0
    assert "the login for registry-1.docker.io in AUTH_REGISTRIES is refused" in private.stderr
    assert docker.run("pull", "alice/ended:1").returncode != 0
    assert daemon.output_text.count("THE LOGIN FOR registry-1.docker.io IN AUTH_REGISTRIES IS REFUSED") == 1
    daemon.check_log(["pw-that-has-ended"])


def test_a_password_that_changes_all_the_time(
    start_daemon: StartDaemon, registry: LoginRegistry, settings: dict[str, str], helper: HelperScript
) -> None:
    """Like ECR with tokens of a few requests: no request fails, cold or cached, and the helper is asked when needed."""
    daemon = start_daemon(**settings, WORKERS="2", PATH=helper.path, CREDENTIAL_HELPERS=f"{HOST}:test")
    passwords = [PASSWORD]

    def count_down() -> None:
        countdown.pop()
        if not countdown:
            passwords.append(f"pw-of-the-robot-{len(passwords)}")
            helper.change_password(passwords[-1])
            countdown.extend(range(5))

    countdown = list(range(5))
    registry.on_login = count_down
    for status in (401, 403):
        registry.refusal_status = status
        for _ in range(15):
            assert [_get(daemon, path).status for path in PRIVATE] == [200, 200]
            assert _get(daemon, "private/app/manifests/none").status == 404
    assert len(passwords) > 5
    assert len(helper.runs) <= len(passwords) + 2
    assert "IS REFUSED" not in daemon.output_text
    daemon.check_log(passwords)


@pytest.mark.parametrize(
    ("script", "log_text"),
    [
        ("exit 1", "docker-credential-test failed (exit status 1); login.test is used without a login"),
        ("echo no cloud here; exit 1", "docker-credential-test failed (exit status 1): no cloud here"),
        ("echo garbage", "docker-credential-test printed something else than JSON"),
        ("yes", "docker-credential-test printed more than 65536 bytes and was killed"),
        ("echo credentials not found in native keychain; exit 1", ""),
        (None, "CREDENTIAL_HELPERS: there is no program docker-credential-test in PATH"),
    ],
    ids=["fails", "says why", "garbage", "floods", "not found", "not there"],
)
def test_a_helper_without_a_login(
    start_daemon: StartDaemon, registry: LoginRegistry, settings: dict[str, str], helper: HelperScript,
    script: str | None, log_text: str,
) -> None:  # fmt: skip
    """The registry is used without a login, and what is public is pulled."""
    registry.public.add("public/app")
    if script is None:
        helper.path = os.environ["PATH"]
    else:
        helper.write(script)
    daemon = start_daemon(**settings, PATH=helper.path, CREDENTIAL_HELPERS=f"{HOST}:test")
    for _ in range(2):
        assert [_get(daemon, path).status for path in PUBLIC] == [200, 200]
        assert [_get(daemon, path).status for path in PRIVATE] == [401, 401]
    assert log_text in daemon.output_text


def test_docker_config_file(
    start_daemon: StartDaemon, registry: LoginRegistry, settings: dict[str, str], tmp_path: Path
) -> None:
    """It is read at the start and at a reload; a broken one changes nothing, and stops a start."""
    file = tmp_path / "config.json"

    def write(password: str, mode: int = 0o600) -> None:
        auth = base64.b64encode(f"{USER}:{password}".encode()).decode()
        file.write_text(json.dumps({"auths": {f"https://{HOST}/v2/": {"auth": auth}, "quay.io/org": {"auth": auth}}}))
        file.chmod(mode)

    write(PASSWORD, 0o644)
    daemon = start_daemon(**settings, WORKERS="2", DOCKER_CONFIG_FILE=str(file))
    assert [_get(daemon, path).status for path in PRIVATE] == [200, 200]
    assert f"every local user can read {file}, which DOCKER_CONFIG_FILE names" in daemon.output_text
    assert "its entry 'quay.io/org' is not used" in daemon.output_text
    registry.password = "pw-number-two-42"
    assert _get(daemon, PRIVATE[0]).status == 401
    assert f"THE LOGIN FOR {HOST} IN DOCKER_CONFIG_FILE IS REFUSED" in daemon.output_text
    write(registry.password)
    _reload(daemon, "reloaded: ")
    assert [_get(daemon, path).status for path in PRIVATE * 2] == [200] * 4
    file.write_text("{")
    _reload(daemon, f"not reloaded, the settings are unchanged: DOCKER_CONFIG_FILE: {file} is not JSON")
    assert [_get(daemon, path).status for path in PRIVATE * 2] == [200] * 4
    daemon.check_log([PASSWORD, registry.password])


def _reload(daemon: TwistdDaemon, text: str) -> None:
    offset = daemon.log_offset()
    daemon.send_signal(signal.SIGHUP)
    wait_until(lambda: text in daemon.output_text[offset:], f"the log has {text!r}")


def test_wildcards(
    start_daemon: StartDaemon, clients: ClientFactory, registry: LoginRegistry, settings: dict[str, str]
) -> None:
    """A wildcard covers exactly one label: such hosts are intercepted, mirrored, and get its login."""
    settings["REGISTRIES"] = "*.login.test http://plain.test:8080"
    daemon = start_daemon(**settings, AUTH_REGISTRIES=f"*.login.test:{USER}:{PASSWORD}")
    for host in ("one.login.test", "two.login.test"):
        clients.skopeo(daemon).pull(f"{host}/private/app:1")
        for url in (f"{daemon.url}/v2/{host}/{PRIVATE[0]}", f"{daemon.url}/v2/{PRIVATE[0]}?ns={host}"):
            response = request_directly("GET", url, {"Accept": ACCEPT_MANIFESTS})
            assert (response.status, response.body) == (200, IMAGES["private"].manifest.data)
    containerd = clients.containerd()
    containerd.configure_host("_default", f'[host."{daemon.url}"]\n  capabilities = ["pull", "resolve"]\n')
    for host in ("one.login.test", "two.login.test"):
        containerd.pull(f"{host}/private/app:1")
    registry.requests.clear()
    response = daemon.client.get(f"https://one.login.test/v2/{PRIVATE[1]}")
    assert (response.status, response.headers["x-cache"], registry.requests) == (200, "HIT", [])
    certificates = set()
    for host in ("one.login.test", "two.login.test"):
        connection = daemon.client.new_connection(f"https://{host}/")
        connection.connect()
        certificates.add(connection.sock.getpeercert(binary_form=True))
        connection.close()
    assert len(certificates) == 1  # nothing is made for a host that a client names
    for host in (HOST, "a.one.login.test", "login.test.example"):
        assert request_directly("GET", f"{daemon.url}/v2/{host}/{PRIVATE[0]}").status == 404
    assert daemon.client.get("https://no-such-name.login.test/v2/").status == 502
    assert not list((daemon.state_folder / "cache").rglob("*no-such-name*"))
    assert "serving" in daemon.output_text and "*.login.test" in daemon.output_text


def test_rules_for_hosts_that_a_wildcard_covers(start_daemon: StartDaemon) -> None:
    """TUNNEL_DENY applies, because a client chooses them. The name of the hosted registry is never covered."""
    daemon = start_daemon(
        REGISTRIES="*.wild.test listed.wild.test",
        REGISTRY_HOSTNAME="own.wild.test",
        TUNNEL_ALLOW="none",
        TUNNEL_DENY="denied.wild.test listed.wild.test",
        UPSTREAM_PROXY="http://127.0.0.1:9",
    )
    denied = daemon.client.get("https://denied.wild.test/v2/app/manifests/1")
    assert denied.status == 403
    assert b"TUNNEL_DENY (denied.wild.test)" in denied.body
    for host in ("other.wild.test", "listed.wild.test"):
        assert daemon.client.get(f"https://{host}/v2/app/manifests/1").status == 502
    assert daemon.client.get("https://own.wild.test/v2/").status == 200


def _run_command(daemon: TwistdDaemon, command: str, exit_status: int = 0) -> str:
    """Return the output of the command. It must end with `exit_status`."""
    socket = str(daemon.state_folder / "run/control.sock")
    argv = [sys.executable, "-m", "dockerproxy.cli", command, "--socket", socket]
    completed = subprocess.run(argv, env=daemon.environment, capture_output=True, text=True, timeout=60)
    assert completed.returncode == exit_status, completed.stderr
    return completed.stdout


def _get(daemon: TwistdDaemon, path: str) -> BufferedResponse:
    return daemon.client.get(f"https://{HOST}/v2/{path}", Accept=ACCEPT_MANIFESTS)
