"""The client of the control socket: which sockets it asks, and how long it waits for them."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dockerproxy import cli, control_client
from dockerproxy.control_client import CommandError, ControlClient, distrust_reason

NOBODY = 65534


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is the current one, with a control socket in var/run. No other default path has one."""
    for name in ("RUNTIME_DIR", "RUNTIME_DIRECTORY", "STATE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(control_client, "_PACKAGE_DIRECTORY", str(tmp_path / "none"))
    (tmp_path / "var/run").mkdir(parents=True)
    for path in (tmp_path, tmp_path / "var", tmp_path / "var/run"):
        path.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def server(folder: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("var/run/control.sock")
        server.listen()
        server.settimeout(5)
        yield server


def answer(server: socket.socket, content: bytes, times: int = 1) -> None:
    """Accept as many connections in a thread, and send `content` to each when its request has come."""

    def run() -> None:
        for _ in range(times):
            try:
                connection, _ = server.accept()
            except OSError:  # the test has ended
                return
            with connection:
                connection.recv(10_000)
                with contextlib.suppress(BrokenPipeError):  # the client has given up
                    connection.sendall(content)

    threading.Thread(target=run, daemon=True).start()


def json_response(content: bytes, status: str = "200 OK") -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status.encode(), len(content), content)


def test_the_users_own_socket_is_asked(server: socket.socket) -> None:
    answer(server, json_response(b'{"a": 1}'))
    assert ControlClient(None).call("GET", "/v1/status", None) == {"a": 1}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda folder: (folder / "var/run").chmod(0o777), "other users can write to {}/var/run"),
        (lambda folder: (folder / "var/run").chmod(0o1777), "other users can write to {}/var/run"),
        (lambda folder: (folder / "var").chmod(0o757), "other users can write to {}/var"),
        (lambda folder: folder.chmod(0o777), "other users can write to {}"),
    ],
)
def test_a_directory_that_all_may_write_to_is_not_trusted(
    folder: Path, server: socket.socket, change: Callable[[Path], object], reason: str
) -> None:
    assert distrust_reason("var/run/control.sock") is None
    change(folder)
    assert distrust_reason("var/run/control.sock") == reason.format(folder)
    with pytest.raises(CommandError, match=r"control.sock was not asked, because other users can write to"):
        ControlClient(None).call("GET", "/v1/status", None)
    answer(server, json_response(b"{}"))
    assert ControlClient("var/run/control.sock").call("GET", "/v1/status", None) == {}


@pytest.mark.root
@pytest.mark.parametrize("owned", ["", "var", "var/run", "var/run/control.sock"])
def test_what_belongs_to_another_user_is_not_trusted(folder: Path, server: socket.socket, owned: str) -> None:
    os.chown(folder / owned, NOBODY, -1)
    reason = distrust_reason("var/run/control.sock")
    if owned == "var/run":
        assert reason is None  # root has given the directory to the daemon's user
    else:
        assert reason is not None and "belongs to" in reason


@pytest.mark.root
def test_the_daemons_user_owns_directory_and_socket(folder: Path, server: socket.socket) -> None:
    for name in ("var/run", "var/run/control.sock"):
        os.chown(name, NOBODY, -1)
    assert distrust_reason("var/run/control.sock") is None
    (folder / "var").chmod(0o1777)  # but there, it could have been made by anybody
    assert "belongs to" in (distrust_reason("var/run/control.sock") or "")


@pytest.mark.root
def test_a_link_of_another_user_is_not_followed(folder: Path, server: socket.socket) -> None:
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere/run").symlink_to(folder / "var/run")
    assert distrust_reason("elsewhere/run/control.sock") is None
    os.chown("elsewhere/run", NOBODY, -1, follow_symlinks=False)
    assert "belongs to" in (distrust_reason("elsewhere/run/control.sock") or "")


def test_a_link_to_a_shared_directory_is_not_trusted(folder: Path, server: socket.socket) -> None:
    (folder / "link").symlink_to(folder / "var")
    assert distrust_reason("link/run/control.sock") is None
    (folder / "var").chmod(0o777)
    assert distrust_reason("link/run/control.sock") == f"other users can write to {folder}/var"


def test_what_is_no_socket_is_not_trusted(folder: Path) -> None:
    Path("var/run/control.sock").touch()
    assert distrust_reason("var/run/control.sock") == "it is not a socket"
    Path("var/run/control.sock").unlink()
    Path("var/run/control.sock").symlink_to("elsewhere")
    assert distrust_reason("var/run/control.sock") == "it is not a socket"


