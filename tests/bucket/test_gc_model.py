"""Every interleaving of two pushes and the runs of garbage collection, over a store that has only strong reads, whole
writes, DELETE, and objects that one of several writers creates.

There is one content, and a manifest of each push needs it. A push that was acknowledged must never lack the content.
The collector may die at each step, and a DELETE that it has sent may be applied late, or never. `gc_runs` has the
protocol in words. Each rule of it is left out in a weakened variant, which must lose a push: else the model shows
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from attrs import frozen

from tests.bucket.support.explorer import Exploration, explore

pytestmark = pytest.mark.slow  # explores a hundred thousand states

RUNS, TRIES = 2, 2
NO_DECISION, RESCUED, DELETING = range(3)

Step = tuple[str, "State"]


class Collector(NamedTuple):
    at: str = "idle"
    run: int = 0
    seen: bool = False


class Push(NamedTuple):
    at: str = "head"
    known: int = 0
    """The run that its node knows to have condemned the content; 0 if none."""
    tries: int = 0


class State(NamedTuple):
    content: bool = True
    condemned_by: int = 0
    """The run that has condemned the content and has not ended; 0 if none."""
    decisions: tuple[int, ...] = (NO_DECISION,) * RUNS
    gone: tuple[bool, ...] = (False,) * RUNS
    deletes: int = 0
    """The run with a DELETE that may still be applied; 0 if there is none."""
    manifests: tuple[bool, ...] = (False, False)
    acknowledged: tuple[bool, ...] = (False, False)
    collector: Collector = Collector()
    pushes: tuple[Push, ...] = (Push(), Push())


def put(values: tuple[Any, ...], position: int, value: Any) -> tuple[Any, ...]:
    return (*values[:position], value, *values[position + 1 :])


@frozen
class Model:
    """The protocol, without the rules in `weakened`. With `same`, both push the same manifest."""

    weakened: str = ""
    same: bool = False

    def explore(self) -> Exploration[State]:
        return explore(State(), self.steps, self.is_violated)

    def is_violated(self, state: State) -> bool:
        return any(
            state.acknowledged[number] and not (state.content and state.manifests[self.manifest(number)])
            for number in (0, 1)
        )

    def manifest(self, push: int) -> int:
        return 0 if self.same else push

    def steps(self, state: State) -> Iterator[Step]:
        yield from self.store_steps(state)
        yield from self.collector_steps(state)
        for number in (0, 1):
            for name, following in self.push_steps(state, number):
                yield f"push {number + 1}: {name}", following

    def store_steps(self, state: State) -> Iterator[Step]:
        if state.deletes:
            yield "store: DELETE applied", state._replace(content=False, deletes=0)
            if state.collector.at == "dead":
                yield "store: DELETE lost", state._replace(deletes=0)

    def collector_steps(self, state: State) -> Iterator[Step]:
        at, run = state.collector.at, state.collector.run

        def go(to: str, run: int = run, seen: bool = False, **changes: Any) -> State:
            return state._replace(collector=Collector(to, run, seen), **changes)

        match at:
            case "idle" if run < RUNS:
                yield "gc: mark, first manifest", go("mark", run + 1, state.manifests[0])
            case "mark":
                is_needed = state.collector.seen or state.manifests[1]
                yield "gc: mark, second manifest", go("idle" if is_needed else "publish")
            case "publish":
                following = "decide" if self.weakened == "no second mark" else "mark again"
                yield "gc: publishes", go(following, condemned_by=run)
            case "mark again":
                yield "gc: second mark, first manifest", go("mark again 2", seen=state.manifests[0])
            case "mark again 2":
                is_needed = state.collector.seen or state.manifests[1]
                yield "gc: second mark, second manifest", go("end" if is_needed else "decide")
            case "decide" if self.weakened == "no decision" or state.decisions[run - 1] == NO_DECISION:
                yield "gc: creates deleting", go("delete", decisions=put(state.decisions, run - 1, DELETING))
            case "decide":
                yield "gc: finds rescued", go("end")
            case "delete":
                yield "gc: sends DELETE", go("wait", deletes=run)
            case "wait" if not state.deletes or self.weakened == "early gone":
                yield "gc: writes gone", go("end", gone=put(state.gone, run - 1, True))
            case "end":
                yield "gc: ends the run", go("idle", condemned_by=0)
            case "dead" if not state.deletes:
                yield "gc: the run is pronounced dead", go("idle", condemned_by=0)
        if at not in ("idle", "dead"):
            yield "gc: dies", go("dead")

    def push_steps(self, state: State, number: int) -> Iterator[Step]:
        push = state.pushes[number]
        run = push.known
        decision = state.decisions[run - 1] if run else NO_DECISION

        def go(to: str, known: int = run, tries: int = push.tries, **changes: Any) -> State:
            return state._replace(pushes=put(state.pushes, number, Push(to, known, tries)), **changes)

        def fail(**changes: Any) -> State:
            return go("head" if push.tries + 1 < TRIES else "gave up", 0, push.tries + 1, **changes)

        def rescue(to: str) -> State:
            return go(to, decisions=put(state.decisions, run - 1, RESCUED))

        is_settled = decision == RESCUED or (run and state.gone[run - 1])
        match push.at:
            case "head" | "upload" as at:
                yield (
                    f"{at}, its node knows",
                    go(f"{at}: count" if state.condemned_by else f"{at}: look", state.condemned_by),
                )
                if state.condemned_by:
                    yield f"{at}, its node does not know yet", go(f"{at}: look", 0)
            case "head: count" | "upload: count" | "check: count" as at if decision == NO_DECISION and (
                self.weakened != "no decision" or at != "check: count"
            ):
                yield f"{at} creates rescued", rescue(at.replace("count", "look"))
            case "head: count" | "upload: count" | "check: count" as at if is_settled or self.weakened == "no decision":
                yield f"{at} reads the decision", go(at.replace("count", "look"))
            case "head: count":
                yield "head: 404, it is being deleted", go("upload")
            case "upload: count" if state.collector.at == "dead" and not state.deletes:
                yield "upload: writes gone for the dead", go("upload: look", gone=put(state.gone, run - 1, True))
            case "check: count" if self.weakened == "undo":
                manifests = put(state.manifests, self.manifest(number), False)
                yield "check: removes the manifest again", fail(manifests=manifests)
            case "check: count":
                yield "check: 404, it is being deleted", fail()
            case "head: look":
                yield f"head: {state.content}", go("manifest" if state.content else "upload")
            case "upload: look":
                if state.content:
                    yield "upload: it is there", go("manifest")
                yield "upload: PUT", go("manifest", content=True)
            case "manifest":
                manifests = put(state.manifests, self.manifest(number), True)
                following = "check: look" if self.weakened == "no fresh look" else "look"
                yield "writes the manifest", go(following, manifests=manifests)
            case "look":
                yield (
                    "looks at the runs",
                    go("check: count" if state.condemned_by else "check: look", state.condemned_by),
                )
            case "check: look" if state.content:
                yield "201", go("acknowledged", 0, acknowledged=put(state.acknowledged, number, True))
            case "check: look":
                yield "check: 404", fail()


@pytest.mark.parametrize("same", [False, True], ids=["two manifests", "one manifest"])
def test_no_acknowledged_push_is_lost(same: bool) -> None:
    exploration = Model(same=same).explore()
    assert exploration.violation is None
    assert exploration.count(lambda state: all(state.acknowledged)) > 200
    assert exploration.count(lambda state: not state.content) > 1000, "the content does go"
    assert exploration.count(lambda state: RESCUED in state.decisions) > 1000


@pytest.mark.parametrize("weakened", ["no second mark", "no fresh look", "no decision", "early gone", "undo"])
def test_each_rule_is_needed(weakened: str) -> None:
    # Only two pushes of the same manifest can take it away from each other.
    exploration = Model(weakened, same=weakened == "undo").explore()
    assert exploration.violation is not None
    assert "gc: sends DELETE" in exploration.violation or weakened == "undo"
