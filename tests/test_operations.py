"""Tests of the process of a long operation: its protocol on pipes, its priority and its limits."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

from dockerproxy import operations
from dockerproxy.oci.names import Digest
from dockerproxy.operations import Daemon
from dockerproxy.store.hosted_tree import HostedTree
from dockerproxy.store.layout import Layout
from dockerproxy.store.progress import Stopped
from tests.store.support.images import BOTH, ONE, age_blobs, put_image

ROOT = Path(__file__).parent.parent
REPOSITORY = "library/tiny"


@pytest.fixture
def store(tmp_path: Path) -> HostedTree:
    store = HostedTree.from_layout(Layout(tmp_path))
    put_image(store, REPOSITORY, BOTH, "v1")
    put_image(store, REPOSITORY, ONE)
    store.blobs.put(b"stray", Digest.of(b"stray"))
    age_blobs(store)
    return store


@contextmanager
def start(name: str, store: HostedTree, *, program: str = "", **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Run an operation. `program` is Python code that is executed in its process before it starts."""
    arguments = ["-m", "dockerproxy.operations"]
    if program:
        arguments = ["-c", f"import sys\nfrom dockerproxy import operations\n{program}\noperations.main(sys.argv[1:])"]
    with subprocess.Popen(
        [sys.executable, *arguments, name, json.dumps({"root": str(store.layout.root), **options})],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/", env={"PYTHONPATH": str(ROOT)},
    ) as process:  # fmt: skip
        yield process


def read_events(process: subprocess.Popen[bytes], until: str = "") -> list[dict[str, Any]]:
    """Read events, and grant every lock, until the end or the first event `until`."""
    events: list[dict[str, Any]] = []
    assert process.stdout is not None and process.stdin is not None
    for line in process.stdout:
        events.append(json.loads(line))
        if events[-1]["event"] == until:
            break
        if events[-1]["event"] == "lock":
            process.stdin.write(b"\n")
            process.stdin.flush()
    return events


def test_garbage_collection(store: HostedTree) -> None:
    one_slice = "from dockerproxy.store import progress\nprogress._MAX_LOCK_HOLD = 60"
    with start("gc", store, program=one_slice) as process:
        events = read_events(process)
    names = [event["event"] for event in events]
    assert names[0] == "progress" and names[-1] == "result" and process.returncode == 0
    stray = {"event": "removed", "kind": "blob", "digest": str(Digest.of(b"stray")), "repository": None, "size": 5}
    assert [event for event in events if event["event"] == "removed"] == [stray]
    assert (events[-1]["blobs"], events[-1]["problems"]) == (1, [])
    locks = [event for event in events if event["event"] in ("lock", "unlock")]
    assert locks == [{"event": "lock", "repository": REPOSITORY}, {"event": "unlock"}]


def test_import_and_check(store: HostedTree, tmp_path: Path) -> None:
    other = HostedTree.from_layout(Layout(tmp_path / "other"))
    with start("import", other, directory=str(store.layout.root)) as process:
        assert read_events(process)[-1]["tags"] == 1
    Path(other.layout.blob(Digest.of(b"base"))).write_bytes(b"bass")
    with start("check", other, links=True) as process:
        events = read_events(process)
    findings = [event for event in events if event["event"] == "finding"]
    assert findings[0]["kind"] == "damaged" and findings[0]["digest"] == str(Digest.of(b"base"))
    assert {finding["repository"] for finding in findings[1:]} == {REPOSITORY}
    assert (events[-1]["damaged"], events[-1]["findings"]) == (1, len(findings))


def test_low_priority_and_limits(store: HostedTree) -> None:
    with start("gc", store) as process:
        read_events(process, until="lock")
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + 10)
        assert Path(f"/proc/{process.pid}/oom_score_adj").read_text() == "500\n"
        limit = resource.prlimit(process.pid, resource.RLIMIT_DATA)[0]
        assert limit == operations.default_memory_limit() >= 512 * 1024 * 1024
        # The signals that the terminal and systemd send to all processes.
        for signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            process.send_signal(signal_number)
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert read_events(process)[-1]["event"] == "result"


