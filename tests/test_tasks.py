"""Coroutines that are started, shared, put in a queue, or let run on."""

from __future__ import annotations

import threading
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred
from twisted.trial.unittest import SynchronousTestCase, TestCase

from dockerproxy.tasks import Coalescing, Turns, in_thread, spawn, to_the_end


class Spawning(SynchronousTestCase):
    def test_it_starts_at_once(self) -> None:
        gate: Deferred[None] = Deferred()
        seen: list[str] = []

        async def work() -> str:
            seen.append("begun")
            await gate
            seen.append("ended")
            return "nobody's concern"

        running = spawn(work(), "work")
        self.assertEqual(seen, ["begun"])
        self.assertNoResult(running)
        gate.callback(None)
        self.assertEqual(seen, ["begun", "ended"])

    def test_a_failure_is_logged_and_goes_no_further(self) -> None:
        gate: Deferred[None] = Deferred()

        async def work() -> None:
            await gate

        running = spawn(work(), "work")
        gate.errback(ValueError("trouble"))
        self.assertIsNone(self.successResultOf(running))
        self.assertEqual(len(self.flushLoggedErrors(ValueError)), 1)


class Threads(TestCase):
    async def test_a_function_runs_elsewhere(self) -> None:
        def function(*args: int) -> tuple[int, threading.Thread]:
            return sum(args), threading.current_thread()

        total, thread = await in_thread(reactor, function, 1, 2, 3)
        self.assertEqual(total, 6)
        self.assertIsNot(thread, threading.current_thread())

    async def test_what_it_raises_comes_back(self) -> None:
        def function() -> None:
            raise ValueError("trouble")

        with self.assertRaisesRegex(ValueError, "trouble"):
            await in_thread(reactor, function)

    async def test_it_runs_to_its_end_without_its_caller(self) -> None:
        go, gone = threading.Event(), threading.Event()

        def function() -> None:
            go.wait(20)
            gone.set()

        caller = Deferred.fromCoroutine(in_thread(reactor, function))
        caller.cancel()
        with self.assertRaises(CancelledError):
            await caller
        go.set()
        self.assertTrue(await in_thread(reactor, gone.wait, 20))


class Together(SynchronousTestCase):
    def setUp(self) -> None:
        self.shared: Coalescing[str, Any] = Coalescing()
        self.gates: list[Deferred[Any]] = []

    async def work(self) -> Any:
        self.gates.append(Deferred())
        return await self.gates[-1]

    def ask(self, key: str = "a") -> Deferred[Any]:
        return Deferred.fromCoroutine(self.shared.do(key, self.work))

    def test_once_for_all_who_ask_meanwhile(self) -> None:
        asking = [self.ask() for _ in range(3)]
        self.assertEqual(len(self.gates), 1)
        answer = object()
        self.gates[0].callback(answer)
        for each in asking:
            self.assertIs(self.successResultOf(each), answer)

    def test_each_key_for_itself(self) -> None:
        one, other = self.ask("a"), self.ask("b")
        self.assertEqual(len(self.gates), 2)
        self.gates[1].callback(2)
        self.assertEqual(self.successResultOf(other), 2)
        self.assertNoResult(one)
        self.gates[0].callback(1)
        self.assertEqual(self.successResultOf(one), 1)

    def test_nothing_is_remembered(self) -> None:
        for outcome in (1, ValueError("trouble"), 2):
            asking = self.ask()
            if isinstance(outcome, ValueError):
                self.gates[-1].errback(outcome)
                self.failureResultOf(asking, ValueError)
            else:
                self.gates[-1].callback(outcome)
                self.assertEqual(self.successResultOf(asking), outcome)
            self.assertEqual(self.shared._under_way, {})
        self.assertEqual(len(self.gates), 3)

    def test_work_that_ends_at_once(self) -> None:
        async def work() -> int:
            return 7

        async def trouble() -> int:
            raise ValueError("trouble")

        for _ in range(2):
            self.assertEqual(self.successResultOf(Deferred.fromCoroutine(self.shared.do("a", work))), 7)
            self.failureResultOf(Deferred.fromCoroutine(self.shared.do("a", trouble)), ValueError)

    def test_a_failure_is_everybodys(self) -> None:
        asking = [self.ask() for _ in range(3)]
        self.gates[0].errback(ValueError("trouble"))
        for each in asking:
            self.failureResultOf(each, ValueError)

    def test_one_who_leaves_is_not_noticed(self) -> None:
        first, second, third = self.ask(), self.ask(), self.ask()
        first.cancel()  # for whom it was begun
        third.cancel()
        self.failureResultOf(first, CancelledError)
        self.failureResultOf(third, CancelledError)
        self.assertNoResult(second)
        fourth = self.ask()
        self.assertEqual(len(self.gates), 1)
        self.gates[0].callback(7)
        self.assertEqual((self.successResultOf(second), self.successResultOf(fourth)), (7, 7))

    def test_it_goes_on_when_all_have_left(self) -> None:
        asking = [self.ask(), self.ask()]
        for each in asking:
            each.cancel()
            self.failureResultOf(each, CancelledError)
        late = self.ask()
        self.assertEqual(len(self.gates), 1)
        self.gates[0].callback(7)
        self.assertEqual(self.successResultOf(late), 7)

    def test_a_failure_that_nobody_waits_for_is_nobodys(self) -> None:
        asking = self.ask()
        asking.cancel()
        self.failureResultOf(asking, CancelledError)
        self.gates[0].errback(ValueError("trouble"))
        self.assertEqual(self.flushLoggedErrors(), [])
        self.assertEqual(self.shared._under_way, {})

    def test_one_of_them_asks_anew(self) -> None:
        """It gets new work: what it was just given may be what it does not like."""

        async def twice() -> tuple[Any, Any]:
            return await self.shared.do("a", self.work), await self.shared.do("a", self.work)

        both, other = Deferred.fromCoroutine(twice()), self.ask()
        self.gates[0].callback(1)
        self.assertEqual(self.successResultOf(other), 1)
        self.gates[1].callback(2)
        self.assertEqual(self.successResultOf(both), (1, 2))

    def test_what_a_waiter_does_with_it_is_its_own_affair(self) -> None:
        async def stumble() -> None:
            await self.shared.do("a", self.work)
            raise KeyError("mine")

        stumbling, other = Deferred.fromCoroutine(stumble()), self.ask()
        self.gates[0].callback(1)
        self.failureResultOf(stumbling, KeyError)
        self.assertEqual(self.successResultOf(other), 1)

    def test_thousands(self) -> None:
        asking = [self.ask() for _ in range(5000)]
        self.gates[0].callback(1)
        self.assertEqual({self.successResultOf(each) for each in asking}, {1})


