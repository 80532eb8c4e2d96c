"""Docker's credential helpers: programs ``docker-credential-NAME`` that know logins, such as those of ECR, GAR and ACR.

The protocol is that of docker/docker-credential-helpers: the argument ``get``, the server on stdin, and on stdout the
JSON object ``{"ServerURL", "Username", "Secret"}``. On failure the exit status is not 0 and stdout has the reason.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from twisted.application.service import Service
from twisted.internet.defer import Deferred
from twisted.internet.error import ProcessDone
from twisted.internet.protocol import ProcessProtocol
from twisted.python.failure import Failure

from dockerproxy.oci.credentials import IDENTITY_TOKEN_USER, BasicCredentials, IdentityToken, Login
from dockerproxy.oci.untrusted_json import JSONInvalid, parse_json

PROGRAM_PREFIX = "docker-credential-"
HELPER_TIMEOUT = 15.0
"""Seconds that a helper may take. It asks a cloud's token service, which takes one or two."""

_MAX_OUTPUT = 64 * 1024  # bytes; the longest tokens have a few KiB
_MAX_REASON = 200  # characters in the log
_CLOSE_TIMEOUT = 1.0  # seconds for which a process that a helper left behind may keep its pipes open
_NOT_FOUND = "credentials not found in native keychain"  # errCredentialsNotFoundMessage of docker-credential-helpers
_TEXT = re.compile(r"[^\x00-\x1f\x7f]{1,16384}")

# Variables of a helper: the programs, its own files, the network, and the settings of clouds and of password stores.
_VARIABLES = frozenset(
    """
    PATH HOME USER LOGNAME LANG TMPDIR HTTP_PROXY HTTPS_PROXY NO_PROXY ALL_PROXY http_proxy https_proxy no_proxy
    all_proxy SSL_CERT_FILE SSL_CERT_DIR REQUESTS_CA_BUNDLE DOCKER_CONFIG GNUPGHOME PASSWORD_STORE_DIR
    IDENTITY_ENDPOINT IDENTITY_HEADER MSI_ENDPOINT MSI_SECRET GCLOUD_PROJECT
    """.split()
)
_VARIABLE_PREFIXES = ("AWS_", "ECS_", "AZURE_", "ACR_", "GOOGLE_", "CLOUDSDK_", "GCE_", "KUBERNETES_", "XDG_")

# A process group of its own, so that everything that a helper has started ends with it.
_LAUNCHER = "import os, sys; os.setsid(); os.execv(sys.argv[1], sys.argv[1:])"


class HelperFailed(Exception):
    """A helper returned no login. The message is the end of a sentence that begins with its name."""


def helper_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Return those of `variables` that a helper gets. The daemon's settings, which have secrets, are not among them."""
    return {
        name: value for name, value in variables.items() if name in _VARIABLES or name.startswith(_VARIABLE_PREFIXES)
    }


def helper_program(name: str, environment: Mapping[str, str]) -> str | None:
    """Return the path of the helper `name` in PATH; None if there is none, or none that can be executed."""
    return shutil.which(PROGRAM_PREFIX + name, path=environment.get("PATH", os.defpath))


def parse_answer(output: bytes) -> Login | None:
    """Return the login in the output of a helper; None if it is empty.

    Raise ValueError with the end of a sentence that begins with "it printed".
    """
    try:
        document = parse_json(output)
    except JSONInvalid:
        raise ValueError("something else than JSON") from None
    user, secret = (document.get(name, "") if isinstance(document, dict) else None for name in ("Username", "Secret"))
    if not isinstance(user, str) or not isinstance(secret, str):
        raise ValueError("no Username and Secret")
    if not user and not secret:
        return None
    if not _TEXT.fullmatch(secret) or not _TEXT.fullmatch(user) or (":" in user and user != IDENTITY_TOKEN_USER):
        raise ValueError("a Username or a Secret that cannot be sent: it is empty, too long, or has control characters")
    return IdentityToken(secret) if user == IDENTITY_TOKEN_USER else BasicCredentials(user, secret)


