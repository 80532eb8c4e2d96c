"""One connection on a transport of strings: what it makes of whatever a server may send, and when."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from dockerproxy.errors import UpstreamBroken, UpstreamTimeout
from dockerproxy.upstream.connection import Connection, Dropped, Outgoing, Response, Timeouts
from dockerproxy.upstream.wire import MAX_HEAD

GET = Outgoing("GET", "http://a/", b"GET / HTTP/1.1\r\n\r\n")
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"


class Endless:
    """A body that goes on when told."""

    length = 1000

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.done: Deferred[None] = Deferred()

    def startProducing(self, consumer: Any) -> Deferred[None]:
        self.consumer = consumer
        return self.done

    def pauseProducing(self) -> None:
        self.calls.append("pause")

    def resumeProducing(self) -> None:
        self.calls.append("resume")

    def stopProducing(self) -> None:
        self.calls.append("stop")


class ConnectionTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.idle = 0
        self.gone = 0
        self.wire = StringTransport()
        self.connection = Connection(self.clock, "a:80", None, Timeouts(20, 30, 40), self, "key")
        self.connection.makeConnection(self.wire)
        self.successResultOf(self.connection.opened)

    def released(self, connection: Connection) -> None:
        self.idle += 1

    def lost(self, connection: Connection) -> None:
        self.gone += 1

    def ask(self, request: Outgoing = GET) -> Deferred[Response]:
        return self.connection.exchange(request)

    def receive(self, data: bytes) -> None:
        self.connection.dataReceived(data)

    def read(self, response: Response) -> bytes:
        return self.successResultOf(Deferred.fromCoroutine(response.read_all(1 << 20)))

    def lose(self, kind: type[Exception] = ConnectionDone) -> None:
        self.connection.connectionLost(Failure(kind()))

    def test_any_cut_gives_the_same(self) -> None:
        interim = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n"
        chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;x=y\r\nhe\r\n3\r\nllo\r\n0\r\nA: b\r\n\r\n"
        for answer in (OK, chunked, interim + OK, interim + chunked):
            for size in range(1, len(answer) + 1):
                waiting = self.ask()
                for start in range(0, len(answer), size):
                    self.receive(answer[start : start + size])
                self.assertEqual(self.read(self.successResultOf(waiting)), b"hello")
        self.assertEqual(self.idle, sum(map(len, (OK, chunked, interim + OK, interim + chunked))))
        self.assertFalse(self.wire.disconnecting)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_closes_after_answers_that_say_so(self) -> None:
        for line in (b"Connection: Close\r\n", b"connection: x, close\r\n"):
            self.setUp()
            waiting = self.ask()
            self.receive(OK.replace(b"\r\n\r\n", b"\r\n" + line + b"\r\n", 1))
            self.assertEqual(self.read(self.successResultOf(waiting)), b"hello")
            self.assertTrue(self.wire.disconnecting)
            self.assertEqual(self.idle, 0)
        self.setUp()
        waiting = self.ask()
        self.receive(OK.replace(b"1.1", b"1.0", 1))
        self.assertTrue(self.wire.disconnecting)

    def test_bytes_behind_an_answer_are_not_the_next_one(self) -> None:
        for answer in (OK + OK, OK + b"x", b"HTTP/1.1 204 No\r\n\r\nx"):
            self.setUp()
            waiting = self.ask()
            self.receive(answer)
            self.successResultOf(waiting)
            self.assertEqual(self.idle, 0)
            self.assertTrue(self.wire.disconnecting)

    def test_bytes_that_nobody_asked_for(self) -> None:
        waiting = self.ask()
        self.receive(OK)
        self.successResultOf(waiting)
        self.receive(OK)
        self.assertTrue(self.wire.disconnected)
        self.assertFalse(self.connection.alive)

    def test_refuses_what_is_no_answer(self) -> None:
        broken = [
            b"SSH-2.0-x\r\n\r\n",
            b"HTTP/2 200\r\n\r\n",
            b"HTTP/1.1 20 OK\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nnocolon\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nA: b\r\n folded\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nA : b\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nA: b\nB: c\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: +1\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: \r\n\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nA: " + b"x" * MAX_HEAD,
            b"HTTP/1.1 100 Continue\r\n\r\n" * (MAX_HEAD // 20),
        ]
        for answer in broken:
            self.setUp()
            waiting = self.ask()
            self.receive(answer)
            error = self.failureResultOf(waiting, UpstreamBroken).value
            self.assertTrue(str(error).startswith("a:80: "), error)
            self.assertTrue(self.wire.disconnected)

    def test_chunks_that_are_none(self) -> None:
        waiting = self.ask()
        self.receive(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nabc\r\n")
        reading = Deferred.fromCoroutine(self.successResultOf(waiting).read_all(9))
        self.assertIn("framing", str(self.failureResultOf(reading, UpstreamBroken).value))

    def test_repeated_equal_lengths_are_one(self) -> None:
        waiting = self.ask()
        self.receive(OK.replace(b"\r\n\r\n", b"\r\nContent-Length: 5\r\n\r\n", 1))
        self.assertEqual(self.successResultOf(waiting).length, 5)

    def test_both_framings_end_the_connection(self) -> None:
        waiting = self.ask()
        self.receive(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n")
        response = self.successResultOf(waiting)
        self.assertIs(response.length, None)
        self.assertEqual(self.read(response), b"a")
        self.assertEqual(self.idle, 0)

    def test_back_pressure(self) -> None:
        waiting = self.ask()
        self.receive(b"HTTP/1.1 200 OK\r\nContent-Length: 600000\r\n\r\n")
        response = self.successResultOf(waiting)
        self.receive(bytes(262144))
        self.assertEqual(self.wire.producerState, "producing")
        self.receive(bytes(1))
        self.assertEqual(self.wire.producerState, "paused")
        self.clock.advance(3600)  # a slow reader of ours is no stall of theirs
        self.assertEqual(len(self.successResultOf(Deferred.fromCoroutine(response.read_chunk()))), 262145)
        self.assertEqual(self.wire.producerState, "producing")
        self.clock.advance(29)
        self.receive(bytes(600000 - 262145))
        self.assertEqual(self.idle, 1)
        self.assertEqual(self.wire.producerState, "producing")  # ready for the next exchange
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_larger_pieces_are_a_matter_of_moments(self) -> None:
        asked = self.ask()
        self.receive(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n")
        response = self.successResultOf(asked)

        def read() -> Deferred[list[bytes]]:
            return Deferred.fromCoroutine(response.read_pieces(1000, 0.5))

        reading = read()
        self.receive(b"a" * 600)
        self.assertNoResult(reading)
        self.receive(b"b" * 600)
        self.assertEqual(self.successResultOf(reading), [b"a" * 600, b"b" * 600])
        reading = read()
        self.receive(b"c")
        self.clock.advance(0.4)
        self.assertNoResult(reading)
        self.clock.advance(0.1)
        self.assertEqual(self.successResultOf(reading), [b"c"])
        reading = read()
        self.clock.advance(1)
        self.assertNoResult(reading)
        self.receive(b"d")
        self.assertEqual(self.successResultOf(reading), [b"d"])
        reading = read()
        self.receive(b"e" * (5000 - 1202))
        self.assertEqual(self.successResultOf(reading), [b"e" * (5000 - 1202)])
        self.assertEqual(self.successResultOf(read()), [])
        timers = [call for call in self.clock.getDelayedCalls() if call.getTime() - self.clock.seconds() <= 0.5]
        self.assertEqual(timers, [])

    def test_silence(self) -> None:
        waiting = self.ask()
        self.receive(OK[:-5])
        response = self.successResultOf(waiting)
        for byte in (b"h", b"e"):
            self.clock.advance(29)
            self.receive(byte)
        chunk = Deferred.fromCoroutine(response.read_chunk())
        self.assertEqual(self.successResultOf(chunk), b"he")
        chunk = Deferred.fromCoroutine(response.read_chunk())
        self.clock.advance(29)
        self.assertNoResult(chunk)
        self.clock.advance(1)
        self.failureResultOf(chunk, UpstreamTimeout)
        self.assertTrue(self.wire.disconnected)

    def test_an_end_before_any_byte_is_told_apart(self) -> None:
        waiting = self.ask()
        self.lose()
        self.failureResultOf(waiting, Dropped)
        self.setUp()
        waiting = self.ask()
        self.receive(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.lose()
        self.assertNotIsInstance(self.failureResultOf(waiting, UpstreamBroken).value, Dropped)
        self.assertEqual(self.gone, 1)

    def test_ends_of_a_body_without_length(self) -> None:
        waiting = self.ask()
        self.receive(b"HTTP/1.1 200 OK\r\n\r\nabc")
        self.lose()
        self.assertEqual(self.read(self.successResultOf(waiting)), b"abc")
        self.setUp()
        waiting = self.ask()
        self.receive(b"HTTP/1.1 200 OK\r\n\r\nabc")
        self.lose(ConnectionLost)
        reading = Deferred.fromCoroutine(self.successResultOf(waiting).read_all(9))
        self.failureResultOf(reading, UpstreamBroken)

    def test_short_body(self) -> None:
        waiting = self.ask()
        self.receive(OK[:-1])
        self.lose()
        reading = Deferred.fromCoroutine(self.successResultOf(waiting).read_all(9))
        self.assertIn("4 of 5 bytes", str(self.failureResultOf(reading, UpstreamBroken).value))

    def test_cancelling_closes(self) -> None:
        waiting = self.ask()
        waiting.cancel()
        self.failureResultOf(waiting, CancelledError)
        self.assertTrue(self.wire.disconnected)

    def test_abort_ends_only_its_own_answer(self) -> None:
        waiting = self.ask()
        self.receive(OK)
        first = self.successResultOf(waiting)
        waiting = self.ask()
        first.abort()
        self.assertFalse(self.wire.disconnected)
        self.receive(OK[:-1])
        second = self.successResultOf(waiting)
        second.abort()
        self.assertTrue(self.wire.disconnected)

    def test_refused_while_sending(self) -> None:
        body = Endless()
        waiting = self.ask(Outgoing("PUT", "http://a/", b"PUT / HTTP/1.1\r\n\r\n", body))
        body.consumer.write(b"x" * 10)
        self.receive(OK.replace(b"200", b"401", 1))
        response = self.successResultOf(waiting)
        self.assertEqual((response.status, self.read(response)), (401, b"hello"))
        self.assertEqual(body.calls, ["stop"])
        self.assertEqual(self.idle, 0)
        body.consumer.write(b"more")  # a producer that has not noticed yet
        self.assertEqual(self.wire.value(), b"PUT / HTTP/1.1\r\n\r\n" + b"x" * 10)

    def test_interim_answer_while_sending_stops_nothing(self) -> None:
        body = Endless()
        self.ask(Outgoing("PUT", "http://a/", b"", body))
        self.receive(b"HTTP/1.1 102 Processing\r\n\r\n")
        self.assertEqual(body.calls, [])

    def test_the_answer_is_waited_for_once_all_is_sent(self) -> None:
        body = Endless()
        waiting = self.ask(Outgoing("PUT", "http://a/", b"", body))
        self.clock.advance(3600)  # a slow client of ours
        body.consumer.write(bytes(1000))
        body.done.callback(None)
        self.clock.advance(29)
        self.assertNoResult(waiting)
        self.clock.advance(1)
        self.failureResultOf(waiting, UpstreamTimeout)

    def test_full_upstream_holds_the_body_back_for_a_while(self) -> None:
        body = Endless()
        waiting = self.ask(Outgoing("PUT", "http://a/", b"", body))
        sender = self.wire.producer
        sender.pauseProducing()
        self.clock.advance(39)
        sender.resumeProducing()
        self.clock.advance(100)
        sender.pauseProducing()
        self.assertEqual(body.calls, ["pause", "resume", "pause"])
        self.assertNoResult(waiting)
        self.clock.advance(40)
        self.failureResultOf(waiting, UpstreamTimeout)
        self.assertEqual(body.calls[-1], "stop")
