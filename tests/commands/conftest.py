"""A control socket with answers that the test chooses, and the command run in this process, on a clock that stands."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingMixIn, UnixStreamServer
from typing import Any

import pytest

from dockerproxy import cli

NOW = 1_800_000_000.0  # 2027-01-15 08:00:00 UTC


class ControlSocketStub(ThreadingMixIn, UnixStreamServer):
    """Answers with `answers`, by method and path. `requests` has all that came.

    An answer is a JSON value, a list of events, a function that yields events for as long as it likes, or a pair of an
    HTTP status and a JSON value.
    """

    daemon_threads = True

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), _Handler)
        self.path = path
        self.answers: dict[str, Any] = {}
        self.requests: list[tuple[str, Any]] = []


class _Handler(BaseHTTPRequestHandler):
    server: ControlSocketStub

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append((f"{self.command} {self.path}", json.loads(body) if body else None))
        answer = self.server.answers.get(f"{self.command} {self.path.partition('?')[0]}")
        status = 200
        if answer is None:
            status, answer = 404, {"error": {"code": "UNSUPPORTED", "message": "this daemon does not support it"}}
        elif isinstance(answer, tuple):
            status, answer = answer
        if callable(answer):
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):
                for line in answer():
                    self.wfile.write(json.dumps(line).encode() + b"\n")
            return
        lines = answer if isinstance(answer, list) else [answer]
        content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_GET

    def address_string(self) -> str:
        return "-"

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[ControlSocketStub]:
    with ControlSocketStub(tmp_path / "control.sock") as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    daemon: ControlSocketStub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Run]:
    """Return a function that runs the command with arguments and returns its exit status, its output and its errors."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    monkeypatch.setattr(time, "time", lambda: NOW)

    def run(*arguments: str) -> tuple[int, str, str]:
        status = _status(["--socket", str(daemon.path), *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    yield run
    monkeypatch.undo()
    time.tzset()


def _status(arguments: Sequence[str]) -> int:
    try:
        return cli.main(arguments)
    except SystemExit as error:  # of argparse
        return int(error.code or 0)
