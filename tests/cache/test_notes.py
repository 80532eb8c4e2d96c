from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred

from dockerproxy.cache.notes import forget, note_link, remember
from dockerproxy.store.records import Records
from tests.cache.stand_ins.reactor import Reactor
from tests.cache.stand_ins.world import result


def test_remembered_and_forgotten(tmp_path: Path) -> None:
    records = Records(tmp_path)
    remember(records, {"x": 1}, "kind", "name", "more")
    assert records.get("kind", "name", "more") == {"x": 1}
    forget(records, "kind", "name", "more")
    forget(records, "kind", "name", "more")
    assert records.get("kind", "name", "more") is None


def test_a_disk_that_is_full_is_complained_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    def fail(*args: Any) -> None:
        raise OSError(28, os.strerror(28))

    records, reactor = Records(tmp_path), Reactor()
    monkeypatch.setattr(Records, "put", fail)
    monkeypatch.setattr(Records, "remove", fail)
    remember(records, {"x": 1}, "access", "host/name")
    forget(records, "client", "host", "own:0123")
    result(Deferred.fromCoroutine(note_link(reactor, fail, "host/name", "x")), reactor)
    assert [line.partition(": No space left on device")[0] for line in logged] == [
        "access of host/name is not remembered",
        "client of host is not forgotten",
        "host/name is not linked to its content",
    ]


def test_a_mistake_is_not_swallowed(tmp_path: Path) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("a mistake in this program")

    reactor = Reactor()
    with pytest.raises(RuntimeError):
        result(Deferred.fromCoroutine(note_link(reactor, fail, "host/name")), reactor)
