"""Tests of `Operations`: it relays the events of an operation's process, grants it locks, and ends it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ProcessDone, ProcessExitedAlready, ProcessTerminated
from twisted.internet.task import Clock
from twisted.logger import formatEvent, globalLogPublisher
from twisted.python.failure import Failure

from dockerproxy.admin.operations import OperationError, OperationHistory, Operations
from dockerproxy.concurrency import LocalKeyedLock
from dockerproxy.registry.principal import CONTROL_SOCKET, Principal
from dockerproxy.store.records import Records
from tests.support.audit import make_audit_log

ALICE = Principal("alice", CONTROL_SOCKET, None)


class FakeProcess:
    """The transport of a process that does what the test says."""

    def __init__(self, protocol: Any, arguments: list[str], environment: dict[str, str]) -> None:
        self.protocol, self.arguments, self.environment = protocol, arguments, environment
        self.input = b""
        self.input_closed = self.paused = self.ended = False
        self.signals: list[str] = []
        protocol.makeConnection(self)

    def write(self, data: bytes) -> None:
        self.input += data

    def closeStdin(self) -> None:
        self.input_closed = True

    def pauseProducing(self) -> None:
        self.paused = True

    def resumeProducing(self) -> None:
        self.paused = False

    def signalProcess(self, name: str) -> None:
        if self.ended:
            raise ProcessExitedAlready
        self.signals.append(name)

    def send(self, *events: dict[str, Any]) -> None:
        assert not self.paused
        self.protocol.outReceived(b"".join(json.dumps(event).encode() + b"\n" for event in events))

    def end(self, *, exit_code: int | None = 0, signal: int | None = None) -> None:
        self.ended = True
        done = exit_code == 0 and signal is None
        self.protocol.processEnded(Failure(ProcessDone(0) if done else ProcessTerminated(exit_code, signal)))


class ProcessReactor(Clock):
    def __init__(self) -> None:
        super().__init__()
        self.processes: list[FakeProcess] = []
        self.error: OSError | None = None

    def spawnProcess(self, protocol: Any, executable: str, arguments: list[str], environment: dict[str, str]) -> None:
        assert executable == arguments[0] == sys.executable
        if self.error is not None:
            raise self.error
        self.processes.append(FakeProcess(protocol, arguments, environment))


class Harness:
    """Starts operations. `hook`, if set, must fire before the next event is relayed."""

    def __init__(self, folder: Path) -> None:
        self.reactor, self.locks = ProcessReactor(), LocalKeyedLock()
        self.audit, self.recorded = make_audit_log()
        self.history = OperationHistory(Records(folder / "records"))
        self.operations = Operations(self.reactor, self.locks, self.audit, lambda: 1234.5, self.history)
        self.events: list[dict[str, Any]] = []
        self.hook: Deferred[None] | None = None

    async def on_event(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        if self.hook is not None:
            await self.hook

    def start(self, name: str = "gc", **options: Any) -> tuple[Deferred[Any], list[Any]]:
        outcomes: list[Any] = []
        job = Deferred.fromCoroutine(self.operations.run(ALICE, name, options, self.on_event))
        job.addBoth(outcomes.append)
        return job, outcomes

    @property
    def process(self) -> FakeProcess:
        return self.reactor.processes[-1]


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    return Harness(tmp_path)


PROGRESS = {"event": "progress", "phase": "mark", "done": 1, "total": None}
RESULT = {"event": "result", "blobs": 3}


def test_events_and_the_result_are_relayed(harness: Harness) -> None:
    _, outcomes = harness.start(root="/srv", dry_run=True)
    assert harness.process.arguments[1:4] == ["-m", "dockerproxy.operations", "gc"]
    assert json.loads(harness.process.arguments[4]) == {"root": "/srv", "dry_run": True}
    assert harness.process.environment["PYTHONPATH"] == os.pathsep.join(filter(None, sys.path))
    assert harness.operations.current == {"name": "gc", "user": "alice", "since": 1234.5}
    item = {"event": "removed", "kind": "blob"}
    harness.process.send(PROGRESS, item)
    assert harness.events == [PROGRESS, item]
    harness.process.send(RESULT)
    assert not outcomes and harness.process.input_closed
    harness.process.end()
    assert outcomes == [{"blobs": 3}]
    assert harness.operations.current is None
    assert not harness.reactor.getDelayedCalls()


def test_an_operation_on_a_bucket_has_a_process_of_its_own(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets the settings by its environment, because all users may read the arguments of a process."""
    monkeypatch.setattr(
        harness.operations, "_variables", {"UPSTREAM_PROXY": "http://user:secret@proxy", "PYTHONPATH": "x"}
    )
    harness.start(root="s3://images/site")
    assert harness.process.arguments[1:4] == ["-m", "dockerproxy.bucket_operations", "gc"]
    assert harness.process.environment["UPSTREAM_PROXY"] == "http://user:secret@proxy"
    assert harness.process.environment["PYTHONPATH"] == os.pathsep.join(filter(None, sys.path))
    assert "secret" not in str(harness.process.arguments)
    harness.process.end()
    assert harness.recorded[-1]["target"] == "s3://images/site"
    harness.start(root="/srv")
    assert harness.process.environment.get("UPSTREAM_PROXY") is None
    harness.process.end()


