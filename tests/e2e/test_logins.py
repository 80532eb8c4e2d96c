"""Logins of the administrator's that serve clients without one: beside other schemes, ended, and from helpers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.harness import images
from tests.e2e.harness.client_factory import ClientFactory
from tests.e2e.harness.daemon import StartDaemon
from tests.e2e.harness.login_registry import BASIC_CHALLENGE, LoginRegistry
from tests.e2e.harness.upstreams import Upstreams, format_upstream_addresses

HOST = "login.test"
USER, PASSWORD = "robot", "pw-of-the-robot-5150"


@pytest.fixture(scope="module")
def registry(upstreams: Upstreams) -> Iterator[LoginRegistry]:
    registry = LoginRegistry(upstreams.ca.leaf(HOST, "*.login.test").server_context(), USER, PASSWORD)
    registry.put("private/app", "1", images.build_small_image("login-private"))
    registry.put("public/app", "1", images.build_small_image("login-public"))
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
