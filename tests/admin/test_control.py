"""Tests of `Control`: the local user that sent a command is the principal of the operation."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.logger import LogEvent, formatEvent, globalLogPublisher

from dockerproxy.admin.control import Control, local_user_name
from dockerproxy.admin.deletion import Deleter
from dockerproxy.admin.ndjson import NDJSONResponse
from dockerproxy.admin.operations import Event
from dockerproxy.admin.resolver import CACHED, HOSTED, ImageResolver, StoreView
from dockerproxy.http.request import Request
from dockerproxy.registry.audit import AuditLog
from dockerproxy.registry.hosted_rules import HostedRules
from dockerproxy.registry.principal import CONTROL_SOCKET, Principal
from dockerproxy.store.disk_access import LocalDisk
from dockerproxy.store.hosted_tree import HostedTree
from dockerproxy.store.layout import Layout
from dockerproxy.store.records import Records
from tests.registry.support.synchronous_reactor import SynchronousReactor
from tests.store.support.images import BOTH, put_image
from tests.support.hosted import make_hosted_store


class OperationsStub:
    """Records the operations and their principals."""

    current = None

    def __init__(self) -> None:
        self.started: list[tuple[Principal, str]] = []

    async def run(self, principal: Principal, name: str, options: Any, on_event: Any) -> Event:
        self.started.append((principal, name))
        return {}


@pytest.fixture
def operations() -> OperationsStub:
    return OperationsStub()


class SpaceStub:
    async def purge(self, digests: Any) -> None: ...


class HangingDisk:
    """The directory is on a machine that does not answer."""

    async def run(self, function: Any, *args: object) -> Any:
        await Deferred()


async def echo_principal(request: Request, response: NDJSONResponse, principal: Principal) -> None:
    request.respond(200, [], str(principal).encode())


@pytest.fixture
def registry_disk(request: pytest.FixtureRequest) -> Any:
    return getattr(request, "param", None)


@pytest.fixture
def recorded() -> list[Mapping[str, Any]]:
    return []


@pytest.fixture
def client(
    tmp_path: Path,
    operations: OperationsStub,
    connect_client: Any,
    registry_disk: Any,
    recorded: list[Mapping[str, Any]],
) -> Any:
    """A client of a control socket. Its process has the user ID 1000. The user's name is alice."""
    clock = SynchronousReactor()
    tree, cache = HostedTree.from_layout(Layout(tmp_path / "hosted")), Layout(tmp_path / "cache")
    for name in ("one", "two"):
        put_image(tree, name, BOTH, "v1")
    unused: Any = None

    async def user_name(uid: int) -> str:
        return {1000: "alice"}[uid]

    resolver = ImageResolver([StoreView(HOSTED, tree.layout), StoreView(CACHED, cache)], frozenset())
    for number in ("1", "2"):
        put_image(HostedTree.from_layout(cache), f"quay.io/{number}", BOTH, "v1")
    disk, records = registry_disk or LocalDisk(clock), Records(tmp_path / "records")
    space: Any = SpaceStub()
    store, audit = make_hosted_store(clock, tree, disk), AuditLog(recorded.append)
    deleter = Deleter(clock, disk, store, space, records, audit, lambda key, name: False)
    running: Any = operations
    control = Control(
        clock,
        resolver,
        unused,
        deleter,
        running,
        HostedRules(),
        disk,
        unused,
        unused,
        lambda: {"version": "1"},
        user_name,
        clock.seconds,
        {("GET", "/v1/echo"): echo_principal},
    )
    client = connect_client(control.handle, clock=clock, client="-")
    client.transport.peer_uid = 1000
    return client


def logged_lines(client: Any, path: str, arguments: dict[str, Any]) -> list[str]:
    events: list[LogEvent] = []
    globalLogPublisher.addObserver(events.append)
    try:
        response = client.fetch("POST", path, body=json.dumps(arguments).encode())
    finally:
        globalLogPublisher.removeObserver(events.append)
    assert response.status == 200, response.body
    return [formatEvent(event) for event in events]


@pytest.mark.parametrize(
    ("name", "path", "arguments"),
    [
        ("gc", "/v1/collect", {}),
        ("import", "/v1/import", {"directory": "/srv"}),
        ("check", "/v1/check", {}),
        ("check", "/v1/check", {"cached": True}),
    ],
)
def test_the_user_is_the_principal_of_an_operation(
    client: Any, operations: OperationsStub, name: str, path: str, arguments: dict[str, Any]
) -> None:
    logged_lines(client, path, arguments)
    assert operations.started == [(Principal("alice", CONTROL_SOCKET, None), name)]
    assert [request.user for request in client.finished_requests] == ["alice"], "for the access log"


