"""The number of examples of a hypothesis test that does not have the usual one."""

from __future__ import annotations

from hypothesis import settings

_USUAL = 100


def examples(number: int) -> int:
    """Return `number`, or the part of it that the profile has of the usual number: the fast one has a fifth."""
    return max(1, number * settings().max_examples // _USUAL)
