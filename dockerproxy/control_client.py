"""The client of the daemon's control socket.

Without a path from the user, it asks only sockets that root or the user has put where they are: whoever else could put
one into the current directory, or into a directory that everybody may write to, would be believed.
"""

from __future__ import annotations

import grp
import http.client
import json
import os
import pwd
import socket
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

PROBLEMS, USAGE, NOT_RUNNING, NOT_FOUND, NOT_PERMITTED, BUSY, FAILED, INTERRUPTED = 1, 2, 3, 4, 5, 6, 7, 130

DISCONNECTED = "the daemon closed the connection before it finished"
NOT_OURS = "the process on the control socket is not docker-registry-proxy, or of another version"
_EXIT_STATUS_BY_HTTP = {400: USAGE, 404: NOT_FOUND, 409: BUSY}

_PACKAGE_DIRECTORY = "/run/docker-registry-proxy"

_CONNECT_TIMEOUT = 10.0  # seconds
_ANSWER_TIMEOUT = 20.0  # seconds for a whole answer that changes nothing; `doctor` asks registries for up to 15
_LINE_TIMEOUT = 60.0  # seconds between two lines of a list; a file system that hangs is given up after 30
_WORK_TIMEOUT = 600.0  # seconds without a word from work; `import` syncs the disk at its end
_MAX_LINE = 8 * 1024 * 1024  # bytes; the daemon's longest is a result with 1000 problems
_PART = 64 * 1024  # bytes that are read at once
_MAX_RESPONSE = 64 * 1024 * 1024  # bytes

Event = dict[str, Any]


class CommandError(Exception):
    """A command failed. `status` is the exit status, `message` a sentence, `suggestions` are similar names."""

    def __init__(self, status: int, message: str, suggestions: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.status, self.message, self.suggestions = status, message, tuple(suggestions)


class _UnixHTTPConnection(http.client.HTTPConnection):
    """An HTTP connection over a UNIX socket. It waits `patience` seconds for each part of an answer."""

    def __init__(self, path: str, patience: float) -> None:
        super().__init__("localhost")
        self._path = path
        self.connect_timeout, self._patience = min(_CONNECT_TIMEOUT, patience), patience

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.connect_timeout)
        self.sock.connect(self._path)
        self.sock.settimeout(self._patience)


