"""The actions of the page: the store that each works on."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred

from dockerproxy.admin.image_actions import ImageActions
from dockerproxy.registry.principal import Principal

ALICE = Principal("alice", "192.0.2.1", None)


class OperationsStub:
    """Records the operations."""

    current = None

    def __init__(self) -> None:
        self.started: list[tuple[str, Any]] = []

    async def run(self, principal: Principal, name: str, options: Any, on_event: Any) -> dict[str, Any]:
        self.started.append((name, options))
        return {}


def collect(operations: OperationsStub, root: str) -> str:
    return act(operations, root, "gc")


def act(operations: OperationsStub, root: str, action: str, name: str = "", where: str = "") -> str:
    unused: Any = None
    running: Any = operations
    actions = ImageActions(unused, unused, unused, running, unused, root, unused)
    results: list[Any] = []
    Deferred.fromCoroutine(actions.act(ALICE, action, name, where)).addCallbacks(
        results.append, lambda failure: results.append(failure.value)
    )
    [result] = results
    if isinstance(result, Exception):
        raise result
    return result


def test_gc_works_on_the_directory() -> None:
    operations = OperationsStub()
    assert collect(operations, "/srv/registry") == "collecting"
    assert operations.started == [("gc", {"root": "/srv/registry"})]


def test_gc_works_on_the_bucket() -> None:
    operations = OperationsStub()
    assert collect(operations, "s3://images") == "collecting"
    assert operations.started == [("gc", {"root": "s3://images"})]
