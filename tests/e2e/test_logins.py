"""Logins of the administrator's that serve clients without one: beside other schemes, ended, and from helpers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.e2e.harness import images
from tests.e2e.harness.client_factory import ClientFactory
from tests.e2e.harness.daemon import StartDaemon, TwistdDaemon
from tests.e2e.harness.http_client import BufferedResponse, request_directly
from tests.e2e.harness.images import ACCEPT_MANIFESTS
from tests.e2e.harness.login_registry import BASIC_CHALLENGE, LoginRegistry
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
    for command in ("status", "debug"):
        text = _run_command(daemon, command)
        assert f"login for {HOST} (AUTH_REGISTRIES) refused since" in text
        assert PASSWORD not in text
    daemon.check_log([PASSWORD])


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


def _run_command(daemon: TwistdDaemon, command: str) -> str:
    socket = str(daemon.state_folder / "run/control.sock")
    argv = [sys.executable, "-m", "dockerproxy.cli", command, "--socket", socket]
    return subprocess.run(argv, env=daemon.environment, capture_output=True, text=True, check=True, timeout=60).stdout


def _get(daemon: TwistdDaemon, path: str) -> BufferedResponse:
    return daemon.client.get(f"https://{HOST}/v2/{path}", Accept=ACCEPT_MANIFESTS)