def test_the_log_says_which_user_removed_an_image(client: Any) -> None:
    lines = logged_lines(client, "/v1/remove", {"names": ["one:v1", "two"]})
    assert [line for line in lines if "removed" in line] == [
        "alice at the control socket removed one:v1 (hosted)",
        "alice at the control socket removed two (hosted)",
    ]


def test_removals_are_recorded(client: Any, recorded: list[Mapping[str, Any]]) -> None:
    client.fetch("POST", "/v1/remove", body=json.dumps({"names": ["one:v1", "quay.io/1"]}).encode())
    assert [(entry["user"], entry["from"], entry["action"], entry["target"]) for entry in recorded] == [
        ("alice", "the control socket", "remove", "one:v1 (hosted)"),
        ("alice", "the control socket", "remove", "quay.io/1 (cached)"),
    ]


def test_a_removal_that_fails_is_recorded(
    client: Any, recorded: list[Mapping[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def purge(self: SpaceStub, digests: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(SpaceStub, "purge", purge)
    response = client.fetch("POST", "/v1/remove", body=json.dumps({"names": ["quay.io/1"]}).encode())
    assert response.status == 500
    (entry,) = recorded
    assert entry["action"] == "remove" and entry["result"].startswith("failed: ")


@pytest.mark.parametrize("registry_disk", [HangingDisk()], indirect=True)
@pytest.mark.parametrize("query", ["", "&name=quay.io/1"])
def test_the_cache_is_listed_while_the_registry_hangs(client: Any, query: str) -> None:
    response = client.fetch("GET", f"/v1/repositories?where=cached{query}")
    assert response.status == 200
    assert [json.loads(line)["event"] for line in response.body.splitlines()][-1] == "result"


@pytest.mark.parametrize("registry_disk", [HangingDisk()], indirect=True)
def test_a_cached_image_is_removed_while_the_registry_hangs(client: Any) -> None:
    for status in (200, 404):
        body = json.dumps({"names": ["quay.io/1"], "where": "cached"}).encode()
        assert client.fetch("POST", "/v1/remove", body=body).status == status


def test_the_name_of_a_user() -> None:
    assert local_user_name(0) == "root"
    assert local_user_name(3_999_999_999) == "uid 3999999999"


def test_a_handler_of_another_part_knows_the_user(client: Any) -> None:
    assert client.fetch("GET", "/v1/echo").body == b"alice at the control socket"
    assert client.fetch("POST", "/v1/echo").status == 404


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("", ["one", "two", "quay.io/1", "quay.io/2", "docker.io/library/nginx"]),
        ("?prefix=o", ["one"]),
        ("?prefix=quay.io/&where=cached", ["quay.io/1", "quay.io/2"]),
        ("?prefix=quay.io/&where=hosted", []),
        ("?prefix=ngi", ["nginx"]),
        ("?prefix=docker.io/l", ["docker.io/library/nginx"]),
        ("?prefix=nginx:", ["nginx:1.29", "nginx:latest"]),
        ("?prefix=docker.io/nginx:1", ["docker.io/nginx:1.29"]),
        ("?prefix=absent:", []),
        ("?prefix=:", []),
        ("?prefix=%00", None),
    ],
)
def test_names_for_the_shell(tmp_path: Path, client: Any, query: str, names: list[str] | None) -> None:
    cache = HostedTree.from_layout(Layout(tmp_path / "cache"))
    put_image(cache, "registry-1.docker.io/library/nginx", BOTH, "1.29", "latest")
    response = client.fetch("GET", f"/v1/names{query}")
    if names is None:
        assert response.status == 400
    else:
        assert json.loads(response.body) == {"names": names}


def test_the_number_of_names_has_a_bound(tmp_path: Path, client: Any) -> None:
    cache = HostedTree.from_layout(Layout(tmp_path / "cache"))
    put_image(cache, "quay.io/1", BOTH, *(f"t{number}" for number in range(300)))
    assert len(json.loads(client.fetch("GET", "/v1/names?prefix=quay.io/1:t").body)["names"]) == 200