def test_a_silent_socket_is_given_up(server: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_ANSWER_TIMEOUT", "_WORK_TIMEOUT"):
        monkeypatch.setattr(control_client, name, 0.05)
    for method in ("GET", "POST"):
        with pytest.raises(CommandError, match=r"has sent nothing for 0\.05 s; see its log"):
            ControlClient(None).call(method, "/v1/status", None)


def test_an_answer_that_drips_is_given_up(server: socket.socket) -> None:
    """Each byte comes in time, and the answer does not end."""
    stopped = threading.Event()

    def drip() -> None:
        connection, _ = server.accept()
        with connection, contextlib.suppress(OSError):
            connection.recv(10_000)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            while not stopped.wait(0.01):
                connection.sendall(b" ")

    thread = threading.Thread(target=drip)
    thread.start()
    with pytest.raises(CommandError, match=r"has not sent its whole answer in 0\.3 s"):
        ControlClient(None, patience=0.3).call("GET", "/v1/status", None)
    stopped.set()
    thread.join()


def test_a_silent_stream_is_given_up(server: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_client, "_LINE_TIMEOUT", 0.5)
    answer(server, b'HTTP/1.1 200 OK\r\n\r\n{"event": "x"}\n')
    done = threading.Event()

    def keep_open() -> None:
        connection, _ = server.accept()
        connection.recv(10_000)
        connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"event": "x"}\n')
        done.wait(5)
        connection.close()

    list(ControlClient(None).stream_events("GET", "/"))
    threading.Thread(target=keep_open, daemon=True).start()
    events = ControlClient(None).stream_events("GET", "/")
    assert next(events) == {"event": "x"}
    with pytest.raises(CommandError, match="has sent nothing for"):
        next(events)
    done.set()


@pytest.mark.parametrize("size", [1, 7, 1000, 100_000])
@pytest.mark.parametrize("chunked", [False, True], ids=["until-close", "chunked"])
def test_events_may_arrive_in_any_pieces(server: socket.socket, size: int, chunked: bool) -> None:
    events = [{"event": "repository", "name": "n" * (number % 300), "number": number} for number in range(300)]
    content = b"".join(json.dumps(event).encode() + b"\n" for event in events).removesuffix(b"\n")
    pieces = [content[start : start + size] for start in range(0, len(content), size)]
    if chunked:
        body = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
        answer(server, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body)
    else:
        answer(server, b"HTTP/1.1 200 OK\r\n\r\n" + content)
    assert list(ControlClient(None).stream_events("GET", "/")) == events


def test_an_endless_line_is_given_up(server: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_client, "_MAX_LINE", 100_000)
    answer(server, b"HTTP/1.1 200 OK\r\n\r\n" + b'{"event": "x"}\n' + b"[" * 400_000)
    events = ControlClient(None).stream_events("GET", "/")
    assert next(events) == {"event": "x"}
    with pytest.raises(CommandError, match="is not docker-registry-proxy"):
        next(events)


def test_a_full_backlog_is_given_up(server: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_client, "_CONNECT_TIMEOUT", 0.05)
    server.listen(0)
    with socket.socket(socket.AF_UNIX) as first:
        first.connect("var/run/control.sock")
        with pytest.raises(CommandError, match=r"accepted no connection within|Resource temporarily"):
            ControlClient(None).call("GET", "/v1/status", None)


@pytest.mark.parametrize(
    "content",
    [
        b"[1]",
        b"{",
        b"[" * 100_000,
        b'{"a": NaN',
        b"\xff",
        b'{"started": "x"}',
        b"{}",
        b'{"started": 1e300, "cache": 1}',
    ],
    ids=["list", "cut", "deep", "not a number", "not UTF-8", "no time", "empty", "no size"],
)
def test_an_unexpected_answer_is_one_sentence(
    server: socket.socket, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(server, json_response(content), times=3)  # `status` asks three times, unless an answer is bad
    assert cli.main(["status"]) == 7
    error = capsys.readouterr().err
    assert error.startswith("dockerproxy: the ") and "within" not in error


def test_the_answer_is_shown_and_not_obeyed(server: socket.socket, capsys: pytest.CaptureFixture[str]) -> None:
    content = b'{"error": {"message": "\\u001b]0;owned\\u0007", "suggestions": ["\\u202eevil"]}}'
    answer(server, json_response(content, "404 Not Found"))
    assert cli.main(["ls", "x"]) == 4
    assert capsys.readouterr().err == (
        "dockerproxy: \\x1b]0;owned\\x07\nDid you mean \\u202eevil? Nothing was changed.\n"
    )
    answer(server, json_response(content, "404 Not Found"))
    assert cli.main(["--json", "ls", "x"]) == 4
    assert capsys.readouterr().out.isascii()
