from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred

from dockerproxy.cache.best_effort import try_link, try_put, try_remove
from dockerproxy.store.records import Records
from tests.cache.support.harness import result
from tests.cache.support.reactor import ManualReactor


def test_put_and_remove(tmp_path: Path) -> None:
    records = Records(tmp_path)
    try_put(records, {"x": 1}, "kind", "name", "more")
    assert records.get("kind", "name", "more") == {"x": 1}
    try_remove(records, "kind", "name", "more")
    try_remove(records, "kind", "name", "more")
    assert records.get("kind", "name", "more") is None


def test_full_disk_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_lines: list[str]) -> None:
    def fail(*args: Any) -> None:
        raise OSError(28, os.strerror(28))

    records, reactor = Records(tmp_path), ManualReactor()
    monkeypatch.setattr(Records, "put", fail)
    monkeypatch.setattr(Records, "remove", fail)
    try_put(records, {"x": 1}, "access", "host/name")
    try_remove(records, "client", "host", "own:0123")
    result(Deferred.fromCoroutine(try_link(reactor, fail, "host/name", "x")), reactor)
    assert [line.partition(": No space left on device")[0] for line in log_lines] == [
        "cannot save the access record of host/name",
        "cannot remove the client record of host",
        "cannot write a link in the repository host/name",
    ]


def test_internal_error_is_raised(tmp_path: Path) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("a bug in this program")

    reactor = ManualReactor()
    with pytest.raises(RuntimeError):
        result(Deferred.fromCoroutine(try_link(reactor, fail, "host/name")), reactor)
