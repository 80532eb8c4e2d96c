"""Helpers for coroutines."""

from __future__ import annotations

import threading
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred
from twisted.trial.unittest import SynchronousTestCase, TestCase

from dockerproxy.concurrency import FirstUse, LocalKeyedLock, SingleFlight, gather, in_thread, shield, spawn


class SpawnTests(SynchronousTestCase):
    def test_starts_immediately(self) -> None:
        gate: Deferred[None] = Deferred()
        events: list[str] = []

        async def work() -> str:
            events.append("begun")
            await gate
            events.append("ended")
            return "an ignored result"

        running = spawn(work(), "work")
        self.assertEqual(events, ["begun"])
        self.assertNoResult(running)
        gate.callback(None)
        self.assertEqual(events, ["begun", "ended"])

    def test_failure_is_logged_and_swallowed(self) -> None:
        gate: Deferred[None] = Deferred()

        async def work() -> None:
            await gate

        running = spawn(work(), "work")
        gate.errback(ValueError("trouble"))
        self.assertIsNone(self.successResultOf(running))
        self.assertEqual(len(self.flushLoggedErrors(ValueError)), 1)


class InThreadTests(TestCase):
    async def test_function_runs_in_another_thread(self) -> None:
        def function(*args: int) -> tuple[int, threading.Thread]:
            return sum(args), threading.current_thread()

        total, thread = await in_thread(reactor, function, 1, 2, 3)
        self.assertEqual(total, 6)
        self.assertIsNot(thread, threading.current_thread())

    async def test_exception_propagates(self) -> None:
        def function() -> None:
            raise ValueError("trouble")

        with self.assertRaisesRegex(ValueError, "trouble"):
            await in_thread(reactor, function)

    async def test_function_finishes_after_cancellation(self) -> None:
        go, finished = threading.Event(), threading.Event()

        def function() -> None:
            go.wait(20)
            finished.set()

        caller = Deferred.fromCoroutine(in_thread(reactor, function))
        caller.cancel()
        with self.assertRaises(CancelledError):
            await caller
        go.set()
        self.assertTrue(await in_thread(reactor, finished.wait, 20))


class FirstUseTests(TestCase):
    async def test_the_first_use_loads_once_in_a_thread(self) -> None:
        threads: list[threading.Thread] = []
        part: FirstUse[list[threading.Thread]]

        def load() -> list[threading.Thread]:
            threads.append(threading.current_thread())
            return threads

        part = FirstUse(reactor, load)
        self.assertIsNone(part.loaded)
        self.assertEqual(threads, [])
        first, second = Deferred.fromCoroutine(part.get()), Deferred.fromCoroutine(part.get())
        self.assertIs(await first, threads)
        self.assertIs(await second, threads)
        self.assertIs(await part.get(), threads)
        self.assertIs(part.loaded, threads)
        [thread] = threads
        self.assertIsNot(thread, threading.current_thread())

    async def test_a_user_that_leaves_does_not_stop_the_others(self) -> None:
        go = threading.Event()
        part = FirstUse(reactor, lambda: go.wait(20))
        leaving, staying = Deferred.fromCoroutine(part.get()), Deferred.fromCoroutine(part.get())
        leaving.cancel()
        go.set()
        with self.assertRaises(CancelledError):
            await leaving
        self.assertTrue(await staying)

    async def test_the_next_use_loads_again_after_a_failure(self) -> None:
        failures = [ImportError("the package is being upgraded")]

        def load() -> str:
            if failures:
                raise failures.pop()
            return "loaded"

        part = FirstUse(reactor, load)
        with self.assertRaisesRegex(ImportError, "upgraded"):
            await part.get()
        self.assertEqual(await part.get(), "loaded")


class SingleFlightTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.single_flight: SingleFlight[str, Any] = SingleFlight()
        self.gates: list[Deferred[Any]] = []

    async def work(self) -> Any:
        self.gates.append(Deferred())
        return await self.gates[-1]

    def start(self, key: str = "a") -> Deferred[Any]:
        return Deferred.fromCoroutine(self.single_flight.do(key, self.work))

    def test_concurrent_calls_share_one_run(self) -> None:
        calls = [self.start() for _ in range(3)]
        self.assertEqual(len(self.gates), 1)
        result = object()
        self.gates[0].callback(result)
        for each in calls:
            self.assertIs(self.successResultOf(each), result)

    def test_keys_are_independent(self) -> None:
        one, other = self.start("a"), self.start("b")
        self.assertEqual(len(self.gates), 2)
        self.gates[1].callback(2)
        self.assertEqual(self.successResultOf(other), 2)
        self.assertNoResult(one)
        self.gates[0].callback(1)
        self.assertEqual(self.successResultOf(one), 1)

    def test_results_are_not_cached(self) -> None:
        for outcome in (1, ValueError("trouble"), 2):
            call = self.start()
            if isinstance(outcome, ValueError):
                self.gates[-1].errback(outcome)
                self.failureResultOf(call, ValueError)
            else:
                self.gates[-1].callback(outcome)
                self.assertEqual(self.successResultOf(call), outcome)
            self.assertEqual(list(self.single_flight), [])
        self.assertEqual(len(self.gates), 3)

    def test_work_that_completes_synchronously(self) -> None:
        async def work() -> int:
            return 7

        async def trouble() -> int:
            raise ValueError("trouble")

        for _ in range(2):
            self.assertEqual(self.successResultOf(Deferred.fromCoroutine(self.single_flight.do("a", work))), 7)
            self.failureResultOf(Deferred.fromCoroutine(self.single_flight.do("a", trouble)), ValueError)

    def test_failure_reaches_all_callers(self) -> None:
        calls = [self.start() for _ in range(3)]
        self.gates[0].errback(ValueError("trouble"))
        for each in calls:
            self.failureResultOf(each, ValueError)

    def test_cancelled_caller_does_not_stop_the_work(self) -> None:
        first, second, third = self.start(), self.start(), self.start()
        first.cancel()  # the caller that started the work
        third.cancel()
        self.failureResultOf(first, CancelledError)
        self.failureResultOf(third, CancelledError)
        self.assertNoResult(second)
        fourth = self.start()
        self.assertEqual(len(self.gates), 1)
        self.gates[0].callback(7)
        self.assertEqual((self.successResultOf(second), self.successResultOf(fourth)), (7, 7))

    def test_work_continues_after_all_callers_are_cancelled(self) -> None:
        calls = [self.start(), self.start()]
        for each in calls:
            each.cancel()
            self.failureResultOf(each, CancelledError)
        late = self.start()
        self.assertEqual(len(self.gates), 1)
        self.gates[0].callback(7)
        self.assertEqual(self.successResultOf(late), 7)

    def test_abandoned_work_is_cancelled_if_asked_for(self) -> None:
        self.single_flight = SingleFlight(cancel_abandoned=True)
        calls = [self.start(), self.start()]
        calls[0].cancel()
        self.failureResultOf(calls[0], CancelledError)
        self.assertFalse(self.gates[0].called)
        calls[1].cancel()
        self.failureResultOf(calls[1], CancelledError)
        self.assertTrue(self.gates[0].called)
        self.assertEqual(list(self.single_flight), [])
        late = self.start()
        self.gates[1].callback(7)
        self.assertEqual(self.successResultOf(late), 7)

    def test_failure_without_callers_is_dropped(self) -> None:
        call = self.start()
        call.cancel()
        self.failureResultOf(call, CancelledError)
        self.gates[0].errback(ValueError("trouble"))
        self.assertEqual(self.flushLoggedErrors(), [])
        self.assertEqual(list(self.single_flight), [])

    def test_second_call_starts_new_work(self) -> None:
        """A caller that calls again starts new work, because it may have rejected the first result."""

        async def twice() -> tuple[Any, Any]:
            return await self.single_flight.do("a", self.work), await self.single_flight.do("a", self.work)

        both, other = Deferred.fromCoroutine(twice()), self.start()
        self.gates[0].callback(1)
        self.assertEqual(self.successResultOf(other), 1)
        self.gates[1].callback(2)
        self.assertEqual(self.successResultOf(both), (1, 2))

    def test_exception_in_one_caller_does_not_affect_others(self) -> None:
        async def raise_afterwards() -> None:
            await self.single_flight.do("a", self.work)
            raise KeyError("raised by the caller")

        failing, other = Deferred.fromCoroutine(raise_afterwards()), self.start()
        self.gates[0].callback(1)
        self.failureResultOf(failing, KeyError)
        self.assertEqual(self.successResultOf(other), 1)

    def test_thousands_of_callers(self) -> None:
        calls = [self.start() for _ in range(5000)]
        self.gates[0].callback(1)
        self.assertEqual({self.successResultOf(each) for each in calls}, {1})


