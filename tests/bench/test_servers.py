"""A server's ports, and what its processes have in memory."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

from bench.servers import Server, free_port

_SIZE = 64 << 20
# It ends with its parent, whose end of the pipe is then closed.
_PROGRAM = f"""
import os, signal, socket, sys
memory = bytearray(b"x") * {_SIZE}
ours, theirs = os.pipe()
if not os.fork():
    os.close(theirs)
    os.read(ours, 1)
    os._exit(0)
listening = socket.create_server(("127.0.0.1", int(sys.argv[1])))
signal.pause()
"""


def test_pages_that_processes_share_are_counted_once(tmp_path: Path) -> None:
    port = free_port()
    with Server([sys.executable, "-c", _PROGRAM, str(port)], tmp_path, {}, [port]) as server:
        assert len(server.processes()) == 2
        assert server.resident() > 2 * _SIZE
        assert _SIZE < server.shared_once() < server.resident() - _SIZE


def test_a_port_is_given_once() -> None:
    """A server is given several before it listens on the first."""
    first = free_port()
    with socket.create_server(("127.0.0.1", first + 1)):
        others = [free_port() for _ in range(100)]
    assert len({first, first + 1, *others}) == 102
