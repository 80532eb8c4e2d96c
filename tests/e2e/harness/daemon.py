"""The daemon under test, started as a user starts it: `twistd dockerproxy`, configured by its environment."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import ssl
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attrs import frozen

from bench.servers import free_port
from tests.e2e.harness.http_client import ProxyClient, request_directly
from tests.e2e.harness.process import BackgroundProcess

_PROJECT = Path(__file__).resolve().parents[3]

CLEAN_EXIT_STATUSES = (0, -signal.SIGTERM)
"""Exit statuses of a daemon after SIGTERM: twistd ends by sending itself the signal that it received."""

# CLIENT METHOD HOST/PATH STATUS BYTES SECONDS CACHE_STATUS USER "USER_AGENT" [BECAUSE], after the prefix of a line
_ACCESS_LINE = re.compile(
    r"([0-9a-f.:]+) ([A-Z]+) (\S+) (\d{3}) (\d+) [\d.]+ (HIT|MISS|PEER|JOINED|REVALIDATED|STALE|PASS|-)"
    r' \S+ "[^"]*"(?: (.+))?$',
    re.MULTILINE,
)
_TRACEBACK = re.compile(
    r"Traceback \(most recent call last\)|Unhandled (?:E|e)rror|Unhandled exception|was never awaited"
)


@frozen
class AccessLogEntry:
    """A line of the daemon's access log."""

    client: str
    method: str
    target: str
    status: int
    size: int
    cache_status: str
    because: str


class TwistdDaemon(BackgroundProcess):
    """A daemon with its state in `folder`. Its ports are chosen once and stay the same after a restart."""

    def __init__(self, folder: Path, settings: Mapping[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.registry_port = free_port()
        self.state_folder = folder / "state"
        self.ca_file = folder / "ca.crt"
        environment = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG")}
        environment |= {
            "PYTHONPATH": str(_PROJECT),
            "STATE_DIR": str(self.state_folder),
            "PROXY_LISTEN": f"tcp:{self.port}:interface=127.0.0.1",
            "REGISTRY_LISTEN": f"tcp:{self.registry_port}:interface=127.0.0.1",
            **settings,
        }
        super().__init__([*twistd_argv(), "dockerproxy"], folder / "log", environment, folder)
        self._client_context: ssl.SSLContext | None = None
        self._checked_offset = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def audit_entries(self, action: str = "") -> list[dict[str, Any]]:
        """Return the entries of the audit log, oldest first; with `action`, its entries only.

        The daemon writes an entry in the background, maybe after its answer to the request.
        """
        file = self.state_folder / "audit.jsonl"
        entries = map(json.loads, file.read_text().splitlines()[1:] if file.is_file() else [])
        return [entry for entry in entries if action in ("", entry["action"])]

    def start(self) -> None:
        """Start the daemon, wait until it is healthy, and download its CA."""
        self.launch()
        self.finish_start()

    def finish_start(self, timeout: float = 20) -> None:
        """Wait until the daemon, which has been launched, is healthy, and download its CA."""
        self.wait_until_ready(self._is_healthy, timeout)
        response = request_directly("GET", self.url + "/ca.crt")
        assert response.status == 200
        self.ca_file.write_bytes(response.body)

    @contextmanager
    def run_and_check_log(self, get_secrets: Callable[[], list[str]]) -> Iterator[TwistdDaemon]:
        """Run the daemon for the time of the context, and call `check_log` at its end."""
        try:
            self.start()
            yield self
            self.check_log(get_secrets())
        finally:
            self.stop()

    def _is_healthy(self) -> bool:
        try:
            return request_directly("GET", self.url + "/healthz").status == 200
        except OSError:
            return False

    def restart(self, *, kill: bool = False) -> None:
        """Stop (or kill) the daemon and start it again with the same state."""
        self.kill() if kill else self.stop()
        self.start()

    @property
    def client_context(self) -> ssl.SSLContext:
        """Return a client's context that trusts only the daemon's CA."""
        if self._client_context is None:
            self._client_context = ssl.create_default_context(cafile=str(self.ca_file))
        return self._client_context

    @property
    def client(self) -> ProxyClient:
        return ProxyClient(self.port, self.client_context)

    @property
    def client_environment(self) -> dict[str, str]:
        """Environment variables that make client programs use the daemon, in upper and lower case for all programs."""
        names = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
        return {**dict.fromkeys(names, self.url), "SSL_CERT_FILE": str(self.ca_file)}

    def log_offset(self) -> int:
        """Return the current end of the log; `access_log` takes it."""
        return len(self.output_text)

    def access_log(self, offset: int = 0) -> list[AccessLogEntry]:
        """Return the requests logged since `offset`."""
        return [
            AccessLogEntry(client, method, target, int(status), int(size), cache_status, because)
            for client, method, target, status, size, cache_status, because in _ACCESS_LINE.findall(
                self.output_text[offset:]
            )
        ]

    def check_log(self, secrets: list[str]) -> None:
        """Fail if the log since the last check contains a traceback or one of `secrets`."""
        full_text = self.output_text
        new_text, self._checked_offset = full_text[self._checked_offset :], len(full_text)
        traceback = _TRACEBACK.search(new_text)
        assert traceback is None, (
            f"the daemon's log contains a traceback:\n{new_text[max(0, traceback.start() - 500) :][:6000]}"
        )
        for secret in secrets:
            assert secret not in new_text, f"the daemon's log contains the secret {secret[:6]}…"

    @property
    def resident_bytes(self) -> int:
        """Return the resident set in bytes."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        match = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert match is not None
        return int(match[1]) * 1024


StartDaemon = Callable[..., TwistdDaemon]
"""Starts a daemon: `start_daemon(name, **settings)`; see the fixture `start_daemon`."""


def twistd_argv() -> list[str]:
    """Return the command of the twistd that belongs to the tests' Python, in the foreground."""
    sibling = Path(sys.executable).with_name("twistd")
    program = [str(sibling)] if sibling.exists() else [shutil.which("twistd3") or "twistd"]
    return [*program, "--nodaemon", "--pidfile="]


def start_members(daemons: Sequence[TwistdDaemon], at_once: int = 4) -> None:
    """Start the members of a fleet: the first alone, because it creates the CA, and then several at the same time."""
    for begin in (0, *range(1, len(daemons), at_once)):
        batch = daemons[begin : begin + at_once] if begin else daemons[:1]
        for daemon in batch:
            daemon.launch()
        for daemon in batch:
            daemon.finish_start(timeout=60)
