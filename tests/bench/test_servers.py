"""The ports of a server, and the memory of its processes."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from bench import servers
from bench.servers import BenchServer, free_port, share_ports

_SIZE = 64 << 20
# The child ends with its parent, because the parent's end of the pipe is closed then.
_PROGRAM = f"""
import os, signal, socket, sys
memory = bytearray(b"x") * {_SIZE}
child_end, parent_end = os.pipe()
if not os.fork():
    os.close(parent_end)
    os.read(child_end, 1)
    os._exit(0)
listening = socket.create_server(("127.0.0.1", int(sys.argv[1])))
signal.pause()
"""


def test_shared_pages_are_counted_once(tmp_path: Path) -> None:
    port = free_port()
    with BenchServer([sys.executable, "-c", _PROGRAM, str(port)], tmp_path, {}, [port]) as server:
        assert len(server.pids()) == 2
        assert server.resident_bytes() > 2 * _SIZE
        assert _SIZE < server.unique_resident_bytes() < server.resident_bytes() - _SIZE


def test_free_ports_are_unique() -> None:
    """A server is given several ports before it listens on the first."""
    first_port = free_port()
    with socket.create_server(("127.0.0.1", first_port + 1)):
        other_ports = [free_port() for _ in range(100)]
    assert len({first_port, first_port + 1, *other_ports}) == 102


def test_processes_that_share_the_ports_choose_different_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "_port_numbers", servers._port_numbers)
    chosen = []
    for part in range(3):
        share_ports(part, 3)
        chosen.append({free_port() for _ in range(100)})
    assert len(set().union(*chosen)) == 300
    assert max(chosen[0]) < min(chosen[1]) and max(chosen[1]) < min(chosen[2])