@pytest.mark.parametrize("moment", ["lock", "progress"])
def test_it_stops_if_its_input_ends(store: HostedTree, moment: str) -> None:
    with start("gc", store, program="operations._REPORT_INTERVAL = 0") as process:
        read_events(process, until=moment)
        assert process.stdin is not None
        process.stdin.close()
        names = {event["event"] for event in read_events_without_locks(process.stdout)}
    assert process.returncode == 0
    assert "result" not in names and "error" not in names
    assert store.blobs.exists(Digest.of(b"stray"))


def read_events_without_locks(output: IO[bytes] | None) -> list[dict[str, Any]]:
    assert output is not None
    return [json.loads(line) for line in output]


def test_it_stops_if_its_output_is_closed(store: HostedTree) -> None:
    with start("gc", store, program="operations._REPORT_INTERVAL = 0") as process:
        assert process.stdout is not None
        process.stdout.close()
    assert process.returncode == 0
    assert store.blobs.exists(Digest.of(b"stray"))


def test_the_memory_limit_ends_the_operation(store: HostedTree) -> None:
    """The process uses more memory than it may; neither the daemon nor the machine runs out of memory."""
    program = "operations.default_memory_limit = lambda: 100 << 20\n"
    program += "operations.OPERATIONS['gc'] = lambda daemon, root: bytearray(200 << 20)"
    with start("gc", store, program=program) as process:
        message = "the operation needs more than the 100 MiB of memory that it may use"
        assert read_events(process) == [{"event": "error", "code": "MEMORY", "message": message}]


def test_an_unexpected_exception_is_printed(store: HostedTree) -> None:
    with start("gc", store, program="operations.OPERATIONS['gc'] = lambda daemon, root: 1 / 0") as process:
        assert read_events(process) == []
    assert process.returncode == 1


@pytest.fixture
def pipes() -> Iterator[tuple[Daemon, int, int]]:
    """The process's end of the pipes, and the daemon's: its output and its input."""
    (input_fd, daemon_output), (daemon_input, output_fd) = os.pipe(), os.pipe()
    yield Daemon(input_fd, output_fd, clock=iter([1, 1.1, 1.15, 1.19, 1.21, 2.0]).__next__), daemon_output, daemon_input
    for descriptor in (input_fd, daemon_output, daemon_input, output_fd):
        os.close(descriptor)


def test_errors_become_events(pipes: tuple[Daemon, int, int], tmp_path: Path) -> None:
    daemon, _, daemon_input = pipes

    def fail(daemon: Daemon) -> None:
        raise OSError(28, "No space left on device", "/some/file")

    operations.run(daemon, fail, 0)
    operations.run(daemon, lambda daemon: operations.collect_garbage(daemon, str(tmp_path), grace=1), 0)
    operations.run(daemon, lambda daemon: operations.import_directory(daemon, "/", directory=str(tmp_path)), 0)
    disk, grace, directory = map(json.loads, os.read(daemon_input, 10_000).splitlines())
    assert disk == {"event": "error", "code": "DISK", "message": "/some/file: No space left on device"}
    assert (grace["code"], directory["code"]) == ("NOT_UNDERSTOOD", "NOT_UNDERSTOOD")
    assert "120" in grace["message"] and str(tmp_path) in directory["message"]


def test_progress_is_limited(pipes: tuple[Daemon, int, int]) -> None:
    daemon, daemon_output, daemon_input = pipes
    daemon.report("contents", 0, None)
    daemon.report("contents", 1, None)  # too recent
    daemon.report("contents", 2, 10)  # the total is known now
    daemon.report("contents", 3, 10)
    lines = os.read(daemon_input, 10_000).splitlines()
    assert [json.loads(line)["done"] for line in lines] == [0, 2]
    daemon.report("contents", 4, 10)  # not yet
    devnull = os.open(os.devnull, os.O_RDONLY)
    os.dup2(devnull, daemon_output)  # closes the write end of the input
    os.close(devnull)
    with pytest.raises(Stopped):
        daemon.report("contents", 5, 10)
