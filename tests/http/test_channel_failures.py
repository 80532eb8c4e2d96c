"""Disconnecting clients and failing handlers."""

from __future__ import annotations

from collections.abc import Sequence

from twisted.internet.defer import CancelledError, Deferred
from twisted.trial.unittest import SynchronousTestCase

from dockerproxy.concurrency import SingleFlight
from dockerproxy.errors import Denied, RegistryError, UpstreamRefused
from dockerproxy.http.request import ClientDisconnected, Request
from tests.http.support.in_memory import (
    GET,
    BlockingHandler,
    DownloadHandler,
    Handler,
    InMemoryClient,
    InMemoryServer,
    UploadHandler,
    echo,
)


class DisconnectTests(SynchronousTestCase):
    def test_disconnect_before_the_response_cancels_the_handler(self) -> None:
        handler = BlockingHandler()
        server = InMemoryServer(handler)
        client = server.client()
        client.send(GET % 1 + GET % 2)
        server.clock.advance(7)
        client.disconnect()
        self.assertEqual([type(error) for error in handler.outcomes], [CancelledError])
        self.assertEqual(server.logged, [("/1", 0, 0, 7.0)])
        self.assertEqual(server.clock.getDelayedCalls(), [])

    def test_disconnect_during_the_response_fails_drain(self) -> None:
        download_handler = DownloadHandler(10_000)

        async def handle(request: Request) -> None:
            client.stop_reading()
            await download_handler(request)

        server = InMemoryServer(handle)
        client = server.client()
        client.send(GET % 1 + GET % 2)
        client.disconnect()
        self.assertEqual([type(error) for error in download_handler.errors], [ClientDisconnected])
        self.assertEqual([(path, status, size) for path, status, size, _ in server.logged], [("/1", 200, 1000)])

    def test_disconnect_during_the_request_body_fails_the_reader(self) -> None:
        upload_handler = UploadHandler()
        server = InMemoryServer(upload_handler)
        client = server.client()
        client.send(b"POST /1 HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nhello")
        upload_handler.proceed.callback(None)
        client.disconnect()
        self.assertEqual(upload_handler.body, b"hello")
        self.assertIsInstance(upload_handler.error, ClientDisconnected)
        self.assertEqual(len(server.logged), 1)

    def test_shared_work_continues(self) -> None:
        shared: SingleFlight[str, str] = SingleFlight()
        fetched: Deferred[str] = Deferred()

        async def fetch() -> str:
            return await fetched

        async def handle(request: Request) -> None:
            request.respond(200, [], (await shared.do("key", fetch)).encode())

        server = InMemoryServer(handle)
        first, second = server.client(), server.client()
        first.send(GET % 1)
        second.send(GET % 2)
        first.disconnect()
        fetched.callback("content")
        self.assertEqual([response.body for response in second.responses], [b"content"])
        self.assertEqual([(path, status) for path, status, *_ in server.logged], [("/1", 0), ("/2", 200)])

    def test_handler_that_suppresses_cancellation_is_ignored(self) -> None:
        """A handler that outlives its client causes neither a response nor a second log entry."""
        disconnected: Deferred[None] = Deferred()
        cleanup: Deferred[None] = Deferred()

        async def handle(request: Request) -> None:
            try:
                await disconnected
            except CancelledError:
                await cleanup
            request.respond(200, [], b"late")

        server = InMemoryServer(handle)
        client = server.client()
        client.send(GET % 1)
        client.disconnect()
        cleanup.callback(None)
        self.assertEqual(len(server.logged), 1)

    def test_handler_continues_after_its_response_and_the_disconnect(self) -> None:
        cleaned_up: list[bool] = []
        cleanup: Deferred[None] = Deferred()

        async def handle(request: Request) -> None:
            request.respond(200, [])
            await cleanup
            cleaned_up.append(True)

        server = InMemoryServer(handle)
        client = server.client()
        client.send(GET % 1)
        client.disconnect()
        cleanup.callback(None)
        self.assertEqual(cleaned_up, [True])
        self.assertEqual(len(server.logged), 1)

    def test_disconnect_while_lingering_leaves_no_delayed_calls(self) -> None:
        server = InMemoryServer(echo)
        client = server.client()
        client.send(b"\x16")
        client.disconnect()
        self.assertEqual(server.clock.getDelayedCalls(), [])


