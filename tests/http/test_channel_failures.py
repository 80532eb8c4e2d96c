"""Clients that leave, and handlers that fail."""

from __future__ import annotations

from collections.abc import Sequence

from twisted.internet.defer import CancelledError, Deferred
from twisted.trial.unittest import SynchronousTestCase

from dockerproxy.concurrency import SingleFlight
from dockerproxy.errors import Denied, RegistryError
from dockerproxy.http.request import ClientGone, Request
from tests.http.kit.in_memory import GET, Client, Door, Downloads, Handler, Slow, Uploads, echo


class Leaving(SynchronousTestCase):
    def test_while_we_prepare_the_answer(self) -> None:
        slow = Slow()
        door = Door(slow)
        client = door.client()
        client.send(GET % 1 + GET % 2)
        door.clock.advance(7)
        client.leave()
        self.assertEqual([type(error) for error in slow.ended], [CancelledError])
        self.assertEqual(door.logged, [("/1", 0, 0, 7.0)])
        self.assertEqual(door.clock.getDelayedCalls(), [])

    def test_in_the_middle_of_an_answer(self) -> None:
        downloads = Downloads(10_000)

        async def handle(request: Request) -> None:
            client.stop_reading()
            await downloads(request)

        door = Door(handle)
        client = door.client()
        client.send(GET % 1 + GET % 2)
        client.leave()
        self.assertEqual([type(error) for error in downloads.ended], [ClientGone])
        self.assertEqual([(path, status, size) for path, status, size, _ in door.logged], [("/1", 200, 1000)])

    def test_in_the_middle_of_a_body(self) -> None:
        uploads = Uploads()
        door = Door(uploads)
        client = door.client()
        client.send(b"POST /1 HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nhello")
        uploads.go.callback(None)
        client.leave()
        self.assertEqual(uploads.body, b"hello")
        self.assertIsInstance(uploads.ended, ClientGone)
        self.assertEqual(len(door.logged), 1)

    def test_what_is_shared_goes_on(self) -> None:
        shared: SingleFlight[str, str] = SingleFlight()
        fetched: Deferred[str] = Deferred()

        async def fetch() -> str:
            return await fetched

        async def handle(request: Request) -> None:
            request.answer(200, [], (await shared.do("key", fetch)).encode())

        door = Door(handle)
        first, second = door.client(), door.client()
        first.send(GET % 1)
        second.send(GET % 2)
        first.leave()
        fetched.callback("content")
        self.assertEqual([answer.body for answer in second.answers], [b"content"])
        self.assertEqual([(path, status) for path, status, *_ in door.logged], [("/1", 0), ("/2", 200)])

    def test_a_handler_that_will_not_hear(self) -> None:
        """Neither an answer nor a log line comes of what a handler does for a client that has left."""
        gone: Deferred[None] = Deferred()
        later: Deferred[None] = Deferred()

        async def handle(request: Request) -> None:
            try:
                await gone
            except CancelledError:
                await later
            request.answer(200, [], b"late")

        door = Door(handle)
        client = door.client()
        client.send(GET % 1)
        client.leave()
        later.callback(None)
        self.assertEqual(len(door.logged), 1)

    def test_after_an_answer_its_handler_may_tidy_up(self) -> None:
        tidied: list[bool] = []
        tidying: Deferred[None] = Deferred()

        async def handle(request: Request) -> None:
            request.answer(200, [])
            await tidying
            tidied.append(True)

        door = Door(handle)
        client = door.client()
        client.send(GET % 1)
        client.leave()
        tidying.callback(None)
        self.assertEqual(tidied, [True])
        self.assertEqual(len(door.logged), 1)

    def test_while_lingering(self) -> None:
        door = Door(echo)
        client = door.client()
        client.send(b"\x16")
        client.leave()
        self.assertEqual(door.clock.getDelayedCalls(), [])


class Failures(SynchronousTestCase):
    def run_into(self, handler: Handler, logged: Sequence[type[BaseException]]) -> Client:
        self.door = Door(handler)
        client = self.door.client()
        client.send(GET % 1 + GET % 2)
        self.assertEqual([failure.type for failure in self.flushLoggedErrors()], list(logged))
        return client

    def test_before_the_answer(self) -> None:
        async def handle(request: Request) -> None:
            raise KeyError("secret")

        client = self.run_into(handle, [KeyError])
        (answer,) = client.answers
        self.assertEqual((answer.status, answer.body), (500, b"internal error\n"))
        self.assertEqual([status for _, status, *_ in self.door.logged], [500])
        self.assertTrue(client.closed)

    def test_in_the_answer(self) -> None:
        async def handle(request: Request) -> None:
            request.start(200, [], None)
            request.write(b"half")
            raise KeyError("secret")

        client = self.run_into(handle, [KeyError])
        self.assertTrue(client.wire.value().endswith(b"4\r\nhalf\r\n"))
        self.assertTrue(client.wire.aborted)
        client.leave()
        self.assertEqual(len(self.door.logged), 1)

    def test_after_the_answer(self) -> None:
        async def handle(request: Request) -> None:
            request.answer(200, [])
            raise KeyError("secret")

        client = self.run_into(handle, [KeyError, KeyError])
        self.assertEqual(client.statuses, [200, 200])
        self.assertFalse(client.wire.disconnecting)

    def test_no_answer(self) -> None:
        async def handle(request: Request) -> None:
            pass

        client = self.run_into(handle, [])
        self.assertEqual(client.statuses, [500])
        self.assertTrue(client.closed)

    def test_half_an_answer(self) -> None:
        async def handle(request: Request) -> None:
            request.start(200, [], 5)

        self.assertTrue(self.run_into(handle, []).wire.aborted)

    def test_fields_that_cannot_be_sent(self) -> None:
        async def handle(request: Request) -> None:
            request.answer(200, [("A", "b\r\nSet-Cookie: c")])

        client = self.run_into(handle, [ValueError])
        self.assertEqual(client.statuses, [500])
        self.assertNotIn(b"Cookie", client.wire.value())

    def test_two_answers(self) -> None:
        async def handle(request: Request) -> None:
            request.start(200, [], 2)
            request.answer(404, [])

        client = self.run_into(handle, [RuntimeError])
        self.assertEqual(client.wire.value().count(b"HTTP/1.1"), 1)
        self.assertTrue(client.wire.aborted)

    def test_an_error_of_the_registrys(self) -> None:
        error: RegistryError = Denied("not for you", headers=[("A", "b")])

        async def handle(request: Request) -> None:
            raise error

        client = self.run_into(handle, [])
        (answer,) = client.answers
        self.assertEqual((answer.status, answer.body, answer.fields["A"]), (403, b"not for you\n", "b"))

    def test_what_it_waited_for_was_cancelled(self) -> None:
        waiting: Deferred[None] = Deferred()

        async def handle(request: Request) -> None:
            await waiting

        client = self.run_into(handle, [])
        waiting.cancel()
        self.assertEqual(len(self.flushLoggedErrors(CancelledError)), 1)
        self.assertEqual(client.statuses, [500])