class CredentialHelpers(Service):
    """Runs helpers for the main process. They end with the service."""

    def __init__(self, reactor: Any, variables: Mapping[str, str]) -> None:
        self._reactor = reactor
        self._environment = helper_environment(variables)
        self._processes: set[_HelperProcess] = set()

    async def run(self, name: str, server: str, timeout: float = HELPER_TIMEOUT) -> Login | None:
        """Return the login of the helper `name` for `server`; None if it has none. Raise `HelperFailed`."""
        program = helper_program(name, self._environment)
        if program is None:
            raise HelperFailed("is not in PATH, or cannot be executed")
        process = _HelperProcess(self._reactor, server, timeout)
        arguments = [sys.executable, "-I", "-S", "-c", _LAUNCHER, program, "get"]
        try:
            self._reactor.spawnProcess(process, sys.executable, arguments, self._environment, path="/")
        except OSError as error:
            raise HelperFailed(f"cannot be started: {error.strerror}") from None
        self._processes.add(process)
        try:
            await process.ended
        finally:
            self._processes.discard(process)
        return process.answer()

    def stopService(self) -> None:
        """Kill the helpers that run."""
        super().stopService()  # type: ignore[no-untyped-call]
        for process in list(self._processes):
            process.kill("was stopped with the daemon")


class _HelperProcess(ProcessProtocol):
    """A running helper. `ended` fires when it has exited and its output was read, or when it was killed."""

    transport: Any

    def __init__(self, reactor: Any, server: str, timeout: float) -> None:
        self._reactor = reactor
        self._server = server
        self._timeout = timeout
        self._timer: Any = None
        self._pid: int | None = None
        self._stdout = self._stderr = b""
        self._problem = ""
        self._exit_reason = ""
        self.ended: Deferred[None] = Deferred(lambda _: self.kill("was stopped"))

    def answer(self) -> Login | None:
        """Return the login that the process printed, or None. Raise `HelperFailed`."""
        if self._problem:
            raise HelperFailed(self._problem)
        text = self._stdout.decode("utf-8", "replace").strip()
        if text == _NOT_FOUND:
            return None
        if self._exit_reason:
            raise HelperFailed(f"failed ({self._exit_reason}){self._reason(text)}")
        try:
            return parse_answer(self._stdout)
        except ValueError as error:
            raise HelperFailed(f"printed {error}") from None

    def _reason(self, stdout: str) -> str:
        """Return what the helper says about its failure, unless it looks like an answer, which has a secret."""
        for text in (stdout, self._stderr.decode("utf-8", "replace").strip()):
            line = text.partition("\n")[0].strip()
            if line and not re.search(r"[{}]|secret|password|token=", text, re.IGNORECASE):
                return f": {''.join(filter(str.isprintable, line))[:_MAX_REASON]}"
        return ""

    # ProcessProtocol

    def connectionMade(self) -> None:
        self._pid = self.transport.pid
        self._timer = self._reactor.callLater(
            self._timeout, self.kill, f"did not answer within {self._timeout:g} s and was killed"
        )
        self.transport.write(self._server.encode() + b"\n")
        self.transport.closeStdin()

    def outReceived(self, data: bytes) -> None:
        self._stdout += data
        if len(self._stdout) > _MAX_OUTPUT:
            self.kill(f"printed more than {_MAX_OUTPUT} bytes and was killed")

    def errReceived(self, data: bytes) -> None:
        self._stderr = (self._stderr + data)[:_MAX_OUTPUT]

    def processExited(self, reason: Failure) -> None:
        self._kill_group()  # what it has left behind
        if self._timer.active():
            self._timer.cancel()
        self._timer = self._reactor.callLater(_CLOSE_TIMEOUT, self._close_pipes)

    def processEnded(self, reason: Failure) -> None:
        if self._timer.active():
            self._timer.cancel()
        if not isinstance(reason.value, ProcessDone):
            status = getattr(reason.value, "exitCode", None)
            self._exit_reason = "killed by a signal" if status is None else f"exit status {status}"
        if not self.ended.called:
            self.ended.callback(None)

    def kill(self, problem: str) -> None:
        """Kill the process and all that it has started, because of `problem`."""
        self._problem = self._problem or problem
        self._stdout = b""
        self._kill_group()

    def _kill_group(self) -> None:
        """Kill the process group. It exists as soon as the launcher has run; before that, the process itself."""
        if self._pid is None:
            return
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._pid, signal.SIGKILL)
            return
        with suppress(Exception):
            self.transport.signalProcess("KILL")

    def _close_pipes(self) -> None:
        self.transport.loseConnection()