class HandlerFailureTests(SynchronousTestCase):
    def run_failing(self, handler: Handler, logged: Sequence[type[BaseException]]) -> InMemoryClient:
        self.server = InMemoryServer(handler)
        client = self.server.client()
        client.send(GET % 1 + GET % 2)
        self.assertEqual([failure.type for failure in self.flushLoggedErrors()], list(logged))
        return client

    def test_failure_before_the_response_is_a_500(self) -> None:
        async def handle(request: Request) -> None:
            raise KeyError("secret")

        client = self.run_failing(handle, [KeyError])
        (response,) = client.responses
        self.assertEqual((response.status, response.body), (500, b"internal error\n"))
        self.assertEqual([status for _, status, *_ in self.server.logged], [500])
        self.assertTrue(client.closed_cleanly)

    def test_failure_during_the_response_aborts(self) -> None:
        async def handle(request: Request) -> None:
            request.start(200, [], None)
            request.write(b"half")
            raise KeyError("secret")

        client = self.run_failing(handle, [KeyError])
        self.assertTrue(client.transport.value().endswith(b"4\r\nhalf\r\n"))
        self.assertTrue(client.transport.aborted)
        client.disconnect()
        self.assertEqual(len(self.server.logged), 1)

    def test_failure_after_the_response_keeps_the_connection(self) -> None:
        async def handle(request: Request) -> None:
            request.respond(200, [])
            raise KeyError("secret")

        client = self.run_failing(handle, [KeyError, KeyError])
        self.assertEqual(client.statuses, [200, 200])
        self.assertFalse(client.transport.disconnecting)

    def test_missing_response_is_a_500(self) -> None:
        async def handle(request: Request) -> None:
            pass

        client = self.run_failing(handle, [RuntimeError])
        self.assertEqual(client.statuses, [500])
        self.assertTrue(client.closed_cleanly)

    def test_incomplete_response_aborts(self) -> None:
        async def handle(request: Request) -> None:
            request.start(200, [], 5)

        self.assertTrue(self.run_failing(handle, [RuntimeError]).transport.aborted)

    def test_invalid_response_fields_are_a_500(self) -> None:
        async def handle(request: Request) -> None:
            request.respond(200, [("A", "b\r\nSet-Cookie: c")])

        client = self.run_failing(handle, [ValueError])
        self.assertEqual(client.statuses, [500])
        self.assertNotIn(b"Cookie", client.transport.value())

    def test_second_response_aborts(self) -> None:
        async def handle(request: Request) -> None:
            request.start(200, [], 2)
            request.respond(404, [])

        client = self.run_failing(handle, [RuntimeError])
        self.assertEqual(client.transport.value().count(b"HTTP/1.1"), 1)
        self.assertTrue(client.transport.aborted)

    def test_registry_error_becomes_the_response(self) -> None:
        """The connection stays open, so that a client can repeat the request with a login."""
        error: RegistryError = Denied("not for you", headers=[("A", "b")])

        async def handle(request: Request) -> None:
            raise error

        client = self.run_failing(handle, [])
        for response in client.responses:
            self.assertEqual((response.status, response.body, response.fields["A"]), (403, b"not for you\n", "b"))
        self.assertEqual(client.statuses, [403, 403])
        self.assertFalse(client.transport.disconnecting)

    def test_errors_are_rendered_by_the_requests_renderer(self) -> None:
        def render(request: Request, error: RegistryError) -> None:
            request.respond(error.status, [("A", error.code)], error.message.encode())

        def handler_of(error: Exception) -> Handler:
            async def handle(request: Request) -> None:
                request.error_renderer = render
                raise error

            return handle

        (response, _) = self.run_failing(handler_of(Denied("not for you")), []).responses
        self.assertEqual((response.status, response.body, response.fields["A"]), (403, b"not for you", "DENIED"))
        (response,) = self.run_failing(handler_of(KeyError("secret")), [KeyError]).responses
        self.assertEqual((response.status, response.body, response.fields["A"]), (500, b"internal error", "UNKNOWN"))

    def test_the_status_line_of_our_own_error_has_its_sentence(self) -> None:
        """An error that another server sent has the usual status line."""
        requests: list[Request] = []

        def handler_of(error: RegistryError) -> Handler:
            async def handle(request: Request) -> None:
                requests.append(request)
                raise error

            return handle

        client = self.run_failing(handler_of(Denied("ALLOW_CLIENTS has no entry for you.")), [])
        status_line = b"HTTP/1.1 403 ALLOW_CLIENTS has no entry for you. (docker-registry-proxy)\r\n"
        self.assertEqual(client.transport.value().count(status_line), 2)
        client = self.run_failing(handler_of(Denied("a\r\nX-Forged: \u00e9")), [])
        self.assertIn(b"HTTP/1.1 403 a??X-Forged: ? (docker-registry-proxy)\r\n", client.transport.value())
        client = self.run_failing(handler_of(UpstreamRefused(403, b"no", [])), [])
        self.assertIn(b"HTTP/1.1 403 Forbidden\r\n", client.transport.value())
        self.assertEqual(
            [request.because for request in requests[::2]],
            ["ALLOW_CLIENTS has no entry for you.", "a\r\nX-Forged: \u00e9", "upstream responded with 403"],
        )

    def test_error_after_the_start_of_the_response_is_not_rendered(self) -> None:
        def render(request: Request, error: RegistryError) -> None:
            raise AssertionError

        async def handle(request: Request) -> None:
            request.error_renderer = render
            request.start(200, [], 5)
            requests.append(request)
            raise Denied("not for you")

        requests: list[Request] = []
        client = self.run_failing(handle, [])
        self.assertTrue(client.transport.aborted)
        self.assertEqual(requests[0].because, "not for you")
        self.assertNotIn(b"not for you", client.transport.value())

    def test_failing_renderer_is_a_500(self) -> None:
        async def handle(request: Request) -> None:
            raise Denied("not for you", headers=[("A", "b\r\nSet-Cookie: c")])

        client = self.run_failing(handle, [ValueError])
        self.assertEqual([(each.status, each.body) for each in client.responses], [(500, b"internal error\n")])
        self.assertTrue(client.closed_cleanly)

    def test_cancellation_by_others_is_a_500(self) -> None:
        waiting: Deferred[None] = Deferred()

        async def handle(request: Request) -> None:
            await waiting

        client = self.run_failing(handle, [])
        waiting.cancel()
        self.assertEqual(len(self.flushLoggedErrors(CancelledError)), 1)
        self.assertEqual(client.statuses, [500])
