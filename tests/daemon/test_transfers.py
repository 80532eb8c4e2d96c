"""Transfers: waiters are called when none is left, and draining aborts the rest after the grace period."""

from __future__ import annotations

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from dockerproxy.daemon.transfers import TransferHandle, Transfers


class WhenEmptyTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.transfers = Transfers()

    def add_transfer(self) -> TransferHandle:
        return self.transfers.add(lambda: self.fail("aborted"))

    def test_fires_at_once_without_transfers(self) -> None:
        self.successResultOf(self.transfers.when_empty())

    def test_fires_when_the_last_transfer_ends(self) -> None:
        first, second = self.add_transfer(), self.add_transfer()
        waiters = [self.transfers.when_empty(), self.transfers.when_empty()]
        self.transfers.remove(first)
        for deferred in waiters:
            self.assertNoResult(deferred)
        self.transfers.remove(second)
        for deferred in waiters:
            self.successResultOf(deferred)
        self.successResultOf(self.transfers.when_empty())

    def test_removing_twice_has_no_effect(self) -> None:
        first, _second = self.add_transfer(), self.add_transfer()
        self.transfers.remove(first)
        self.transfers.remove(first)
        self.assertNoResult(self.transfers.when_empty())

    def test_cancelling_one_waiter_leaves_the_others(self) -> None:
        handle = self.add_transfer()
        cancelled, other = self.transfers.when_empty(), self.transfers.when_empty()
        cancelled.cancel()
        self.failureResultOf(cancelled, CancelledError)
        self.transfers.remove(handle)
        self.successResultOf(other)

    def test_a_waiter_may_cancel_another(self) -> None:
        handle = self.add_transfer()
        first, second = self.transfers.when_empty(), self.transfers.when_empty()
        first.addCallback(lambda _: second.cancel())
        self.transfers.remove(handle)
        self.failureResultOf(second, CancelledError)

    def test_a_waiter_may_add_a_transfer(self) -> None:
        handle = self.add_transfer()
        first, second = self.transfers.when_empty(), self.transfers.when_empty()
        handles: list[TransferHandle] = []
        first.addCallback(lambda _: handles.append(self.add_transfer()))
        self.transfers.remove(handle)
        self.assertNoResult(second)
        self.transfers.remove(handles[0])
        self.successResultOf(second)


class DrainTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.transfers = Transfers()
        self.clock = Clock()
        self.aborted: list[str] = []

    def add_transfer(self, name: str) -> TransferHandle:
        return self.transfers.add(lambda: self.aborted.append(name))

    def drain(self, grace: float = 10) -> Deferred[int]:
        return Deferred.fromCoroutine(self.transfers.drain(self.clock, grace))

    def test_ends_at_once_without_transfers(self) -> None:
        self.assertEqual(self.successResultOf(self.drain()), 0)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_ends_with_the_last_transfer(self) -> None:
        handle = self.add_transfer("a")
        drain_result = self.drain()
        self.clock.advance(9.9)
        self.assertNoResult(drain_result)
        self.transfers.remove(handle)
        self.assertEqual(self.successResultOf(drain_result), 0)
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.assertEqual(self.aborted, [])

    def test_aborts_remaining_transfers_oldest_first(self) -> None:
        finished_transfer = self.add_transfer("ended")
        self.add_transfer("a")
        drain_result = self.drain()
        self.add_transfer("b")
        self.transfers.remove(finished_transfer)
        self.clock.advance(9.9)
        self.assertEqual(self.aborted, [])
        self.clock.advance(0.1)
        self.assertEqual(self.successResultOf(drain_result), 2)
        self.assertEqual(self.aborted, ["a", "b"])

    def test_an_abort_that_removes_itself_and_another(self) -> None:
        handles: list[TransferHandle] = []

        def remove_all() -> None:
            for handle in handles:
                self.transfers.remove(handle)

        handles.append(self.transfers.add(remove_all))
        handles.append(self.add_transfer("b"))
        drain_result = self.drain()
        self.clock.advance(10)
        self.assertEqual(self.successResultOf(drain_result), 1)
        self.assertEqual(self.aborted, [])
        self.successResultOf(self.transfers.when_empty())

    def test_an_abort_that_fails_is_logged_and_the_rest_aborted(self) -> None:
        def fail() -> None:
            raise RuntimeError("no")

        self.transfers.add(fail)
        self.add_transfer("b")
        drain_result = self.drain()
        self.clock.advance(10)
        self.assertEqual(self.successResultOf(drain_result), 2)
        self.assertEqual(self.aborted, ["b"])
        self.assertEqual(len(self.flushLoggedErrors(RuntimeError)), 1)
