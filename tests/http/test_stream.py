"""A queue of bytes between a transport and a coroutine: order, bounds, ends."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError, Deferred
from twisted.trial.unittest import SynchronousTestCase

from dockerproxy.http.stream import ByteStream


class Tap:
    """What the stream asks of its producer."""

    def __init__(self) -> None:
        self.open = True
        self.turns = 0

    def pauseProducing(self) -> None:
        assert self.open
        self.open = False
        self.turns += 1

    def resumeProducing(self) -> None:
        assert not self.open
        self.open = True
        self.turns += 1


@given(st.lists(st.one_of(st.binary(min_size=1, max_size=50), st.integers(0, 150))), st.integers(0, 100))
def test_nothing_is_lost_and_little_waits(steps: list[bytes | int], high: int) -> None:
    """A step feeds bytes, or reads at least so many. However they alternate, the bytes come out as they went in.

    Who wants more than `high` can have it, and then that is how many may wait.
    """
    tap, given_, got = Tap(), b"", b""
    stream = ByteStream(tap, high=high)
    reading: Deferred[bytes] | None = None

    wanted = 1
    ended = False

    def take(data: bytes) -> None:
        nonlocal got, reading
        assert len(data) >= wanted or ended
        got, reading = got + data, None

    for step in steps:
        if isinstance(step, bytes):
            stream.feed(step)
            given_ += step
        elif reading is None:
            wanted = max(1, step)
            reading = Deferred.fromCoroutine(stream.read(step))
            reading.addCallback(take)
        assert given_.startswith(got)
        assert tap.open == (len(given_) - len(got) <= max(high, wanted))
        assert reading is None or len(given_) - len(got) < wanted
    ended = True
    waited = reading is not None
    stream.finish()
    assert tap.open
    assert not waited or (reading is None and got == given_)


class Reading(SynchronousTestCase):
    def setUp(self) -> None:
        self.tap = Tap()
        self.stream = ByteStream(self.tap, high=10)

    def read(self) -> Deferred[bytes]:
        return Deferred.fromCoroutine(self.stream.read())

    def test_all_that_waits(self) -> None:
        self.stream.feed(b"hello ")
        self.stream.feed(b"world")
        self.assertEqual(self.successResultOf(self.read()), b"hello world")
        self.assertNoResult(self.read())

    def test_as_soon_as_it_comes(self) -> None:
        reading = self.read()
        self.assertTrue(self.stream.starved)
        self.stream.feed(b"hello")
        self.assertEqual(self.successResultOf(reading), b"hello")
        self.assertFalse(self.stream.starved)

    def test_the_end(self) -> None:
        self.stream.feed(b"hello")
        self.stream.finish()
        self.assertTrue(self.stream.ended)
        self.assertEqual(self.successResultOf(self.read()), b"hello")
        self.assertEqual(self.successResultOf(self.read()), b"")
        self.assertEqual(self.successResultOf(self.read()), b"")

    def test_the_end_while_waiting(self) -> None:
        reading = self.read()
        self.stream.finish()
        self.assertEqual(self.successResultOf(reading), b"")
        self.assertFalse(self.stream.starved)

    def test_a_failure_comes_after_what_came_before(self) -> None:
        self.stream.feed(b"hello")
        self.stream.fail(ValueError("trouble"))
        self.assertEqual(self.successResultOf(self.read()), b"hello")
        self.failureResultOf(self.read(), ValueError)
        self.failureResultOf(self.read(), ValueError)

    def test_a_failure_while_waiting(self) -> None:
        reading = self.read()
        self.stream.fail(ValueError("trouble"))
        self.failureResultOf(reading, ValueError)

    def test_only_the_first_end_counts(self) -> None:
        self.stream.finish()
        self.stream.fail(ValueError("trouble"))
        self.assertEqual(self.successResultOf(self.read()), b"")

    def test_a_reader_that_is_cancelled_loses_nothing(self) -> None:
        reading = self.read()
        reading.cancel()
        self.failureResultOf(reading, CancelledError)
        self.assertFalse(self.stream.starved)
        self.stream.feed(b"hello")
        self.assertEqual(self.successResultOf(self.read()), b"hello")

    def test_each_wait_can_be_told_from_the_others(self) -> None:
        seen = set()
        for _ in range(3):
            reading = self.read()
            seen.add(self.stream.waits)
            self.stream.feed(b"x")
            self.successResultOf(reading)
        self.assertEqual(len(seen), 3)

    def test_what_comes_while_it_is_too_little_is_told_apart_too(self) -> None:
        """A client that sends little by little is not one that sends nothing."""
        reading = Deferred.fromCoroutine(self.stream.read(4))
        seen = {self.stream.waits}
        for data in (b"x", b"y", b"z"):
            self.stream.feed(data)
            self.assertTrue(self.stream.starved)
            seen.add(self.stream.waits)
        self.assertEqual(len(seen), 4)
        self.stream.fail(ValueError("trouble"))
        self.assertEqual(self.successResultOf(reading), b"xyz")

    def test_the_end_lets_the_producer_go(self) -> None:
        """What it has then is for whoever comes next: the body's end does not hold the connection."""
        for end in (self.stream.finish, lambda: self.stream.fail(ValueError("trouble"))):
            self.setUp()
            self.stream.feed(b"x" * 11)
            self.assertFalse(self.tap.open)
            end()
            self.assertEqual(len(self.successResultOf(self.read())), 11)
            self.assertTrue(self.tap.open)

    def test_after_the_end_the_producer_is_left_alone(self) -> None:
        self.stream.feed(b"x" * 11)
        self.stream.finish()
        turns = self.tap.turns
        self.tap.open = False  # by somebody else
        self.successResultOf(self.read())
        self.stream.release()
        self.assertEqual(self.tap.turns, turns)

    def test_release(self) -> None:
        self.stream.feed(b"x" * 11)
        self.stream.release()
        self.assertTrue(self.tap.open)
        self.stream.feed(b"more")
        self.assertEqual(self.successResultOf(self.read()), b"more")

    def test_many_tiny_pieces(self) -> None:
        stream = ByteStream(self.tap)
        count = 0
        while self.tap.open:
            stream.feed(b"xy")
            count += 1
        self.assertLess(count, 5000)

    def test_without_a_producer(self) -> None:
        stream = ByteStream(high=1)
        stream.feed(b"hello")
        stream.finish()
        self.assertEqual(self.successResultOf(Deferred.fromCoroutine(stream.read())), b"hello")
