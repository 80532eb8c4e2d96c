"""What the load generator prints, read."""

from __future__ import annotations

import json

from bench.generator import read

OUTPUT = json.dumps(
    {
        "wall": 2.0,
        "cpu": 0.5,
        "count": 100,
        "resumed": 7,
        "bytes": 6553600,
        "first": [0.001, 0.01],
        "whole": [0.002, 0.02],
        "firsts": [0.25, 0.5],
    }
)


def test_medians_and_totals() -> None:
    done = read(OUTPUT, 1.0)
    assert (done.wall, done.clients_cpu, done.server_cpu) == (2.0, 0.5, 1.0)
    assert (done.count, done.resumed, done.bytes) == (100, 7, 6553600)
    assert (done.first, done.whole, done.firsts) == (0.001, 0.002, (0.25, 0.5))
