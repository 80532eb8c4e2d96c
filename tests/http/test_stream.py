"""ByteStream: order, bounds, and end of stream."""

from __future__ import annotations

import sys

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError, Deferred
from twisted.trial.unittest import SynchronousTestCase

from dockerproxy.errors import TooManyRequests
from dockerproxy.http.stream import BufferBudget, ByteStream


class RecordingProducer:
    """A producer that checks and counts the calls of the stream."""

    def __init__(self) -> None:
        self.resumed = True
        self.call_count = 0

    def pauseProducing(self) -> None:
        assert self.resumed
        self.resumed = False
        self.call_count += 1

    def resumeProducing(self) -> None:
        assert not self.resumed
        self.resumed = True
        self.call_count += 1


@given(st.lists(st.one_of(st.binary(min_size=1, max_size=50), st.integers(0, 150))), st.integers(0, 100))
def test_bytes_are_ordered_and_bounded(steps: list[bytes | int], high: int) -> None:
    """Bytes are read in the order in which they were fed, and the producer is paused above the limit.

    A step feeds bytes, or reads at least the given number. A read of more than `high` bytes raises the limit to that
    number.
    """
    producer, fed, received = RecordingProducer(), b"", b""
    stream = ByteStream(producer, high_water=high)
    reading: Deferred[bytes] | None = None

    at_least = 1
    ended = False

    def on_read(data: bytes) -> None:
        nonlocal received, reading
        assert len(data) >= at_least or ended
        received, reading = received + data, None

    for step in steps:
        if isinstance(step, bytes):
            stream.feed(step)
            fed += step
        elif reading is None:
            at_least = max(1, step)
            reading = Deferred.fromCoroutine(stream.read(step))
            reading.addCallback(on_read)
        assert fed.startswith(received)
        assert producer.resumed == (len(fed) - len(received) <= max(high, at_least))
        assert reading is None or len(fed) - len(received) < at_least
    ended = True
    was_reading = reading is not None
    stream.finish()
    assert producer.resumed
    assert not was_reading or (reading is None and received == fed)


class ByteStreamTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.producer = RecordingProducer()
        self.stream = ByteStream(self.producer, high_water=10)

    def read(self) -> Deferred[bytes]:
        return Deferred.fromCoroutine(self.stream.read())

    def test_read_returns_all_buffered(self) -> None:
        self.stream.feed(b"hello ")
        self.stream.feed(b"world")
        self.assertEqual(self.successResultOf(self.read()), b"hello world")
        self.assertNoResult(self.read())

    def test_pending_read_gets_the_next_chunk(self) -> None:
        reading = self.read()
        self.assertTrue(self.stream.starved)
        self.stream.feed(b"hello")
        self.assertEqual(self.successResultOf(reading), b"hello")
        self.assertFalse(self.stream.starved)

    def test_finish_after_buffered_data(self) -> None:
        self.stream.feed(b"hello")
        self.stream.finish()
        self.assertTrue(self.stream.ended)
        self.assertEqual(self.successResultOf(self.read()), b"hello")
        self.assertEqual(self.successResultOf(self.read()), b"")
        self.assertEqual(self.successResultOf(self.read()), b"")

    def test_finish_ends_a_pending_read(self) -> None:
        reading = self.read()
        self.stream.finish()
        self.assertEqual(self.successResultOf(reading), b"")
        self.assertFalse(self.stream.starved)

    def test_fail_raises_after_buffered_data(self) -> None:
        self.stream.feed(b"hello")
        self.stream.fail(ValueError("trouble"))
        self.assertEqual(self.successResultOf(self.read()), b"hello")
        self.failureResultOf(self.read(), ValueError)
        self.failureResultOf(self.read(), ValueError)

    def test_fail_fails_a_pending_read(self) -> None:
        reading = self.read()
        self.stream.fail(ValueError("trouble"))
        self.failureResultOf(reading, ValueError)

    def test_fail_after_finish_is_ignored(self) -> None:
        self.stream.finish()
        self.stream.fail(ValueError("trouble"))
        self.assertEqual(self.successResultOf(self.read()), b"")

    def test_cancelled_read_loses_no_data(self) -> None:
        reading = self.read()
        reading.cancel()
        self.failureResultOf(reading, CancelledError)
        self.assertFalse(self.stream.starved)
        self.stream.feed(b"hello")
        self.assertEqual(self.successResultOf(self.read()), b"hello")

    def test_counts_the_received_bytes_also_those_that_a_reader_waits_for(self) -> None:
        """The count lets a timeout distinguish a client that sends slowly from one that sends nothing."""
        reading = Deferred.fromCoroutine(self.stream.read(4))
        for count, data in enumerate((b"x", b"y", b"z"), 1):
            self.stream.feed(data)
            self.assertTrue(self.stream.starved)
            self.assertEqual(self.stream.received, count)
        self.stream.fail(ValueError("trouble"))
        self.assertEqual(self.successResultOf(reading), b"xyz")

    def test_end_resumes_the_producer(self) -> None:
        """Bytes after the end of a body belong to the next request, so the transport must not stay paused."""
        for end in (self.stream.finish, lambda: self.stream.fail(ValueError("trouble"))):
            self.setUp()
            self.stream.feed(b"x" * 11)
            self.assertFalse(self.producer.resumed)
            end()
            self.assertEqual(len(self.successResultOf(self.read())), 11)
            self.assertTrue(self.producer.resumed)

    def test_producer_is_not_called_after_the_end(self) -> None:
        self.stream.feed(b"x" * 11)
        self.stream.finish()
        call_count = self.producer.call_count
        self.producer.resumed = False  # paused by another party
        self.successResultOf(self.read())
        self.stream.discard()
        self.assertEqual(self.producer.call_count, call_count)

    def test_discard_drops_buffered_bytes_and_resumes_the_producer(self) -> None:
        self.stream.feed(b"x" * 11)
        self.stream.discard()
        self.assertTrue(self.producer.resumed)
        self.stream.feed(b"more")
        self.assertEqual(self.successResultOf(self.read()), b"more")

    def test_tiny_chunks_take_little_more_than_their_length(self) -> None:
        """A client may send each byte in a segment of its own; a bytes object of one byte takes 34."""
        stream = ByteStream(self.producer)
        while self.producer.resumed:
            stream.feed(b"x")
        pieces = self.successResultOf(Deferred.fromCoroutine(stream.read_pieces()))
        self.assertEqual(sum(map(len, pieces)), 256 * 1024 + 1)
        self.assertLess(sum(map(sys.getsizeof, pieces)) + sys.getsizeof(pieces), 300 * 1024)

    def test_stream_without_a_producer(self) -> None:
        stream = ByteStream(high_water=1)
        stream.feed(b"hello")
        stream.finish()
        self.assertEqual(self.successResultOf(Deferred.fromCoroutine(stream.read())), b"hello")


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 60)), max_size=60))
def test_budget_bounds_streams_with_pending_reads(steps: list[tuple[int, int]]) -> None:
    """A step feeds bytes to a stream, or for 0 bytes ends it. A reader asks each stream for at least 50 bytes.

    A client with less than its part may exceed the limit by that, until the others read.
    """
    budget = BufferBudget("bytes", 100, 80)
    received: dict[int, int] = {}

    async def read(number: int, stream: ByteStream) -> None:
        while pieces := await stream.read_pieces(50):
            received[number] += sum(map(len, pieces))

    def new_stream(number: int) -> ByteStream:
        received[number] = fed[number] = 0
        stream = ByteStream(buffers=budget.of_client(f"client {number % 2}"))
        Deferred.fromCoroutine(read(number, stream))
        return stream

    fed: dict[int, int] = {}
    streams = {number: new_stream(number) for number in range(5)}
    for number, size in steps:
        if size:
            streams[number].feed(bytes(size))
            fed[number] += size
        else:
            streams[number].finish()
            assert received[number] == fed[number]
            streams[number] = new_stream(number)
        assert budget.shares.used == sum(fed.values()) - sum(received.values()) <= 130
        assert all(budget.shares.held_by(f"client {client}") <= 80 for client in (0, 1))