class GatherTests(SynchronousTestCase):
    """Three coroutines that wait, and two runners."""

    def setUp(self) -> None:
        self.waiting: dict[int, Deferred[str]] = {}
        self.cancelled: list[int] = []

    async def work(self, number: int) -> str:
        self.waiting[number] = Deferred(lambda _: self.cancelled.append(number))
        return await self.waiting[number]

    def start(self) -> Deferred[list[str]]:
        return Deferred.fromCoroutine(gather((self.work(number) for number in range(3)), 2))

    def test_results_are_in_the_order_of_the_coroutines(self) -> None:
        gathered = self.start()
        self.assertEqual(list(self.waiting), [0, 1])
        self.waiting[1].callback("b")
        self.waiting[2].callback("c")
        self.assertNoResult(gathered)
        self.waiting[0].callback("a")
        self.assertEqual(self.successResultOf(gathered), ["a", "b", "c"])

    def test_nothing(self) -> None:
        self.assertEqual(self.successResultOf(Deferred.fromCoroutine(gather((), 2))), [])

    def test_a_failure_cancels_the_others(self) -> None:
        gathered = self.start()
        self.waiting[1].errback(ValueError("b"))
        self.failureResultOf(gathered, ValueError)
        self.assertEqual(self.cancelled, [0])
        self.assertNotIn(2, self.waiting)

    def test_a_cancelled_caller_cancels_all(self) -> None:
        gathered = self.start()
        gathered.cancel()
        self.failureResultOf(gathered, CancelledError)
        self.assertEqual(self.cancelled, [0, 1])


class ShieldTests(SynchronousTestCase):
    def test_returns_the_result(self) -> None:
        async def work() -> int:
            return 7

        async def trouble() -> int:
            raise ValueError("trouble")

        self.assertEqual(self.successResultOf(Deferred.fromCoroutine(shield(work(), "work"))), 7)
        self.failureResultOf(Deferred.fromCoroutine(shield(trouble(), "work")), ValueError)
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_work_continues_after_cancellation(self) -> None:
        gate: Deferred[None] = Deferred()
        done = []

        async def work() -> None:
            await gate
            done.append(True)

        caller = Deferred.fromCoroutine(shield(work(), "work"))
        caller.cancel()
        self.failureResultOf(caller, CancelledError)
        gate.callback(None)
        self.assertEqual(done, [True])

    def test_failure_after_cancellation_is_logged(self) -> None:
        gate: Deferred[None] = Deferred()

        async def work() -> None:
            await gate

        caller = Deferred.fromCoroutine(shield(work(), "work"))
        caller.cancel()
        self.failureResultOf(caller, CancelledError)
        gate.errback(ValueError("trouble"))
        self.assertEqual(len(self.flushLoggedErrors(ValueError)), 1)

    def test_expected_failure_after_cancellation_is_not_logged(self) -> None:
        gate: Deferred[None] = Deferred()

        async def work() -> None:
            await gate

        caller = Deferred.fromCoroutine(shield(work(), "work", expected=(KeyError, ValueError)))
        caller.cancel()
        self.failureResultOf(caller, CancelledError)
        gate.errback(ValueError("trouble"))
        self.assertEqual(self.flushLoggedErrors(), [])


class LocalKeyedLockTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.lock = LocalKeyedLock()
        self.events: list[str] = []

    def acquire(self, key: str, name: str, gate: Deferred[None]) -> Deferred[None]:
        async def work() -> None:
            async with self.lock.hold(key):
                self.events.append(f"{name} begins")
                await gate
                self.events.append(f"{name} ends")

        return Deferred.fromCoroutine(work())

    def test_holders_are_served_in_order(self) -> None:
        gates: list[Deferred[None]] = [Deferred() for _ in range(3)]
        running = [self.acquire("a", str(number), gate) for number, gate in enumerate(gates)]
        other = self.acquire("b", "other", Deferred())  # keep a reference, or the collector closes the coroutine
        self.assertEqual(self.events, ["0 begins", "other begins"])
        gates[1].callback(None)
        gates[0].errback(ValueError("trouble"))
        self.failureResultOf(running[0], ValueError)
        self.assertEqual(self.events[2:], ["1 begins", "1 ends", "2 begins"])
        gates[2].callback(None)
        self.successResultOf(running[2])
        self.assertEqual(list(self.lock._locks), ["b"])
        self.assertNoResult(other)

    def test_cancelled_waiter_is_skipped(self) -> None:
        gate: Deferred[None] = Deferred()
        self.acquire("a", "first", gate)
        second = self.acquire("a", "second", Deferred())
        second.cancel()
        self.failureResultOf(second, CancelledError)
        gate.callback(None)
        self.assertEqual(self.events, ["first begins", "first ends"])
        self.assertEqual(self.lock._locks, {})
