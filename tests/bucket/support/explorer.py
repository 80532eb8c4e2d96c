"""Explores all states of a small model, breadth first, so that a trail to a violation is as short as possible."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Generic, TypeVar

from attrs import frozen

S = TypeVar("S", bound=Hashable)


@frozen
class Exploration(Generic[S]):
    """All states that were reached, or those up to a violation, with the steps that led to it."""

    states: frozenset[S]
    violation: tuple[str, ...] | None

    def count(self, predicate: Callable[[S], bool]) -> int:
        """Return the number of states for which `predicate` is true."""
        return sum(map(predicate, self.states))


def explore(
    start: S, steps: Callable[[S], Iterable[tuple[str, S]]], is_violated: Callable[[S], bool]
) -> Exploration[S]:
    """Explore the states that `steps` leads to from `start`."""
    parents: dict[S, tuple[str, S] | None] = {start: None}
    queue = deque([start])
    while queue:
        state = queue.popleft()
        if is_violated(state):
            return Exploration(frozenset(parents), tuple(reversed(list(_trail(parents, state)))))
        for name, following in steps(state):
            if following not in parents:
                parents[following] = (name, state)
                queue.append(following)
    return Exploration(frozenset(parents), None)


def _trail(parents: dict[S, tuple[str, S] | None], state: S) -> Iterator[str]:
    while (parent := parents[state]) is not None:
        name, state = parent
        yield name