class ControlClient:
    """Client of the daemon's control API, at the socket `path` or at the first default path that exists.

    A daemon that hangs is given up after `patience` seconds. By default that depends on the request.
    """

    def __init__(self, path: str | None, *, patience: float | None = None) -> None:
        self._path = path
        self._patience = patience

    def call(self, method: str, target: str, body: Any) -> Event:
        """Send a request and return the JSON object of the response. Raise `CommandError`."""
        patience = self._patience or (_ANSWER_TIMEOUT if method == "GET" else _WORK_TIMEOUT)
        return _parse_event(_read_whole(self._request(method, target, body, patience), patience))

    def stream_events(self, method: str, target: str, body: Any = None) -> Iterator[Event]:
        """Send a request and yield the JSON objects of the response as they arrive. Raise `CommandError`."""
        patience = self._patience or (_LINE_TIMEOUT if method == "GET" else _WORK_TIMEOUT)
        response = self._request(method, target, body, patience)
        # Not `readline`, which takes 50 µs for a line of a chunked response: half a second for 10,000 of them.
        pieces: list[bytes] = []
        while part := _read(response.read1, _PART, patience):
            *lines, rest = part.split(b"\n")
            if lines:
                lines[0] = b"".join((*pieces, lines[0]))
                pieces.clear()
            pieces.append(rest)
            if sum(map(len, pieces)) > _MAX_LINE:
                raise CommandError(FAILED, NOT_OURS)
            yield from map(_parse_event, lines)
        if last := b"".join(pieces):
            yield _parse_event(last)

    def _request(self, method: str, target: str, body: Any, patience: float) -> http.client.HTTPResponse:
        connection = self._connect(patience)
        try:
            connection.request(method, target, None if body is None else json.dumps(body))
            response = connection.getresponse()
            if response.status == 200:
                return response
            error = json.loads(_read_whole(response, patience))["error"]
            message, suggestions = str(error["message"]), [str(name) for name in error.get("suggestions", ())]
        except TimeoutError:
            raise CommandError(FAILED, _silence_message(patience)) from None
        except OSError:  # including http.client.RemoteDisconnected
            raise CommandError(FAILED, DISCONNECTED) from None
        except (http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise CommandError(FAILED, NOT_OURS) from None
        raise CommandError(_EXIT_STATUS_BY_HTTP.get(response.status, FAILED), message, suggestions)

    def _connect(self, patience: float) -> _UnixHTTPConnection:
        reasons = []
        for path in [self._path] if self._path else _default_socket_paths():
            reason = None if self._path else distrust_reason(path)
            if reason is not None:
                reasons.append(f"{path} was not asked, because {reason}; give it with --socket if you trust it")
                continue
            connection = _UnixHTTPConnection(path, patience)
            try:
                connection.connect()
            except FileNotFoundError:
                reasons.append(f"{path} not found")
                continue
            except PermissionError:
                raise CommandError(NOT_PERMITTED, _permission_message(path)) from None
            except ConnectionRefusedError:
                raise CommandError(
                    NOT_RUNNING, f"docker-registry-proxy is not running: no process listens on {path}"
                ) from None
            except TimeoutError:
                message = (
                    f"the process that listens on {path} accepted no connection within {connection.connect_timeout:g} s"
                )
                raise CommandError(FAILED, message) from None
            except (OSError, ValueError) as error:
                raise CommandError(
                    NOT_RUNNING, f"{path} is not a control socket of docker-registry-proxy: {error}"
                ) from None
            return connection
        raise CommandError(NOT_RUNNING, f"docker-registry-proxy is not running: {', and '.join(reasons)}")


def distrust_reason(path: str) -> str | None:
    """Return why the socket at `path` may be a stranger's, or None if root or this user has put it there.

    Root may have given its directory to the daemon's user, as systemd does.
    """
    directory = os.path.dirname(os.path.abspath(path))
    try:
        owner = None
        for candidate in (directory, os.path.realpath(directory)):
            reason, owner = _check_directories(candidate)
            if reason is not None:
                return reason
        status = os.lstat(path)
    except OSError:
        return None  # the connection fails for the same reason, with the better message
    if not stat.S_ISSOCK(status.st_mode):
        return "it is not a socket"
    if status.st_uid not in (0, os.geteuid(), owner):
        return f"it belongs to {_user_name(status.st_uid)}"
    return None


def _check_directories(directory: str) -> tuple[str | None, int]:
    """Return why somebody else could replace `directory` or a file in it, or None; and its owner. Raises `OSError`."""
    trusted = (0, os.geteuid())
    paths = [directory]
    while paths[-1] != "/":
        paths.append(os.path.dirname(paths[-1]))
    is_shared, owner = False, 0
    for path in reversed(paths):
        status = os.lstat(path)
        owner = status.st_uid
        if owner not in trusted and (path != directory or is_shared or stat.S_ISLNK(status.st_mode)):
            return f"{path} belongs to {_user_name(owner)}", owner
        is_shared = _is_writable_by_others(status) and not stat.S_ISLNK(status.st_mode)
        if is_shared and (path == directory or not status.st_mode & stat.S_ISVTX):
            return f"other users can write to {path}", owner
    return None, owner


def _is_writable_by_others(status: os.stat_result) -> bool:
    # Many distributions give each user a group of their own.
    own_group = status.st_gid in (0, os.getegid())
    return bool(status.st_mode & (stat.S_IWOTH if own_group else stat.S_IWOTH | stat.S_IWGRP))


def _user_name(uid: int) -> str:
    try:
        return f"the user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"the user with ID {uid}"


def _read_whole(response: http.client.HTTPResponse, patience: float) -> bytes:
    """Return the content of the response, which has `patience` seconds to arrive. Raise `CommandError`."""
    deadline = time.monotonic() + patience
    parts, size = [], 0
    while part := _read(response.read1, _PART, patience):
        parts.append(part)
        size += len(part)
        if size > _MAX_RESPONSE:
            raise CommandError(FAILED, NOT_OURS)
        if time.monotonic() > deadline:
            raise CommandError(FAILED, f"the daemon has not sent its whole answer in {patience:g} s; see its log")
    return b"".join(parts)


def _read(read: Callable[[int], bytes], size: int, patience: float) -> bytes:
    try:
        return read(size)
    except TimeoutError:
        raise CommandError(FAILED, _silence_message(patience)) from None
    except (OSError, http.client.HTTPException, ValueError):
        raise CommandError(FAILED, DISCONNECTED) from None


def _parse_event(content: bytes) -> Event:
    try:
        event = json.loads(content)
    except (ValueError, RecursionError):
        raise CommandError(FAILED, DISCONNECTED) from None
    if not isinstance(event, dict):
        raise CommandError(FAILED, NOT_OURS)
    return event


def _silence_message(patience: float) -> str:
    return f"the daemon has sent nothing for {patience:g} s; see its log"


def _default_socket_paths() -> Iterator[str]:
    """Yield the default paths of the control socket.

    They are those of the environment variables, of the Debian package, and of `make run`.
    """
    environment = os.environ
    directories = [
        environment.get("RUNTIME_DIR") or environment.get("RUNTIME_DIRECTORY", "").partition(":")[0],
        os.path.join(environment["STATE_DIR"], "run") if environment.get("STATE_DIR") else "",
        _PACKAGE_DIRECTORY,
        "var/run",
    ]
    for directory in filter(None, directories):
        yield os.path.join(directory, "control.sock")


def _permission_message(path: str) -> str:
    try:
        group = grp.getgrgid(os.stat(os.path.dirname(path)).st_gid).gr_name
    except (OSError, KeyError):
        return f"permission denied for {path}: run this as root, or join the daemon's group"
    return f"permission denied for {path}: run this as root, or join the group {group}"