class LimitedProducer(RecordingProducer):
    """A producer that records whether it must read small pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.limited = True

    def limit_reads(self, limited: bool) -> None:
        self.limited = limited


@given(
    st.integers(1, 12),
    st.lists(st.tuples(st.integers(0, 11), st.sampled_from(["transport", "reader", "end"])), max_size=100),
)
def test_budget_bounds_the_transports_of_busy_readers(clients: int, steps: list[tuple[int, str]]) -> None:
    """Each transport reads as much as it may. No reader need wait for bytes: it may be busy with its first ones.

    All clients together exceed their limit by a large piece, and by a small one and what it may buffer for each stream.
    """
    small, large, limit, streams = 16 * 1024, 512 * 1024, 2048 * 1024, 12
    pieces = {True: bytes(small), False: bytes(large)}
    budget = BufferBudget("bytes", limit, limit // 2)
    buffers = [budget.of_client(f"192.0.2.{number % clients}") for number in range(streams)]
    producers = [LimitedProducer() for _ in buffers]

    def new_stream(number: int) -> ByteStream:
        producer = producers[number] = LimitedProducer()
        return ByteStream(producer, buffers=buffers[number], limit_reads=producer.limit_reads)

    bodies = [new_stream(number) for number in range(streams)]
    for number, actor in steps:
        if actor == "transport" and producers[number].resumed:
            bodies[number].feed(pieces[producers[number].limited])
        elif actor == "reader" and bodies[number].buffered:
            reading = Deferred.fromCoroutine(bodies[number].read())
            assert reading.called
        elif actor == "end":
            bodies[number].finish()
            bodies[number].discard()
            bodies[number] = new_stream(number)
        assert budget.shares.used <= limit + large + streams * 2 * small
        held = [budget.shares.held_by(f"192.0.2.{number}") for number in range(clients)]
        assert max(held) <= limit // 2 + large + streams * 2 * small
    for body in bodies:
        body.finish()
    assert budget._unlimited == {}, "an ended stream is still known"


class BufferBudgetTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.budget = BufferBudget("bytes of unread requests", 128 * 1024, 64 * 1024)

    def stream(self, producer: LimitedProducer | None = None, client: str = "192.0.2.1") -> ByteStream:
        limit_reads = None if producer is None else producer.limit_reads
        return ByteStream(producer, buffers=self.budget.of_client(client), limit_reads=limit_reads)

    def read(self, stream: ByteStream) -> Deferred[bytes]:
        return Deferred.fromCoroutine(stream.read(40 * 1024))

    def use(self, size: int, client: str = "192.0.2.1") -> None:
        """Buffer bytes of another stream of `client`."""
        self.budget.of_client(client).add(size)

    def is_limited(self, client: str) -> bool:
        return self.budget.of_client(client).scarce

    def test_pending_reads_of_the_client_return_what_there_is(self) -> None:
        producers = [LimitedProducer() for _ in range(4)]
        streams = [self.stream(producer) for producer in producers[:3]]
        other = self.stream(producers[3], "192.0.2.2")
        reads = [self.read(stream) for stream in (*streams, other)]
        for stream in (*streams[1:], other):
            stream.feed(bytes(30 * 1024))
        self.assertFalse(self.is_limited("192.0.2.1"))
        streams[1].feed(bytes(5 * 1024))
        self.assertEqual([len(self.successResultOf(read)) for read in reads[1:3]], [35 * 1024, 30 * 1024])
        self.assertNoResult(reads[0])
        self.assertNoResult(reads[3])
        self.assertEqual([producer.limited for producer in producers], [True, True, True, False])

    def test_streams_with_a_busy_reader_are_paused_early_and_read_in_small_pieces(self) -> None:
        producer = LimitedProducer()
        stream = self.stream(producer)
        self.use(64 * 1024)
        stream.feed(bytes(16 * 1024))
        self.assertEqual((producer.resumed, producer.limited), (True, True))
        stream.feed(b"x")
        self.assertFalse(producer.resumed)
        self.assertEqual(len(self.successResultOf(self.read(stream))), 16 * 1024 + 1)
        self.assertFalse(producer.resumed, "the reader has not stored the bytes yet")
        self.assertNoResult(self.read(stream))
        self.assertTrue(producer.resumed)

    def test_streams_with_a_busy_reader_are_limited_as_soon_as_another_one_takes_too_much(self) -> None:
        producers = [LimitedProducer() for _ in range(3)]
        first, second = self.stream(producers[0]), self.stream(producers[1])
        self.stream(producers[2], "192.0.2.2")
        first.feed(b"x")
        self.assertEqual([producer.limited for producer in producers], [False, False, False])
        second.feed(bytes(65 * 1024))
        self.assertEqual([producer.limited for producer in producers], [True, True, False])
        self.use(128 * 1024, "192.0.2.3")  # more than all together may have
        self.assertEqual([producer.limited for producer in producers], [True, True, True])

    def test_a_new_stream_is_paused_until_its_reader_waits(self) -> None:
        self.use(65 * 1024)
        producer = LimitedProducer()
        stream = self.stream(producer)
        self.assertFalse(producer.resumed)
        reading = self.read(stream)
        self.assertEqual((producer.resumed, producer.limited), (True, True))
        stream.feed(b"x")
        self.assertEqual(self.successResultOf(reading), b"x")

    def test_the_head_of_the_next_message_is_read_in_small_pieces(self) -> None:
        producer = LimitedProducer()
        stream = self.stream(producer)
        self.assertFalse(producer.limited)
        stream.feed(b"x")
        stream.finish()
        self.assertEqual((producer.resumed, producer.limited), (True, True))
        self.assertEqual(self.successResultOf(self.read(stream)), b"x")

    def test_one_client_beyond_its_share_does_not_limit_another(self) -> None:
        self.use(65 * 1024, "192.0.2.1")
        self.assertTrue(self.is_limited("192.0.2.1"))
        self.assertFalse(self.is_limited("192.0.2.2"))

    def test_clients_with_little_are_not_limited_when_others_have_all(self) -> None:
        for client in ("192.0.2.1", "192.0.2.2"):
            self.use(64 * 1024, client)
        self.use(1024, "192.0.2.3")
        self.assertTrue(self.is_limited("192.0.2.1"))
        self.assertFalse(self.is_limited("192.0.2.3"))
        self.use(60 * 1024, "192.0.2.3")
        self.assertTrue(self.is_limited("192.0.2.3"))

    def test_bytes_count_until_the_reader_asks_for_more(self) -> None:
        stream = self.stream()
        stream.feed(bytes(1000))
        self.successResultOf(self.read_some(stream))
        self.assertEqual(self.budget.shares.used, 1000)
        self.assertNoResult(self.read_some(stream))
        self.assertEqual(self.budget.shares.used, 0)

    def read_some(self, stream: ByteStream) -> Deferred[bytes]:
        return Deferred.fromCoroutine(stream.read())

    def test_a_stream_may_count_for_a_client_later(self) -> None:
        producer = LimitedProducer()
        stream = ByteStream(producer, limit_reads=producer.limit_reads)
        stream.feed(bytes(1000))
        self.assertTrue(producer.limited)
        stream.count_for(self.budget.of_client("192.0.2.1"))
        self.assertEqual((self.budget.shares.used, producer.limited), (1000, False))
        self.successResultOf(self.read_some(stream))
        self.assertNoResult(self.read_some(stream))
        self.assertEqual(self.budget.shares.used, 0)

    def test_collected_bytes_count_until_the_stream_is_dropped(self) -> None:
        stream = self.stream()
        for _ in range(3):
            stream.feed(bytes(1000))
            self.successResultOf(self.read_some(stream))
            stream.retain()
        self.assertEqual(self.budget.shares.used, 3000)
        stream.finish()
        self.assertEqual(self.successResultOf(self.read_some(stream)), b"")
        self.assertEqual(self.budget.shares.used, 3000)
        stream.discard()
        self.assertEqual(self.budget.shares.used, 0)

    def test_a_long_body_that_a_reader_collects_is_refused_if_memory_is_scarce(self) -> None:
        stream = self.stream()
        stream.feed(bytes(63 * 1024))
        self.successResultOf(self.read_some(stream))
        self.use(10 * 1024)
        stream.retain()  # a short one is not
        stream.feed(bytes(2 * 1024))
        self.successResultOf(self.read_some(stream))
        with self.assertRaises(TooManyRequests) as caught:
            stream.retain()
        self.assertIn("65536 bytes of unread requests that one client may have", caught.exception.message)

    def test_bytes_that_nobody_reads_are_released(self) -> None:
        for drop in (ByteStream.discard, lambda stream: None):
            stream = self.stream()
            stream.feed(bytes(1000))
            self.assertEqual(self.budget.shares.used, 1000)
            drop(stream)
            del stream
            self.assertEqual(self.budget.shares.used, 0)

    def test_cancelled_reads_are_forgotten(self) -> None:
        stream = self.stream()
        reading = self.read(stream)
        reading.cancel()
        self.failureResultOf(reading, CancelledError)
        stream.feed(bytes(65 * 1024))  # would make a forgotten read return
        self.assertEqual(self.budget._waiting, {})
        self.assertEqual(self.budget.shares.used, 65 * 1024)
