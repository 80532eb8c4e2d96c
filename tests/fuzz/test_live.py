"""A few hundred mutated connections to a running daemon; `make fuzz` makes more."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.live import DOORS, fuzzed_daemon, run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("workers", [1, 2])
def test_a_daemon_survives_mutated_connections(tmp_path: Path, workers: int) -> None:
    with fuzzed_daemon(tmp_path, workers, seed=1) as daemon:
        assert run(daemon, 1, count=300) == 300


def test_every_door_is_open(tmp_path: Path) -> None:
    """Otherwise the fuzzer would find nothing, because it ignores connections that fail."""
    with fuzzed_daemon(tmp_path, 1, seed=1) as daemon:
        for name, door in DOORS.items():
            with door.connect(daemon) as connection:
                connection.sendall(door.requests[0])
                first = connection.recv(5)
            assert first.startswith(b"\x16" if name == "TLS handshake" else b"HTTP/"), name
