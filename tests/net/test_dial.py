"""Tests for the dialer, on an in-memory reactor with a fake clock and resolver, and twice over real sockets."""

from __future__ import annotations

from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionDone, ConnectionRefusedError, NoRouteError
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.testing import MemoryReactorClock, StringTransport
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase, TestCase

from dockerproxy.errors import DestinationForbidden, UpstreamTimeout, UpstreamUnreachable
from dockerproxy.net.dial import Dialer
from dockerproxy.net.parent_circles import ParentCircles
from dockerproxy.net.upstream_proxy import UpstreamProxy
from dockerproxy.oci.names import Host
from tests.support.resolvers import StaticResolver, system_resolver

HOST = Host("registry.example", 5000)


class DialerTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.reactor = MemoryReactorClock()
        self.factory = Factory.forProtocol(Protocol)
        self.protocols: dict[int, Any] = {}

    def dial(self, *addresses: str, host: Host = HOST, address_check: Any = None, **settings: Any) -> Deferred[Any]:
        self.resolver = StaticResolver({"registry.example": list(addresses), **settings.pop("names", {})})
        dialer = Dialer(self.reactor, self.resolver, connect_timeout=20, **settings)
        return dialer.endpoint(host, address_check, "192.0.2.9").connect(self.factory)

    @property
    def targets(self) -> list[tuple[str, int]]:
        return [(client[0], client[1]) for client in self.reactor.tcpClients]

    def accept(self, attempt: int) -> StringTransport:
        transport = StringTransport()
        protocol = self.reactor.tcpClients[attempt][2].buildProtocol(None)
        protocol.makeConnection(transport)
        self.protocols[attempt] = protocol
        return transport

    def connected(self, attempt: int) -> Any:
        return self.protocols[attempt]

    def refuse(self, attempt: int, error: Exception | None = None) -> None:
        factory, connector = self.reactor.tcpClients[attempt][2], self.reactor.connectors[attempt]
        factory.clientConnectionFailed(connector, Failure(error or ConnectionRefusedError()))

    def stopped_connecting(self) -> list[bool]:
        return [connector.stoppedConnecting for connector in self.reactor.connectors]

    def test_connects_to_the_address(self) -> None:
        work = self.dial("192.0.2.1")
        self.assertEqual(self.targets, [("192.0.2.1", 5000)])
        transport = self.accept(0)
        self.assertIs(self.successResultOf(work).transport, transport)
        self.assertEqual(self.reactor.getDelayedCalls(), [])

    def test_address_families_are_interleaved(self) -> None:
        self.dial("2001:db8::1", "2001:db8::2", "2001:db8::1", "192.0.2.1", "192.0.2.2")
        for _ in range(4):
            self.reactor.advance(0.25)
        self.assertEqual([host for host, _ in self.targets], ["2001:db8::1", "192.0.2.1", "2001:db8::2", "192.0.2.2"])

    def test_next_attempt_after_250_ms_or_a_failure(self) -> None:
        work = self.dial("2001:db8::1", "192.0.2.1", "2001:db8::2")
        self.reactor.advance(0.2)
        self.assertEqual(len(self.targets), 1)
        self.reactor.advance(0.05)
        self.assertEqual(len(self.targets), 2)
        self.refuse(0, NoRouteError())
        self.assertEqual(len(self.targets), 3)
        self.accept(2)
        self.successResultOf(work)
        self.assertEqual(self.stopped_connecting()[1:], [True, False])
        self.assertEqual(self.reactor.getDelayedCalls(), [])

    def test_disabled_ipv6_dials_only_ipv4(self) -> None:
        self.dial("2001:db8::1", "192.0.2.1", ipv6=False)
        self.assertEqual(self.targets, [("192.0.2.1", 5000)])

    def test_disabled_ipv6_refuses_literal_ipv6_addresses(self) -> None:
        work = self.dial(host=Host("2001:db8::1", 443), ipv6=False)
        message = str(self.failureResultOf(work, UpstreamUnreachable).value)
        self.assertEqual(message, "[2001:db8::1]:443: cannot connect to an IPv6 address because DISABLE_IPV6 is set")
        self.dial(host=Host("192.0.2.1", 5000), ipv6=False)
        self.assertEqual(self.targets, [("192.0.2.1", 5000)])

    def test_first_error_is_raised_if_all_attempts_fail(self) -> None:
        work = self.dial("192.0.2.1", "192.0.2.2")
        self.refuse(0)
        self.refuse(1, NoRouteError())
        self.assertEqual(
            str(self.failureResultOf(work, UpstreamUnreachable).value), "registry.example:5000: connection refused"
        )

    def test_name_without_addresses_is_unreachable(self) -> None:
        message = str(self.failureResultOf(self.dial(), UpstreamUnreachable).value)
        self.assertIn("registry.example:5000: no such name", message)

    def test_timeout_covers_resolution_and_attempts(self) -> None:
        for host in (HOST, Host("slow.example", 443)):
            work = self.dial("192.0.2.1", host=host)
            self.reactor.advance(19.9)
            self.assertNoResult(work)
            self.reactor.advance(0.1)
            self.assertIn("timed out", str(self.failureResultOf(work, UpstreamTimeout).value))
        self.assertEqual(self.stopped_connecting(), [True])
        self.assertEqual(self.reactor.getDelayedCalls(), [])

    def test_cancel_stops_all_attempts(self) -> None:
        work = self.dial("192.0.2.1", "2001:db8::1")
        self.reactor.advance(0.25)
        work.cancel()
        self.failureResultOf(work, CancelledError)
        self.assertEqual(self.stopped_connecting(), [True, True])
        self.assertEqual(self.reactor.getDelayedCalls(), [])

    def test_every_address_is_checked(self) -> None:
        checked = []

        def address_check(address: str) -> None:
            checked.append(address)
            if address.startswith("169."):
                raise DestinationForbidden(f"{address} is forbidden")

        self.dial("169.254.169.254", "192.0.2.1", address_check=address_check)
        self.reactor.advance(5)
        self.assertEqual(checked, ["169.254.169.254", "192.0.2.1"])
        self.assertEqual(self.targets, [("192.0.2.1", 5000)])
        self.assertEqual(
            self.resolver.queries, [("registry.example", "192.0.2.9")]
        )  # because a second look-up could return other addresses

    def test_first_error_is_raised_if_all_addresses_are_forbidden(self) -> None:
        def address_check(address: str) -> None:
            raise DestinationForbidden(f"{address} is forbidden")

        work = self.dial("192.0.2.1", "192.0.2.2", address_check=address_check)
        self.assertEqual(str(self.failureResultOf(work, DestinationForbidden).value), "192.0.2.1 is forbidden")
        work = self.dial(host=Host("::1", 80), address_check=address_check)
        self.failureResultOf(work, DestinationForbidden)
        self.assertEqual(self.targets, [])
        self.assertEqual(self.resolver.queries, [])  # because an address needs no look-up

    def test_overrides_skip_dns_proxy_and_address_check(self) -> None:
        def address_check(address: str) -> None:
            raise DestinationForbidden(f"{address} is forbidden")

        overrides = {HOST: ("127.0.0.1", 20000)}
        proxy = UpstreamProxy("proxy.example", 3128)
        self.dial(address_check=address_check, overrides=overrides, proxy=proxy)
        self.assertEqual(self.targets, [("127.0.0.1", 20000)])
        self.assertEqual(self.resolver.queries, [])
        self.dial("192.0.2.1", host=Host("registry.example", 443), overrides=overrides)
        self.assertEqual(self.targets[1:], [("192.0.2.1", 443)])

    def test_upstream_proxy_is_dialled_and_receives_connect(self) -> None:
        checked: list[str] = []
        names = {"proxy.example": ["192.0.2.9"]}
        work = self.dial(names=names, proxy=UpstreamProxy("proxy.example", 3128), address_check=checked.append)
        self.assertEqual(self.targets, [("192.0.2.9", 3128)])
        self.assertEqual(self.resolver.queries, [("proxy.example", "")])  # no client chose this name
        transport = self.accept(0)
        self.assertTrue(transport.value().startswith(b"CONNECT registry.example:5000 HTTP/1.1\r\n"))
        self.assertNoResult(work)
        transport.protocol = self.reactor.tcpClients[0][2]
        self.assertEqual(checked, ["registry.example"])  # the name, because nobody here knows its address
        work.cancel()
        self.failureResultOf(work, CancelledError)
        self.assertTrue(transport.disconnected)

    def test_upstream_proxy_checks_literal_addresses(self) -> None:
        def address_check(address: str) -> None:
            raise DestinationForbidden(f"{address} is forbidden")

        work = self.dial(
            host=Host("169.254.169.254", 80), proxy=UpstreamProxy("192.0.2.9", 3128), address_check=address_check
        )
        self.failureResultOf(work, DestinationForbidden)
        self.assertEqual(self.targets, [])

    def test_unreachable_upstream_proxy_is_named_in_the_error(self) -> None:
        work = self.dial(proxy=UpstreamProxy("192.0.2.9", 3128))
        self.refuse(0)
        message = str(self.failureResultOf(work, UpstreamUnreachable).value)
        self.assertIn("registry.example:5000", message)
        self.assertIn("192.0.2.9:3128: connection refused", message)

    def test_silent_upstream_proxy_times_out(self) -> None:
        work = self.dial(proxy=UpstreamProxy("192.0.2.9", 3128))
        transport = self.accept(0)
        self.reactor.advance(20)
        self.assertIn("registry.example:5000: timed out", str(self.failureResultOf(work, UpstreamTimeout).value))
        self.assertTrue(transport.disconnected)

    def test_the_next_upstream_proxy_is_tried_if_one_does_not_answer(self) -> None:
        names = {"first.example": ["192.0.2.8"], "second.example": ["192.0.2.9"]}
        proxy = UpstreamProxy("first.example", 3128, others=(UpstreamProxy("second.example", 80),))
        for end in ("refused", "silent", "no HTTP", "502"):
            self.reactor = MemoryReactorClock()
            self.dial(names=names, proxy=proxy)
            if end == "refused":
                self.refuse(0)
            else:
                self.accept(0)
                answer = {"no HTTP": b"SSH-2.0-x\r\n\r\n", "502": b"HTTP/1.1 502 Bad\r\n\r\n"}.get(end)
                protocol = self.connected(0)
                if answer is None:
                    self.reactor.advance(10)
                else:
                    protocol.dataReceived(answer)
            self.assertEqual(self.targets, [("192.0.2.8", 3128), ("192.0.2.9", 80)], end)

    def test_a_refusal_of_an_upstream_proxy_is_final(self) -> None:
        proxy = UpstreamProxy("192.0.2.8", 3128, others=(UpstreamProxy("192.0.2.9", 80),), direct=True)
        work = self.dial("192.0.2.1", proxy=proxy)
        self.accept(0)
        self.connected(0).dataReceived(b"HTTP/1.1 403 Forbidden\r\n\r\n")
        self.assertIn("forbids", str(self.failureResultOf(work, UpstreamUnreachable).value))
        self.assertEqual(len(self.targets), 1)

    def test_a_direct_connection_is_last_and_its_addresses_are_checked(self) -> None:
        def address_check(address: str) -> None:
            if address == "192.0.2.66":
                raise DestinationForbidden(f"{address} is forbidden")

        proxy = UpstreamProxy("192.0.2.8", 3128, direct=True)
        self.dial("192.0.2.66", "192.0.2.1", proxy=proxy, address_check=address_check)
        self.refuse(0)
        self.assertEqual(self.targets, [("192.0.2.8", 3128), ("192.0.2.1", 5000)])

    def test_a_proxy_that_did_not_answer_is_left_alone_for_30_seconds(self) -> None:
        proxy = UpstreamProxy("192.0.2.8", 3128, direct=True)
        dialer = Dialer(self.reactor, StaticResolver({"registry.example": ["192.0.2.1"]}), proxy=proxy)
        dialer.endpoint(HOST).connect(self.factory)
        self.refuse(0)
        for seconds, target in ((29.0, ("192.0.2.1", 5000)), (1.0, ("192.0.2.8", 3128))):
            self.reactor.advance(seconds)
            dialer.endpoint(HOST).connect(self.factory).addErrback(lambda _: None)
            self.assertEqual(self.targets[-1], target)

    def answer(self, attempt: int, status: str) -> None:
        self.accept(attempt)
        self.connected(attempt).dataReceived(f"HTTP/1.1 {status} X\r\n\r\n".encode())

    def test_a_host_that_a_proxy_cannot_reach_says_nothing_about_others(self) -> None:
        """Clients choose hosts: if one could make a proxy count as down, all others would go past it."""
        proxy = UpstreamProxy("192.0.2.8", 3128, direct=True)
        dialer = Dialer(self.reactor, StaticResolver({"registry.example": ["192.0.2.1"]}), proxy=proxy)
        for status in ("502", "503", "504", "508"):
            dialer.endpoint(HOST).connect(self.factory).addErrback(lambda _: None)
            self.assertEqual(self.targets[-1], ("192.0.2.8", 3128))
            self.answer(-1, status)
            self.assertEqual(self.targets[-1], ("192.0.2.1", 5000))

    def test_a_proxy_that_closes_the_connection_for_one_host_stays_the_first(self) -> None:
        proxy = UpstreamProxy("192.0.2.8", 3128, direct=True)
        dialer = Dialer(self.reactor, StaticResolver({"registry.example": ["192.0.2.1"]}), proxy=proxy)
        for _ in range(2):
            dialer.endpoint(HOST).connect(self.factory).addErrback(lambda _: None)
            self.assertEqual(self.targets[-1], ("192.0.2.8", 3128))
            self.accept(-1)
            self.connected(-1).connectionLost(Failure(ConnectionDone()))
            self.assertEqual(self.targets[-1], ("192.0.2.1", 5000))

    def test_a_proxy_that_is_silent_about_one_host_and_answers_others_stays_the_first(self) -> None:
        proxy = UpstreamProxy("192.0.2.8", 3128, direct=True)
        dialer = Dialer(self.reactor, StaticResolver({"registry.example": ["192.0.2.1"]}), proxy=proxy)
        for status, next_target in (("200", ("192.0.2.8", 3128)), ("", ("192.0.2.1", 5000))):
            dialer.endpoint(HOST).connect(self.factory).addErrback(lambda _: None)
            self.accept(-1)
            self.reactor.advance(5)
            if status:
                dialer.endpoint(HOST).connect(self.factory)
                self.answer(-1, status)
            self.reactor.advance(5)
            dialer.endpoint(HOST).connect(self.factory).addErrback(lambda _: None)
            self.assertEqual(self.targets[-1], next_target)

    def test_a_proxy_that_answers_again_is_the_first_again(self) -> None:
        proxy = UpstreamProxy("192.0.2.8", 3128, others=(UpstreamProxy("192.0.2.9", 3128),))
        dialer = Dialer(self.reactor, StaticResolver({}), proxy=proxy)
        dialer.endpoint(HOST).connect(self.factory).addErrback(lambda _: None)
        self.refuse(-1)
        self.refuse(-1)
        dialer.endpoint(HOST).connect(self.factory).addErrback(lambda _: None)  # both are down
        self.answer(-1, "200")
        dialer.endpoint(HOST).connect(self.factory).addErrback(lambda _: None)
        self.assertEqual(self.targets[-1], ("192.0.2.8", 3128))

    def test_the_first_error_is_raised_if_no_proxy_answers(self) -> None:
        work = self.dial(proxy=UpstreamProxy("192.0.2.8", 3128, others=(UpstreamProxy("192.0.2.9", 80),)))
        self.refuse(0)
        self.refuse(1)
        self.assertIn("192.0.2.8:3128", str(self.failureResultOf(work, UpstreamUnreachable).value))

    def test_proxies_learn_where_a_request_has_come_from(self) -> None:
        circles = ParentCircles("0" * 16, self.reactor.seconds)
        circles.receive(HOST, f"docker-registry-proxy;by={'1' * 16}")
        self.dial(proxy=UpstreamProxy("192.0.2.8", 3128), circles=circles).addErrback(lambda _: None)
        field = f"CDN-Loop: docker-registry-proxy;by={'1' * 16}, docker-registry-proxy;by={'0' * 16}\r\n"
        self.assertIn(field.encode(), self.accept(0).value())

    def test_no_proxy_host_is_dialled_directly(self) -> None:
        self.dial("192.0.2.1", proxy=UpstreamProxy("192.0.2.9", 3128, None, ("registry.example",)))
        self.assertEqual(self.targets, [("192.0.2.1", 5000)])


