"""The Unix socket on which the daemon accepts administrative commands."""

from __future__ import annotations

import socket
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

from twisted.application.service import Service
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.endpoints import UNIXServerEndpoint
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IListeningPort
from twisted.logger import Logger
from twisted.python.failure import Failure

from dockerproxy.daemon.endpoints import error_reason
from dockerproxy.http.site import Site

log = Logger()


class ControlSocket(Service):
    """Serves `site` on a socket at `path` with mode 0660: only the daemon's user and group can connect.

    A stop aborts running commands. The command line reports that to the user, and every command can be repeated.
    """

    def __init__(self, reactor: Any, path: Path, site: Site) -> None:
        self._reactor = reactor
        self._path = path
        self._site = site
        self._port: IListeningPort | None = None

    def startService(self) -> None:
        super().startService()  # type: ignore[no-untyped-call]
        try:
            _make_socket_directory(self._path.parent)
            _remove_stale_socket(self._path)
            endpoint: Any = UNIXServerEndpoint(self._reactor, str(self._path), mode=0o660)  # type: ignore[no-untyped-call]
            listening = maybeDeferred(endpoint.listen, self._site)
            result = getattr(listening, "result", None)
            if isinstance(result, Failure):
                listening.addErrback(lambda failure: None)
                result.raiseException()
        except CannotListenError as error:
            raise SystemExit(_error_message(self._path, error.socketError)) from None
        except OSError as error:
            raise SystemExit(_error_message(self._path, error)) from None
        self._port = result
        log.info("listening on {path} for commands", path=str(self._path))

    def stopService(self) -> Deferred[None]:
        super().stopService()  # type: ignore[no-untyped-call]
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        port, self._port = self._port, None
        if port is not None:
            with suppress(FileNotFoundError):  # the socket file was removed by hand
                await maybeDeferred(port.stopListening)
        self._site.abort()
        await self._site.drain()


def _make_socket_directory(path: Path) -> None:
    """Create the socket's directory with mode 0750. An existing one (systemd's RuntimeDirectory=) keeps its mode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        path.mkdir(mode=0o750)
        path.chmod(0o750)


def _remove_stale_socket(path: Path) -> None:
    """Remove the socket file that a killed daemon left. Raise `OSError` if a daemon still listens on it."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise FileExistsError(0, "the path exists and is not a socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)  # a listening socket accepts at once, or fails because its backlog is full
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:
            pass
    raise FileExistsError(0, "another daemon listens there")


def _error_message(path: Path, error: BaseException) -> str:
    return f"docker-registry-proxy: cannot listen on {path}: {error_reason(error)}."