class ToTheEnd(SynchronousTestCase):
    def test_it_gives_what_the_work_gives(self) -> None:
        async def work() -> int:
            return 7

        async def trouble() -> int:
            raise ValueError("trouble")

        self.assertEqual(self.successResultOf(Deferred.fromCoroutine(to_the_end(work(), "work"))), 7)
        self.failureResultOf(Deferred.fromCoroutine(to_the_end(trouble(), "work")), ValueError)
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_it_goes_on_without_its_caller(self) -> None:
        gate: Deferred[None] = Deferred()
        done = []

        async def work() -> None:
            await gate
            done.append(True)

        caller = Deferred.fromCoroutine(to_the_end(work(), "work"))
        caller.cancel()
        self.failureResultOf(caller, CancelledError)
        gate.callback(None)
        self.assertEqual(done, [True])

    def test_a_failure_that_nobody_waits_for_is_logged(self) -> None:
        gate: Deferred[None] = Deferred()

        async def work() -> None:
            await gate

        caller = Deferred.fromCoroutine(to_the_end(work(), "work"))
        caller.cancel()
        self.failureResultOf(caller, CancelledError)
        gate.errback(ValueError("trouble"))
        self.assertEqual(len(self.flushLoggedErrors(ValueError)), 1)


class Waiting(SynchronousTestCase):
    def setUp(self) -> None:
        self.turns = Turns()
        self.seen: list[str] = []

    def take(self, key: str, name: str, gate: Deferred[None]) -> Deferred[None]:
        async def work() -> None:
            async with self.turns.of(key):
                self.seen.append(f"{name} begins")
                await gate
                self.seen.append(f"{name} ends")

        return Deferred.fromCoroutine(work())

    def test_one_at_a_time_in_their_order(self) -> None:
        gates: list[Deferred[None]] = [Deferred() for _ in range(3)]
        running = [self.take("a", str(number), gate) for number, gate in enumerate(gates)]
        other = self.take("b", "other", Deferred())  # kept, or the collector ends it
        self.assertEqual(self.seen, ["0 begins", "other begins"])
        gates[1].callback(None)
        gates[0].errback(ValueError("trouble"))
        self.failureResultOf(running[0], ValueError)
        self.assertEqual(self.seen[2:], ["1 begins", "1 ends", "2 begins"])
        gates[2].callback(None)
        self.successResultOf(running[2])
        self.assertEqual(list(self.turns._locks), ["b"])
        self.assertNoResult(other)

    def test_one_who_gives_up_waiting(self) -> None:
        gate: Deferred[None] = Deferred()
        self.take("a", "first", gate)
        second = self.take("a", "second", Deferred())
        second.cancel()
        self.failureResultOf(second, CancelledError)
        gate.callback(None)
        self.assertEqual(self.seen, ["first begins", "first ends"])
        self.assertEqual(self.turns._locks, {})
