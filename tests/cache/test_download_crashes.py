"""A process is killed at each step of a download. A process that follows it completes the blob."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dockerproxy.cache import downloads
from dockerproxy.cache.download_state import DownloadState
from dockerproxy.cache.ingests import Ingests
from dockerproxy.cache.space import CacheSpaceManager, Reservation
from dockerproxy.oci.names import Digest
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.ingest import Ingest
from tests.cache.support.harness import HUB, CacheHarness, do_nothing, ingest_key, result
from tests.cache.support.upstream import ScriptedUpstream, respond_streaming

DATA = bytes(range(256)) * 400
DIGEST = Digest.of(DATA)
NAME = "library/app"
PIECE = 20_000  # bytes that upstream sends at a time


class ChildProcess:
    """A forked process that runs `work` until it calls the function given to it, and then waits to be killed."""

    def __init__(self, work: Callable[[Callable[[], None]], None]) -> None:
        stopped, notify = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            try:
                work(lambda: stop(notify))
            finally:
                os._exit(1)
        os.close(notify)
        try:
            assert select.select([stopped], [], [], 30)[0], "the child has not reached the step"
            assert os.read(stopped, 1) == b"x", "the child has ended before the step"
        except BaseException:
            self.kill()
            raise
        finally:
            os.close(stopped)

    def kill(self) -> None:
        pid, self.pid = self.pid, 0
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def stop(notify: int) -> None:
    os.write(notify, b"x")
    while True:
        signal.pause()


def stop_at(owner: Any, name: str, call: int, stop: Callable[[], None], *, after: bool = False) -> None:
    """Call `stop` before or after the `call`-th call of `owner.name`. Only the child process may call this."""
    function = getattr(owner, name)
    calls = 0

    def count(*args: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            stop()
        value = function(*args, **named)
        if calls == call:
            stop()
        return value

    setattr(owner, name, count)


def new_harness(root: Path) -> CacheHarness:
    harness = CacheHarness(root, shared=True)
    harness.upstream.repository(f"{HUB}/{NAME}").put_blob(DATA)
    return harness


def download(root: Path, owner: Any, name: str, call: int, after: bool, stop: Callable[[], None]) -> None:
    """Download the blob in the child process, up to the given step."""
    stop_at(owner, name, call, stop, after=after)
    harness = new_harness(root)
    harness.upstream.on("GET", "blobs", respond_streaming)
    harness.downloads.start(harness.principal(), DIGEST, do_nothing)
    harness.reactor.run_due_calls()
    response = harness.upstream.responses[-1]
    for _ in range(0, len(DATA), PIECE):
        response.send(PIECE)
        harness.reactor.run_due_calls()
    response.send_rest()
    harness.reactor.run_due_calls()


@pytest.fixture
def children() -> Iterator[list[ChildProcess]]:
    processes: list[ChildProcess] = []
    yield processes
    for process in processes:
        process.kill()


STEPS = [
    pytest.param(Ingests, "acquire", 1, False, id="before the lock"),
    pytest.param(Ingests, "acquire", 1, True, id="after the lock"),
    pytest.param(ScriptedUpstream, "request", 1, False, id="before the request"),
    pytest.param(ScriptedUpstream, "_respond", 1, False, id="before the response"),
    pytest.param(Ingests, "publish_info", 1, False, id="before the information is published"),
    pytest.param(Ingests, "publish_info", 1, True, id="after the information is published"),
    pytest.param(CacheSpaceManager, "reserve", 1, False, id="before the reservation"),
    pytest.param(Ingest, "append", 1, False, id="before the first byte"),
    pytest.param(Ingest, "append", 3, False, id="in the middle"),
    pytest.param(Ingest, "append", 6, True, id="after the last byte"),
    pytest.param(Ingest, "verify", 1, True, id="after verification"),
    pytest.param(downloads, "_sync_and_close", 1, True, id="after the sync"),
    pytest.param(Ingests, "commit", 1, False, id="before the commit"),
    pytest.param(Blobs, "commit", 1, True, id="after the rename"),
    pytest.param(Ingests, "commit", 1, True, id="after the commit"),
    pytest.param(Reservation, "commit", 1, False, id="before the blob is counted"),
    pytest.param(Ingests, "remove_info", 2, False, id="before the information is removed"),
    pytest.param(Ingest, "release", 2, True, id="after the release"),
]


@pytest.mark.parametrize(("owner", "name", "call", "after"), STEPS)
def test_writer_is_killed(
    tmp_path: Path, children: list[ChildProcess], owner: Any, name: str, call: int, after: bool
) -> None:
    children.append(ChildProcess(lambda stop: download(tmp_path, owner, name, call, after, stop)))
    follower = new_harness(tmp_path)
    fetching = follower.start(follower.fetch_later(DIGEST))
    follower.advance(2)
    children[0].kill()
    follower.advance(3)
    assert result(fetching, follower.reactor)[1] == DATA
    assert Path(follower.layout.blob(DIGEST)).read_bytes() == DATA
    assert follower.ingest_files == []
    lock = Ingest.open(follower.layout, ingest_key(DIGEST))
    assert lock is not None
    lock.discard()
    follower.run(follower.space.maintain())
    assert follower.space.index.total == len(DATA)
    follower.assert_no_leaks()


def follow(root: Path, state: DownloadState, stop: Callable[[], None]) -> None:
    """Follow the download of the parent process, up to the given state."""
    harness = new_harness(root)
    following = harness.downloads.start(harness.principal(), DIGEST, do_nothing)
    harness.advance(1)
    assert following.state is state
    stop()


@pytest.mark.parametrize(("sent", "state"), [(None, DownloadState.WAITING), (50_000, DownloadState.FOLLOWING)])
def test_follower_is_killed(
    tmp_path: Path, children: list[ChildProcess], sent: int | None, state: DownloadState
) -> None:
    writer = new_harness(tmp_path)
    writer.upstream.on("GET", "blobs", respond_streaming)
    fetching = writer.start(writer.fetch_later(DIGEST))
    response = writer.upstream.responses[-1]
    if sent is None:
        writer.ingests.remove_info(ingest_key(DIGEST))  # as if upstream had not responded yet
    else:
        response.send(sent)
        writer.advance(0.1)
    children.append(ChildProcess(lambda stop: follow(tmp_path, state, stop)))
    children[0].kill()
    response.send_rest()
    writer.advance(0.1)
    assert result(fetching, writer.reactor)[1] == DATA
    assert writer.ingest_files == []
    writer.assert_no_leaks()
