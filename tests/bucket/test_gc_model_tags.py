"""Every interleaving of two pushes that give tags to a manifest, and of runs that collect manifests without tags.

The manifest is there, and old. Only a tag makes it needed, and a push writes that *after* its look at the runs. So a
push writes the link to the manifest again, the second mark lets off young ones, and it looks at the age before it
looks at the tags. Each weakened variant must lose an acknowledged push.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from attrs import frozen

from tests.bucket.support.explorer import Exploration, explore

pytestmark = pytest.mark.slow  # explores thousands of states

RUNS = 2
NO_DECISION, RESCUED, DELETING = range(3)

Step = tuple[str, "State"]


class State(NamedTuple):
    manifest: bool = True
    is_young: bool = False
    condemned_by: int = 0
    decisions: tuple[int, ...] = (NO_DECISION,) * RUNS
    gone: tuple[bool, ...] = (False,) * RUNS
    deletes: int = 0
    tags: tuple[bool, ...] = (False, False)
    acknowledged: tuple[bool, ...] = (False, False)
    collector: tuple[str, int] = ("idle", 0)
    pushes: tuple[tuple[str, int], ...] = (("link", 0), ("link", 0))


def put(values: tuple[Any, ...], position: int, value: Any) -> tuple[Any, ...]:
    return (*values[:position], value, *values[position + 1 :])


@frozen
class Model:
    weakened: str = ""

    def explore(self) -> Exploration[State]:
        return explore(State(), self.steps, lambda state: any(state.acknowledged) and not state.manifest)

    def steps(self, state: State) -> Iterator[Step]:
        at, run = state.collector
        if state.deletes:
            yield "store: DELETE applied", state._replace(manifest=False, is_young=False, deletes=0)
            if at == "dead":
                yield "store: DELETE lost", state._replace(deletes=0)
        # A push takes less than the grace period from the link to its tag, so none is under way when that has passed.
        if state.is_young and all(push in ("link", "acknowledged", "failed") for push, _ in state.pushes):
            yield "the grace period passes", state._replace(is_young=False)
        yield from self.collector_steps(state, at, run)
        for number in (0, 1):
            for name, following in self.push_steps(state, number):
                yield f"push {number + 1}: {name}", following

    def collector_steps(self, state: State, at: str, run: int) -> Iterator[Step]:
        tags_first = self.weakened == "tags first"

        def go(to: str, run: int = run, **changes: Any) -> State:
            return state._replace(collector=(to, run), **changes)

        match at:
            case "idle" if run < RUNS:
                is_needed = any(state.tags) or state.is_young or not state.manifest
                yield "gc: mark", go("idle" if is_needed else "publish", run + 1)
            case "publish":
                yield "gc: publishes", go("tag 1" if tags_first else "age", condemned_by=run)
            case "age":
                is_let_off = state.is_young and self.weakened != "no age"
                yield "gc: looks at the age", go("end" if is_let_off else "decide" if tags_first else "tag 1")
            case "tag 1":
                yield "gc: looks at the first tag", go("end" if state.tags[0] else "tag 2")
            case "tag 2":
                following = "end" if state.tags[1] else "age" if tags_first else "decide"
                yield "gc: looks at the second tag", go(following)
            case "decide" if state.decisions[run - 1] == NO_DECISION:
                yield "gc: creates deleting", go("delete", decisions=put(state.decisions, run - 1, DELETING))
            case "decide":
                yield "gc: finds rescued", go("end")
            case "delete":
                yield "gc: sends DELETE", go("wait", deletes=run)
            case "wait" if not state.deletes:
                yield "gc: writes gone", go("end", gone=put(state.gone, run - 1, True))
            case "end":
                yield "gc: ends the run", go("idle", condemned_by=0)
            case "dead" if not state.deletes:
                yield "gc: the run is pronounced dead", go("idle", condemned_by=0)
        if at not in ("idle", "dead"):
            yield "gc: dies", go("dead")

    def push_steps(self, state: State, number: int) -> Iterator[Step]:
        at, run = state.pushes[number]

        def go(to: str, run: int = run, **changes: Any) -> State:
            return state._replace(pushes=put(state.pushes, number, (to, run)), **changes)

        match at:
            case "link":
                is_young = state.is_young if self.weakened == "no rewriting" and state.manifest else True
                yield "writes the link", go("look", manifest=True, is_young=is_young)
            case "look":
                yield "looks at the runs", go("count" if state.condemned_by else "there", state.condemned_by)
            case "count" if state.decisions[run - 1] == NO_DECISION:
                yield "creates rescued", go("there", decisions=put(state.decisions, run - 1, RESCUED))
            case "count" if state.decisions[run - 1] == RESCUED:
                yield "finds rescued", go("there")
            case "count" if state.gone[run - 1] or (state.collector[0] == "dead" and not state.deletes):
                yield "waited until it is gone", go("link again")
            case "count":
                yield "503", go("failed", 0)
            case "link again":
                yield "writes the link again", go("there", manifest=True, is_young=True)
            case "there":
                yield "looks for the manifest", go("tag" if state.manifest else "failed")
            case "tag":
                yield "writes the tag", go("respond", tags=put(state.tags, number, True))
            case "respond":
                yield "201", go("acknowledged", acknowledged=put(state.acknowledged, number, True))


def test_no_acknowledged_tag_is_lost() -> None:
    exploration = Model().explore()
    assert exploration.violation is None
    assert exploration.count(lambda state: all(state.acknowledged)) > 100
    assert exploration.count(lambda state: not state.manifest) > 100, "the manifest does go"


@pytest.mark.parametrize("weakened", ["no age", "tags first", "no rewriting"])
def test_each_rule_is_needed(weakened: str) -> None:
    violation = Model(weakened).explore().violation
    assert violation is not None
    assert "gc: sends DELETE" in violation
