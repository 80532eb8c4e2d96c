"""Transfers: who waits is told when nothing is live, and draining ends after its grace."""

from __future__ import annotations

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from dockerproxy.daemon.transfers import Token, Transfers


class EmptyTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.transfers = Transfers()

    def live(self) -> Token:
        return self.transfers.add(lambda: self.fail("aborted"))

    def test_at_once_when_nothing_is_live(self) -> None:
        self.successResultOf(self.transfers.empty())

    def test_when_the_last_has_ended(self) -> None:
        first, second = self.live(), self.live()
        waiting = [self.transfers.empty(), self.transfers.empty()]
        self.transfers.remove(first)
        for deferred in waiting:
            self.assertNoResult(deferred)
        self.transfers.remove(second)
        for deferred in waiting:
            self.successResultOf(deferred)
        self.assertEqual(len(self.transfers), 0)

    def test_removing_twice_takes_away_nothing_else(self) -> None:
        first, _second = self.live(), self.live()
        self.transfers.remove(first)
        self.transfers.remove(first)
        self.assertEqual(len(self.transfers), 1)

    def test_cancelling_one_leaves_the_others(self) -> None:
        token = self.live()
        cancelled, kept = self.transfers.empty(), self.transfers.empty()
        cancelled.cancel()
        self.failureResultOf(cancelled, CancelledError)
        self.transfers.remove(token)
        self.successResultOf(kept)

    def test_one_that_waits_may_cancel_another(self) -> None:
        token = self.live()
        first, second = self.transfers.empty(), self.transfers.empty()
        first.addCallback(lambda _: second.cancel())
        self.transfers.remove(token)
        self.failureResultOf(second, CancelledError)

    def test_one_that_waits_may_add_a_transfer(self) -> None:
        token = self.live()
        first, second = self.transfers.empty(), self.transfers.empty()
        added: list[Token] = []
        first.addCallback(lambda _: added.append(self.live()))
        self.transfers.remove(token)
        self.assertNoResult(second)
        self.transfers.remove(added[0])
        self.successResultOf(second)


class DrainTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.transfers = Transfers()
        self.clock = Clock()
        self.aborted: list[str] = []

    def live(self, name: str) -> Token:
        return self.transfers.add(lambda: self.aborted.append(name))

    def drain(self, grace: float = 10) -> Deferred[int]:
        return Deferred.fromCoroutine(self.transfers.drain(self.clock, grace))

    def test_nothing_live_ends_at_once(self) -> None:
        self.assertEqual(self.successResultOf(self.drain()), 0)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_ends_with_the_last_transfer(self) -> None:
        token = self.live("a")
        drained = self.drain()
        self.clock.advance(9.9)
        self.assertNoResult(drained)
        self.transfers.remove(token)
        self.assertEqual(self.successResultOf(drained), 0)
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.assertEqual(self.aborted, [])

    def test_aborts_what_outlasts_the_grace_oldest_first(self) -> None:
        ended = self.live("ended")
        self.live("a")
        drained = self.drain()
        self.live("b")
        self.transfers.remove(ended)
        self.clock.advance(9.9)
        self.assertEqual(self.aborted, [])
        self.clock.advance(0.1)
        self.assertEqual(self.successResultOf(drained), 2)
        self.assertEqual(self.aborted, ["a", "b"])

    def test_an_abort_that_removes_itself_and_another(self) -> None:
        tokens: list[Token] = []

        def remove_all() -> None:
            for token in tokens:
                self.transfers.remove(token)

        tokens.append(self.transfers.add(remove_all))
        tokens.append(self.live("b"))
        drained = self.drain()
        self.clock.advance(10)
        self.assertEqual(self.successResultOf(drained), 1)
        self.assertEqual(self.aborted, [])
        self.successResultOf(self.transfers.empty())

    def test_an_abort_that_fails_is_logged_and_the_rest_aborted(self) -> None:
        def fail() -> None:
            raise RuntimeError("no")

        self.transfers.add(fail)
        self.live("b")
        drained = self.drain()
        self.clock.advance(10)
        self.assertEqual(self.successResultOf(drained), 2)
        self.assertEqual(self.aborted, ["b"])
        self.assertEqual(len(self.flushLoggedErrors(RuntimeError)), 1)
