"""Parsing of the load generator's output."""

from __future__ import annotations

import json

from bench.generator import parse_output

OUTPUT = json.dumps(
    {
        "wall": 2.0,
        "cpu": 0.5,
        "count": 100,
        "resumed": 7,
        "bytes": 6553600,
        "first_byte": [0.001, 0.01],
        "last_byte": [0.002, 0.02],
        "first_byte_times": [0.25, 0.5],
    }
)


def test_medians_and_totals() -> None:
    result = parse_output(OUTPUT, 1.0)
    assert (result.wall, result.clients_cpu, result.server_cpu) == (2.0, 0.5, 1.0)
    assert (result.count, result.resumed, result.bytes) == (100, 7, 6553600)
    assert (result.first_byte, result.last_byte, result.first_byte_times) == (0.001, 0.002, (0.25, 0.5))