class ConnectProxyProtocol(Protocol):
    """A proxy that accepts CONNECT, sends `first ` at once, and then echoes."""

    request = b""

    def dataReceived(self, data: bytes) -> None:
        assert self.transport is not None
        if self.request:
            self.transport.write(data)
        else:
            self.request = self.factory.connect_request = data  # type: ignore[union-attr]
            self.transport.write(b"HTTP/1.1 200 OK\r\n\r\nfirst ")


class GreetingClient(Protocol):
    def __init__(self) -> None:
        self.received = b""
        self.complete: Deferred[bytes] = Deferred()
        self.disconnected: Deferred[None] = Deferred()

    def connectionMade(self) -> None:
        self.transport.write(b"second")  # type: ignore[union-attr]

    def dataReceived(self, data: bytes) -> None:
        self.received += data
        if self.received == b"first second":
            self.complete.callback(self.received)

    def connectionLost(self, reason: Any = None) -> None:
        self.disconnected.callback(None)


class DialerLoopbackTests(TestCase):
    timeout = 10

    async def test_bytes_pass_through_an_upstream_proxy(self) -> None:
        proxy_factory: Any = Factory.forProtocol(ConnectProxyProtocol)
        port = reactor.listenTCP(0, proxy_factory, interface="127.0.0.1")
        self.addCleanup(port.stopListening)
        dialer = Dialer(reactor, StaticResolver(), proxy=UpstreamProxy("127.0.0.1", port.getHost().port))
        protocol: Any = await dialer.endpoint(HOST).connect(Factory.forProtocol(GreetingClient))
        await protocol.complete
        self.assertTrue(proxy_factory.connect_request.startswith(b"CONNECT registry.example:5000 HTTP/1.1\r\n"))
        protocol.transport.loseConnection()
        await protocol.disconnected

    async def test_system_resolver_resolves_localhost(self) -> None:
        port = reactor.listenTCP(0, Factory.forProtocol(Protocol), interface="127.0.0.1")
        self.addCleanup(port.stopListening)
        addresses: list[str] = []
        dialer = Dialer(reactor, system_resolver(reactor, ipv6=False), ipv6=False)
        endpoint = dialer.endpoint(Host("localhost", port.getHost().port), addresses.append)
        protocol: Any = await endpoint.connect(Factory.forProtocol(GreetingClient))
        self.assertEqual(addresses, ["127.0.0.1"])
        protocol.transport.loseConnection()
        await protocol.disconnected
