"""A daemon with a log that nobody reads goes on serving clients, and says later how many lines were dropped."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import subprocess
from pathlib import Path

import pytest

import dockerproxy
from tests.twistd import twistd_command

pytestmark = pytest.mark.slow  # starts a daemon

ROOT = Path(dockerproxy.__file__).parent.parent
REQUESTS = 30_000  # twenty times what a pipe and the daemon's queue hold, at about 90 bytes a line


@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_clients_are_served_while_nobody_reads_the_log(tmp_path: Path, log_format: str, workers: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = {
        "PATH": os.environ.get("PATH", ""),
        "PYTHONPATH": str(ROOT),
        "STATE_DIR": str(tmp_path),
        "PROXY_LISTEN": f"tcp:{port}:interface=127.0.0.1",
        "REGISTRY_LISTEN": "none",
        "WORKERS": workers,
        "LOG_FORMAT": log_format,
    }
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [*twistd_command(), "dockerproxy"], stdout=writer, stderr=writer, env=environment, cwd=tmp_path
    )
    os.close(writer)
    try:
        with open(reader, "rb") as log:
            started = b""
            while b"listening on" not in started or started.count(b" serves") < int(workers) - 1:
                chunk = os.read(log.fileno(), 65536)
                assert chunk, started.decode()
                started += chunk
            connections = [http.client.HTTPConnection("127.0.0.1", port, timeout=60) for _ in range(4)]
            for connection in connections:
                connection.connect()
                request = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
                for _ in range(REQUESTS // len(connections) // 100):  # pipelined, a hundred at a time
                    connection.sock.sendall(request * 100)
                    received = b""
                    while received.count(b"\r\n\r\nok\n") < 100:
                        chunk = connection.sock.recv(65536)
                        assert chunk, "the daemon closed the connection"
                        received += chunk
                connection.close()
            text = b""
            while not (found := re.search(rb"([0-9]+) log lines were dropped", text)):
                chunk = os.read(log.fileno(), 65536)
                assert chunk, text[-1000:].decode()
                text += chunk
            assert int(found[1]) > 0
            process.terminate()
            log.read()
            assert process.wait(60) in (0, -signal.SIGTERM)  # twistd ends by the signal that it got
    finally:
        process.kill()
        process.wait()