def test_the_log_names_the_user(harness: Harness) -> None:
    logged: list[Any] = []
    globalLogPublisher.addObserver(logged.append)
    try:
        harness.start("import")
        harness.process.end()
    finally:
        globalLogPublisher.removeObserver(logged.append)
    lines = [formatEvent(event) for event in logged]
    assert lines[0] == "alice at the control socket started import"
    assert lines[-1] == "import of alice at the control socket ended"


def test_operations_are_recorded(harness: Harness) -> None:
    harness.start(root="/registry", delete_untagged=True)
    harness.process.send({"event": "result"})
    harness.process.end()
    harness.start("import", directory="/old")
    harness.process.send({"event": "error", "code": "NOT_UNDERSTOOD", "message": "no"})
    harness.process.end()
    assert [(entry["user"], entry["action"], entry["target"], entry["result"]) for entry in harness.recorded] == [
        ("alice", "gc", "/registry", "done"),
        ("alice", "import", "/old", "failed: no"),
    ]
    assert harness.recorded[0]["detail"] == "delete_untagged"


def test_the_last_end_without_a_problem_is_remembered(tmp_path: Path) -> None:
    history = OperationHistory(Records(tmp_path / "records"))
    assert history.last_successes() == {}
    history.record("check", {}, 100.0, 3)
    assert history.last_successes() == {}
    history.record("check", {}, 200.0, 0)
    history.record("check", {"links": False}, 250.0, 0)
    history.record("gc", {"dry_run": True}, 260.0, 0)
    history.record("import", {}, 270.0, 0)
    history.record("check", {}, 300.0, 1)
    assert history.last_runs()["check"]["at"] == 300.0
    assert history.last_successes() == {"check": 200.0, "check of the cache": 250.0}
    again = OperationHistory(Records(tmp_path / "records"))  # of another process
    assert again.last_successes() == history.last_successes()


@pytest.mark.parametrize("well_at", ["yesterday", None, [1]], ids=["text", "null", "list"])
def test_a_damaged_record_of_an_end_says_nothing(tmp_path: Path, well_at: object) -> None:
    records = Records(tmp_path / "records")
    records.put({"at": 1.0, "problems": 0, "well_at": well_at}, "maintenance", "gc")
    assert OperationHistory(records).last_successes() == {}


def test_lines_may_arrive_in_pieces(harness: Harness) -> None:
    _, outcomes = harness.start()
    for byte in json.dumps(PROGRESS).encode() + b"\n" + json.dumps(RESULT).encode() + b"\n":
        harness.process.protocol.outReceived(bytes([byte]))
    harness.process.end()
    assert (harness.events, outcomes) == ([PROGRESS], [{"blobs": 3}])


def test_no_output_is_read_while_the_client_does_not_read(harness: Harness) -> None:
    _, outcomes = harness.start()
    harness.hook = Deferred()
    harness.process.send(PROGRESS, PROGRESS, RESULT)
    assert harness.process.paused and len(harness.events) == 1
    hook, harness.hook = harness.hook, None
    hook.callback(None)
    assert len(harness.events) == 2
    harness.process.end()
    assert outcomes == [{"blobs": 3}]


def test_a_too_long_line_ends_the_process(harness: Harness) -> None:
    _, outcomes = harness.start()
    for _ in range(100):
        harness.process.protocol.outReceived(b"x" * 100_000)
        if harness.process.signals:
            break
    assert harness.process.signals == ["KILL"]
    harness.process.end(exit_code=None, signal=9)
    assert "killed by signal 9" in outcomes[0].value.message


