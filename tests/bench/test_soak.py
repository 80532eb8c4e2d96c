"""Detection of growth in a soak test."""

from __future__ import annotations

import random

import pytest

from bench.servers import BenchError
from bench.soak import ProcessSample, find_problems, quarter_medians

PIDS = frozenset({10, 11})
IDLE_SAMPLE = ProcessSample(60_000_000, 20, PIDS)


def make_samples(memory: list[int], descriptors: list[int] | None = None) -> list[ProcessSample]:
    return [ProcessSample(a, b, PIDS) for a, b in zip(memory, descriptors or [50] * len(memory), strict=True)]


def test_first_quarter_is_ignored() -> None:
    assert quarter_medians([1, 1, 5, 7, 6, 6, 9, 11]) == (6, 10)


def test_too_few_samples_are_an_error() -> None:
    with pytest.raises(BenchError):
        quarter_medians([1, 2, 3])


def test_fluctuation_is_not_growth() -> None:
    rng = random.Random(1)
    memory = [rng.randrange(90_000_000, 110_000_000) for _ in range(400)]
    descriptors = [rng.randrange(30, 60) for _ in range(400)]
    assert list(find_problems(make_samples(memory, descriptors), IDLE_SAMPLE, IDLE_SAMPLE)) == []


def test_memory_growth() -> None:
    memory = [100_000_000 + second * 100_000 for second in range(400)]
    (problem,) = find_problems(make_samples(memory), IDLE_SAMPLE, IDLE_SAMPLE)
    assert problem.startswith("memory grew from 114,950,000 to ")


def test_descriptor_growth() -> None:
    (problem,) = find_problems(make_samples([10**8] * 400, list(range(50, 450))), IDLE_SAMPLE, IDLE_SAMPLE)
    assert problem.startswith("descriptors grew from 200 to 400")


def test_leaked_descriptors() -> None:
    (problem,) = find_problems(make_samples([10**8] * 40), IDLE_SAMPLE, ProcessSample(60_000_000, 29, PIDS))
    assert problem == "29 descriptors are open without clients, 20 were open at the start"


def test_idle_memory_may_grow() -> None:
    assert list(find_problems(make_samples([10**8] * 40), IDLE_SAMPLE, ProcessSample(90_000_000, 28, PIDS))) == []


def test_replaced_worker_is_reported() -> None:
    (problem,) = find_problems(
        make_samples([10**8] * 40), IDLE_SAMPLE, ProcessSample(60_000_000, 20, frozenset({10, 12}))
    )
    assert problem == "1 of 2 processes ended"
