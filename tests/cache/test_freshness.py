from __future__ import annotations

import re
from typing import Any

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.cache.freshness import Freshness

TIERS = Freshness(
    True,
    re.compile("(stable|nightly|production|test)"), 600,
    re.compile(r"(.*)(\d|\.)+(.*)(\d|\.)+(.*)(\d|\.)+"), 5_184_000,
    3600,
)  # fmt: skip


@pytest.mark.parametrize(
    ("tag", "seconds"),
    [
        ("stable", 600), ("stable-1.2.3", 600), ("nightly", 600), ("test", 600), ("testing", 600),
        ("1.2.3", 5_184_000), ("v1.2.3-alpine", 5_184_000), ("22.04", 5_184_000), ("unstable-1.2.3", 5_184_000),
        ("latest", 3600), ("unstable", 3600), ("1.", 3600), ("v2", 3600), ("STABLE", 3600),
    ],
)  # fmt: skip
def test_tiers(tag: str, seconds: float) -> None:
    assert TIERS.lifetime(tag) == seconds
    assert TIERS.is_fresh(tag, seconds - 1)
    assert not TIERS.is_fresh(tag, seconds)


@given(st.text(), st.floats(allow_nan=False))
def test_disabled(tag: str, age: float) -> None:
    assert not evolve(TIERS, enabled=False).is_fresh(tag, age)


@given(st.sampled_from(["stable", "1.2.3", "latest"]), st.one_of(st.floats(max_value=-1e-9), st.just(float("nan"))))
def test_entry_from_the_future_is_not_fresh(tag: str, age: Any) -> None:
    assert not TIERS.is_fresh(tag, age)