def test_locks(harness: Harness) -> None:
    """The process waits for a lock that a request holds, and a request waits for the process."""
    request_lock = harness.locks.hold("library/tiny")
    Deferred.fromCoroutine(request_lock.__aenter__())
    _, outcomes = harness.start()
    lock = {"event": "lock", "repository": "library/tiny"}
    harness.process.send(lock)
    assert harness.process.input == b""
    Deferred.fromCoroutine(request_lock.__aexit__(None, None, None))
    assert harness.process.input == b"\n"
    waiting = Deferred.fromCoroutine(harness.locks.hold("library/tiny").__aenter__())
    assert not waiting.called
    harness.process.send({"event": "unlock"}, PROGRESS)
    assert waiting.called
    other = {"event": "lock", "repository": "other"}
    harness.process.send(other)
    assert harness.process.input == b"\n\n"
    harness.process.send({"event": "unlock"}, RESULT)
    harness.process.end()
    assert outcomes == [{"blobs": 3}] and harness.events == [PROGRESS]


def test_a_lock_is_released_when_the_process_has_ended(harness: Harness) -> None:
    job, outcomes = harness.start()
    harness.process.send({"event": "lock", "repository": "library/tiny"})
    waiting = Deferred.fromCoroutine(harness.locks.hold("library/tiny").__aenter__())
    job.cancel()
    assert not waiting.called, "the process may still work"
    harness.process.end()
    assert waiting.called
    assert outcomes[0].check(CancelledError)


def test_only_one_operation_runs_at_a_time(harness: Harness) -> None:
    job, _ = harness.start("check")
    _, outcomes = harness.start("gc")
    assert (outcomes[0].value.code, len(harness.reactor.processes)) == ("BUSY", 1)
    assert "check of alice is running" in outcomes[0].value.message
    job.cancel()
    _, outcomes = harness.start("gc")
    assert outcomes[0].value.code == "BUSY", "the first has not ended yet"
    harness.process.end()
    _, outcomes = harness.start("gc")
    assert len(harness.reactor.processes) == 2
    harness.process.end()
    assert outcomes[0].value.code == "FAILED"


def test_errors_of_the_operation(harness: Harness) -> None:
    _, outcomes = harness.start()
    harness.process.send({"event": "error", "code": "DISK", "message": "the disk is full"})
    harness.process.end()
    assert outcomes[0].check(OperationError)
    assert (outcomes[0].value.code, outcomes[0].value.message) == ("DISK", "the disk is full")


@pytest.mark.parametrize(
    ("exit_code", "signal", "reason"),
    [(1, None, "exit status 1"), (None, 9, "killed by signal 9"), (0, None, "exit status 0")],
)
def test_a_crash_is_an_error_and_logged(
    harness: Harness, exit_code: int | None, signal: int | None, reason: str
) -> None:
    logged: list[Any] = []
    globalLogPublisher.addObserver(logged.append)
    try:
        _, outcomes = harness.start()
        harness.process.protocol.errReceived(b"x" * 100_000 + b"ZeroDivisionError: division by zero\n")
        harness.process.send(PROGRESS)
        harness.process.end(exit_code=exit_code, signal=signal)
    finally:
        globalLogPublisher.removeObserver(logged.append)
    assert outcomes[0].value.code == "FAILED"
    assert outcomes[0].value.message == f"the process of gc failed ({reason}); see the daemon's log"
    output = next(event["output"] for event in logged if "output" in event)
    assert output.endswith("ZeroDivisionError: division by zero") and len(output) < 10_000
    assert harness.operations.current is None


def test_the_process_cannot_be_started(harness: Harness) -> None:
    harness.reactor.error = OSError(11, "Resource temporarily unavailable")
    _, outcomes = harness.start()
    assert outcomes[0].value.message == "the process of gc cannot be started: Resource temporarily unavailable"
    assert harness.operations.current is None


@pytest.mark.parametrize("moment", ["reading", "relaying", "locking"])
def test_cancellation_stops_the_process(harness: Harness, moment: str) -> None:
    job, outcomes = harness.start()
    if moment == "relaying":
        harness.hook = Deferred()
        harness.process.send(PROGRESS, PROGRESS)
    elif moment == "locking":
        Deferred.fromCoroutine(harness.locks.hold("tiny").__aenter__())
        harness.process.send({"event": "lock", "repository": "tiny"})
    job.cancel()
    assert harness.process.input_closed and not harness.process.paused
    harness.process.send(PROGRESS)  # its pipe must not fill while it ends
    assert not outcomes and not harness.process.signals
    harness.reactor.advance(11)
    assert harness.process.signals == ["KILL"]
    harness.process.end(exit_code=None, signal=9)
    assert outcomes[0].check(CancelledError)
    assert len(harness.events) == (moment == "relaying")


def test_the_service_stops_after_the_operation(harness: Harness) -> None:
    assert harness.operations.stopService() is None
    job, _ = harness.start()
    stopped = harness.operations.stopService()
    assert stopped is not None and not stopped.called
    job.cancel()
    harness.process.end()
    assert stopped.called
