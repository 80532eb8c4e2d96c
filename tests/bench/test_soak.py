"""What a soak complains of."""

from __future__ import annotations

import random

import pytest

from bench.servers import BenchError
from bench.soak import Sample, complaints, growth

PROCESSES = frozenset({10, 11})
REST = Sample(60_000_000, 20, PROCESSES)


def samples(memory: list[int], descriptors: list[int] | None = None) -> list[Sample]:
    return [Sample(a, b, PROCESSES) for a, b in zip(memory, descriptors or [50] * len(memory), strict=True)]


def test_the_first_quarter_is_for_warming_up() -> None:
    assert growth([1, 1, 5, 7, 6, 6, 9, 11]) == (6, 10)


def test_too_short_a_soak_says_nothing() -> None:
    with pytest.raises(BenchError):
        growth([1, 2, 3])


def test_what_goes_up_and_down_is_no_growth() -> None:
    chance = random.Random(1)
    memory = [chance.randrange(90_000_000, 110_000_000) for _ in range(400)]
    descriptors = [chance.randrange(30, 60) for _ in range(400)]
    assert list(complaints(samples(memory, descriptors), REST, REST)) == []


def test_memory_that_grows() -> None:
    memory = [100_000_000 + second * 100_000 for second in range(400)]
    (complaint,) = complaints(samples(memory), REST, REST)
    assert complaint.startswith("memory grew from 114,950,000 to ")


def test_descriptors_that_grow() -> None:
    (complaint,) = complaints(samples([10**8] * 400, list(range(50, 450))), REST, REST)
    assert complaint.startswith("descriptors grew from 200 to 400")


def test_descriptors_that_clients_leave_behind() -> None:
    (complaint,) = complaints(samples([10**8] * 40), REST, Sample(60_000_000, 29, PROCESSES))
    assert complaint == "29 descriptors are open without clients; 20 were at the start"


def test_memory_at_rest_may_be_more_than_at_the_start() -> None:
    assert list(complaints(samples([10**8] * 40), REST, Sample(90_000_000, 28, PROCESSES))) == []


def test_a_worker_that_ended_and_is_replaced() -> None:
    (complaint,) = complaints(samples([10**8] * 40), REST, Sample(60_000_000, 20, frozenset({10, 12})))
    assert complaint == "1 of 2 processes ended"
