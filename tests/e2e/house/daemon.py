"""The daemon under test, run as a user runs it: `twistd dockerproxy`, configured by its environment."""

from __future__ import annotations

import os
import re
import shutil
import signal
import ssl
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from attrs import frozen

from bench.servers import free_port
from tests.e2e.house.process import Process
from tests.e2e.house.wire import Client, request

_PROJECT = Path(__file__).resolve().parents[3]

# CLIENT METHOD HOST/PATH STATUS BYTES SECONDS VERDICT, after whatever the log puts before it
_ACCESS = re.compile(
    r"([0-9a-f.:]+) ([A-Z]+) (\S+) (\d{3}) (\d+) [\d.]+ (HIT|MISS|JOINED|REVALIDATED|STALE|PASS|-)$", re.MULTILINE
)
_CRASH = re.compile(r"Traceback \(most recent call last\)|Unhandled (?:E|e)rror|Unhandled exception|was never awaited")


@frozen
class Logged:
    """A line of the daemon's access log."""

    client: str
    method: str
    target: str
    status: int
    size: int
    verdict: str


class Proxy(Process):
    """A daemon with its state in `folder`; ports are chosen when it is made and stay."""

    def __init__(self, folder: Path, settings: Mapping[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.registry_port = free_port()
        self.state = folder / "state"
        self.ca_file = folder / "ca.crt"
        environment = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG")}
        environment |= {
            "PYTHONPATH": str(_PROJECT),
            "STATE_DIR": str(self.state),
            "PROXY_LISTEN": f"tcp:{self.port}:interface=127.0.0.1",
            "REGISTRY_LISTEN": f"tcp:{self.registry_port}:interface=127.0.0.1",
            **settings,
        }
        super().__init__([*twistd(), "dockerproxy"], folder / "log", environment, folder)
        self._context: ssl.SSLContext | None = None
        self._checked = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start, and wait until it answers."""
        self.launch()
        self.wait_for(self._answers)
        ca = request("GET", self.url + "/ca.crt")
        assert ca.status == 200
        self.ca_file.write_bytes(ca.body)

    @contextmanager
    def running_for(self, secrets: Callable[[], list[str]]) -> Iterator[Proxy]:
        """Run for a while; see `check_log` for what has to hold at the end."""
        try:
            self.start()
            yield self
            self.check_log(secrets())
        finally:
            self.stop()

    def _answers(self) -> bool:
        try:
            return request("GET", self.url + "/healthz").status == 200
        except OSError:
            return False

    def restart(self, *, kill: bool = False) -> None:
        """Stop (or kill) and start again with the same state."""
        self.kill() if kill else self.stop()
        self.start()

    @property
    def context(self) -> ssl.SSLContext:
        """Return a client's context that trusts the daemon's CA and no other."""
        if self._context is None:
            self._context = ssl.create_default_context(cafile=str(self.ca_file))
        return self._context

    @property
    def client(self) -> Client:
        return Client(self.port, self.context)

    @property
    def client_environment(self) -> dict[str, str]:
        """What a program of the client's side has in its environment, by both spellings that programs look for."""
        names = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
        return {**dict.fromkeys(names, self.url), "SSL_CERT_FILE": str(self.ca_file)}

    def log_end(self) -> int:
        """Return the present end of the log, for `logged`."""
        return len(self.text)

    def logged(self, since: int = 0) -> list[Logged]:
        """Return the requests that were logged."""
        return [
            Logged(client, method, target, int(status), int(size), verdict)
            for client, method, target, status, size, verdict in _ACCESS.findall(self.text[since:])
        ]

    def check_log(self, secrets: list[str]) -> None:
        """Fail where the log since the last check holds a traceback or one of `secrets`."""
        text = self.text
        fresh, self._checked = text[self._checked :], len(text)
        crash = _CRASH.search(fresh)
        assert crash is None, f"the daemon's log has a traceback:\n{fresh[max(0, crash.start() - 500) :][:6000]}"
        for secret in secrets:
            assert secret not in fresh, f"the daemon's log has a secret, {secret[:6]}…"

    @property
    def memory(self) -> int:
        """Return the resident set in bytes."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) * 1024

    def pause(self) -> None:
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.signal(signal.SIGCONT)


RunProxy = Callable[..., Proxy]
"""Starts a daemon: `run_proxy(name, **settings)`; see the fixture of that name."""


def twistd() -> list[str]:
    """Return the twistd of the Python that runs the tests, in the foreground."""
    beside = Path(sys.executable).with_name("twistd")
    start = [str(beside)] if beside.exists() else [shutil.which("twistd3") or "twistd"]
    return [*start, "--nodaemon", "--pidfile="]
