"""A log whose reader stops: nothing blocks, the queue is bounded, and dropped lines are counted."""

from __future__ import annotations

import errno
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from attrs import define
from twisted.internet.task import Clock

from dockerproxy.daemon import log_stream as module
from dockerproxy.daemon.log_stream import NonBlockingStream

LINE = "x" * 99 + "\n"


@define
class Output:
    """A descriptor to log to, and the one to read the log from."""

    reader: int
    writer: int

    def read_all(self) -> str:
        """Return everything that has been written and not been read."""
        os.set_blocking(self.reader, False)
        data = b""
        with suppress(BlockingIOError):
            while chunk := os.read(self.reader, 65536):
                data += chunk
        return data.decode()


@pytest.fixture(autouse=True)
def no_write_may_block() -> Iterator[None]:
    """Fail a test in which a write blocks, because nobody reads."""

    def fail(*_: object) -> None:
        pytest.fail("a write has blocked for a minute")

    previous = signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture(params=["pipe", "stream socket", "pipe of another user"])
def output(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Output]:
    if request.param == "stream socket":
        one, other = socket.socketpair()
        output = Output(one.detach(), other.detach())
    else:
        output = Output(*os.pipe())
        if request.param == "pipe of another user":
            monkeypatch.setattr(module, "_non_blocking_write", module._polling_write)
    yield output
    os.close(output.reader)
    with suppress(OSError):
        os.close(output.writer)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def stream(output: Output, clock: Clock) -> NonBlockingStream:
    return NonBlockingStream(clock, output.writer, format_dropped="<4>{} lines were dropped\n".format)


def test_lines_are_written_at_once(stream: NonBlockingStream, output: Output) -> None:
    stream.write("one\n")
    stream.write("two ä\n")
    assert output.read_all() == "one\ntwo ä\n"


def test_the_descriptor_stays_in_blocking_mode(stream: NonBlockingStream, output: Output) -> None:
    stream.write("one\n")
    assert os.get_blocking(output.writer)


def test_an_unread_log_blocks_nobody_and_has_a_bound(stream: NonBlockingStream, output: Output, clock: Clock) -> None:
    written = 50_000
    for _ in range(written):
        stream.write(LINE)
    assert stream._queued_bytes <= module._MAX_QUEUED
    text = output.read_all()
    for _ in range(1000):
        if not clock.getDelayedCalls():
            break
        clock.advance(0.1)
        text += output.read_all()
    lines = text.splitlines(keepends=True)
    (report,) = [line for line in lines if "dropped" in line]
    assert set(lines) == {LINE, report}
    dropped = int(report.removeprefix("<4>").split()[0])
    assert report == f"<4>{dropped} lines were dropped\n"
    assert dropped > 0
    assert len(lines) - 1 + dropped == written
    stream.write("again\n")
    assert output.read_all() == "again\n"


def test_a_line_longer_than_the_buffer_is_written_in_parts(
    stream: NonBlockingStream, output: Output, clock: Clock
) -> None:
    line = "y" * 500_000 + "\n"
    stream.write(line)
    text = output.read_all()
    while clock.getDelayedCalls():
        clock.advance(0.1)
        text += output.read_all()
    assert text == line


def test_a_closed_reader_is_an_error_and_leaves_nothing_queued(output: Output, clock: Clock) -> None:
    reader, writer = os.pipe()
    stream = NonBlockingStream(clock, writer)
    os.close(reader)
    with pytest.raises(BrokenPipeError):
        stream.write("one\n")
    assert (stream._queued_bytes, clock.getDelayedCalls()) == (0, [])
    os.close(writer)


def test_a_file(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "log"
    with path.open("w") as file:
        stream = NonBlockingStream(clock, file.fileno())
        stream.write("one\n")
        stream.write(LINE * 1000)
    assert path.read_text() == "one\n" + LINE * 1000


def test_a_full_disk_is_an_error(clock: Clock) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    stream = NonBlockingStream(clock, full)
    with pytest.raises(OSError, match="No space") as caught:
        stream.write("one\n")
    assert caught.value.errno == errno.ENOSPC
    os.close(full)


def test_characters_that_the_encoding_lacks(output: Output, clock: Clock) -> None:
    NonBlockingStream(clock, output.writer, encoding="ascii").write("ä\n")
    assert output.read_all() == "\\xe4\n"


def test_without_a_reactor_the_next_line_brings_the_queued_ones(output: Output) -> None:
    stream = NonBlockingStream(None, output.writer)
    for _ in range(5000):
        stream.write(LINE)
    text = output.read_all()
    assert len(text) < 500_000
    while len(text) < 500_001:
        stream.write("z\n")
        text += output.read_all()
    assert text.replace("z\n", "") == LINE * 5000
