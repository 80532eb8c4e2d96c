"""Dialling on a reactor of memory, with a clock and a resolver that the tests hold; CONNECT once over real sockets."""

from __future__ import annotations

from typing import Any

from twisted.internet import reactor
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionRefusedError, NoRouteError
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.testing import MemoryReactorClock, StringTransport
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase, TestCase

from dockerproxy.errors import DestinationForbidden, UpstreamTimeout, UpstreamUnreachable
from dockerproxy.net.dial import Dialer
from dockerproxy.net.parent import ParentProxy
from dockerproxy.oci.names import Host

HOST = Host("registry.example", 5000)


class Resolver:
    """Answers with addresses at once, or when told if there are none."""

    def __init__(self, answers: dict[str, list[str]]) -> None:
        self.answers = answers
        self.asked: list[tuple[str, Any]] = []

    def resolveHostName(
        self, receiver: Any, hostName: str, portNumber: int = 0, addressTypes: Any = None, **_: Any
    ) -> None:
        self.asked.append((hostName, addressTypes))
        receiver.resolutionBegan(None)
        if hostName == "slow.example":
            return
        for text in self.answers.get(hostName, []):
            kind = IPv6Address if ":" in text else IPv4Address
            receiver.addressResolved(kind("TCP", text, portNumber))
        receiver.resolutionComplete()


class Net(MemoryReactorClock):
    nameResolver: Any = None


class Dialling(SynchronousTestCase):
    def setUp(self) -> None:
        self.net = Net()
        self.made = Factory.forProtocol(Protocol)

    def dial(self, *addresses: str, host: Host = HOST, permit: Any = None, **settings: Any) -> Deferred[Any]:
        self.net.nameResolver = self.resolver = Resolver(
            {"registry.example": list(addresses), **settings.pop("names", {})}
        )
        dialer = Dialer(self.net, connect_timeout=20, **settings)
        return dialer.endpoint(host, permit).connect(self.made)

    @property
    def tried(self) -> list[tuple[str, int]]:
        return [(client[0], client[1]) for client in self.net.tcpClients]

    def answer(self, attempt: int) -> StringTransport:
        wire = StringTransport()
        self.net.tcpClients[attempt][2].buildProtocol(None).makeConnection(wire)
        return wire

    def refuse(self, attempt: int, error: Exception | None = None) -> None:
        factory, connector = self.net.tcpClients[attempt][2], self.net.connectors[attempt]
        factory.clientConnectionFailed(connector, Failure(error or ConnectionRefusedError()))

    def called_off(self) -> list[bool]:
        return [connector.stoppedConnecting for connector in self.net.connectors]

    def test_connects_to_the_address(self) -> None:
        work = self.dial("192.0.2.1")
        self.assertEqual(self.tried, [("192.0.2.1", 5000)])
        wire = self.answer(0)
        self.assertIs(self.successResultOf(work).transport, wire)
        self.assertEqual(self.net.getDelayedCalls(), [])

    def test_families_take_turns(self) -> None:
        self.dial("2001:db8::1", "2001:db8::2", "2001:db8::1", "192.0.2.1", "192.0.2.2")
        for _ in range(4):
            self.net.advance(0.25)
        self.assertEqual([host for host, _ in self.tried], ["2001:db8::1", "192.0.2.1", "2001:db8::2", "192.0.2.2"])

    def test_next_after_a_quarter_of_a_second_or_a_failure(self) -> None:
        work = self.dial("2001:db8::1", "192.0.2.1", "2001:db8::2")
        self.net.advance(0.2)
        self.assertEqual(len(self.tried), 1)
        self.net.advance(0.05)
        self.assertEqual(len(self.tried), 2)
        self.refuse(0, NoRouteError())
        self.assertEqual(len(self.tried), 3)
        self.answer(2)
        self.successResultOf(work)
        self.assertEqual(self.called_off()[1:], [True, False])
        self.assertEqual(self.net.getDelayedCalls(), [])

    def test_without_ipv6(self) -> None:
        self.dial("2001:db8::1", "192.0.2.1", ipv6=False)
        self.assertEqual(self.tried, [("192.0.2.1", 5000)])
        self.assertEqual(self.resolver.asked, [("registry.example", (IPv4Address,))])

    def test_without_ipv6_an_address_of_it_is_not_connected_to(self) -> None:
        work = self.dial(host=Host("2001:db8::1", 443), ipv6=False)
        message = str(self.failureResultOf(work, UpstreamUnreachable).value)
        self.assertEqual(message, "[2001:db8::1]:443: not connected to, DISABLE_IPV6 is set")
        self.dial(host=Host("192.0.2.1", 5000), ipv6=False)
        self.assertEqual(self.tried, [("192.0.2.1", 5000)])

    def test_all_fail(self) -> None:
        work = self.dial("192.0.2.1", "192.0.2.2")
        self.refuse(0)
        self.refuse(1, NoRouteError())
        self.assertEqual(
            str(self.failureResultOf(work, UpstreamUnreachable).value), "registry.example:5000: connection refused"
        )

    def test_no_such_name(self) -> None:
        message = str(self.failureResultOf(self.dial(), UpstreamUnreachable).value)
        self.assertIn("registry.example:5000: no such name", message)

    def test_timeout_covers_look_up_and_attempts(self) -> None:
        for host in (HOST, Host("slow.example", 443)):
            work = self.dial("192.0.2.1", host=host)
            self.net.advance(19.9)
            self.assertNoResult(work)
            self.net.advance(0.1)
            self.assertIn("timed out", str(self.failureResultOf(work, UpstreamTimeout).value))
        self.assertEqual(self.called_off(), [True])
        self.assertEqual(self.net.getDelayedCalls(), [])

    def test_cancelling_calls_all_off(self) -> None:
        work = self.dial("192.0.2.1", "2001:db8::1")
        self.net.advance(0.25)
        work.cancel()
        self.failureResultOf(work, CancelledError)
        self.assertEqual(self.called_off(), [True, True])
        self.assertEqual(self.net.getDelayedCalls(), [])

    def test_permit_is_asked_about_every_address(self) -> None:
        asked = []

        def permit(address: str) -> None:
            asked.append(address)
            if address.startswith("169."):
                raise DestinationForbidden(f"{address} is forbidden")

        self.dial("169.254.169.254", "192.0.2.1", permit=permit)
        self.net.advance(5)
        self.assertEqual(asked, ["169.254.169.254", "192.0.2.1"])
        self.assertEqual(self.tried, [("192.0.2.1", 5000)])
        self.assertEqual(len(self.resolver.asked), 1)  # nothing is looked up a second time

    def test_nothing_permitted(self) -> None:
        def permit(address: str) -> None:
            raise DestinationForbidden(f"{address} is forbidden")

        work = self.dial("192.0.2.1", "192.0.2.2", permit=permit)
        self.assertEqual(str(self.failureResultOf(work, DestinationForbidden).value), "192.0.2.1 is forbidden")
        work = self.dial(host=Host("::1", 80), permit=permit)
        self.failureResultOf(work, DestinationForbidden)
        self.assertEqual(self.tried, [])
        self.assertEqual(self.resolver.asked, [])  # an address is no name

    def test_overrides(self) -> None:
        def permit(address: str) -> None:
            raise DestinationForbidden(f"{address} is forbidden")

        overrides = {HOST: ("127.0.0.1", 20000)}
        parent = ParentProxy("proxy.example", 3128)
        self.dial(permit=permit, overrides=overrides, proxy=parent)
        self.assertEqual(self.tried, [("127.0.0.1", 20000)])
        self.assertEqual(self.resolver.asked, [])
        self.dial("192.0.2.1", host=Host("registry.example", 443), overrides=overrides)
        self.assertEqual(self.tried[1:], [("192.0.2.1", 443)])

    def test_parent_proxy(self) -> None:
        asked: list[str] = []
        names = {"proxy.example": ["192.0.2.9"]}
        work = self.dial(names=names, proxy=ParentProxy("proxy.example", 3128), permit=asked.append)
        self.assertEqual(self.tried, [("192.0.2.9", 3128)])
        self.assertEqual([name for name, _ in self.resolver.asked], ["proxy.example"])
        wire = self.answer(0)
        self.assertTrue(wire.value().startswith(b"CONNECT registry.example:5000 HTTP/1.1\r\n"))
        self.assertNoResult(work)
        wire.protocol = self.net.tcpClients[0][2]
        self.assertEqual(asked, [])
        work.cancel()
        self.failureResultOf(work, CancelledError)
        self.assertTrue(wire.disconnected)

    def test_parent_proxy_asks_permit_for_literal_addresses(self) -> None:
        def permit(address: str) -> None:
            raise DestinationForbidden(f"{address} is forbidden")

        work = self.dial(host=Host("169.254.169.254", 80), proxy=ParentProxy("192.0.2.9", 3128), permit=permit)
        self.failureResultOf(work, DestinationForbidden)
        self.assertEqual(self.tried, [])

    def test_parent_proxy_out_of_reach(self) -> None:
        work = self.dial(proxy=ParentProxy("192.0.2.9", 3128))
        self.refuse(0)
        message = str(self.failureResultOf(work, UpstreamUnreachable).value)
        self.assertIn("registry.example:5000", message)
        self.assertIn("192.0.2.9:3128: connection refused", message)

    def test_parent_proxy_that_is_silent(self) -> None:
        work = self.dial(proxy=ParentProxy("192.0.2.9", 3128))
        wire = self.answer(0)
        self.net.advance(20)
        self.assertIn("registry.example:5000: timed out", str(self.failureResultOf(work, UpstreamTimeout).value))
        self.assertTrue(wire.disconnected)

    def test_no_proxy_is_dialled_directly(self) -> None:
        self.dial("192.0.2.1", proxy=ParentProxy("192.0.2.9", 3128, None, ("registry.example",)))
        self.assertEqual(self.tried, [("192.0.2.1", 5000)])


class Parent(Protocol):
    """A proxy that answers CONNECT, says something at once, and then echoes."""

    asked = b""

    def dataReceived(self, data: bytes) -> None:
        assert self.transport is not None
        if self.asked:
            self.transport.write(data)
        else:
            self.asked = self.factory.asked = data  # type: ignore[union-attr]
            self.transport.write(b"HTTP/1.1 200 OK\r\n\r\nfirst ")


class Echo(Protocol):
    def __init__(self) -> None:
        self.got = b""
        self.whole: Deferred[bytes] = Deferred()
        self.gone: Deferred[None] = Deferred()

    def connectionMade(self) -> None:
        self.transport.write(b"second")  # type: ignore[union-attr]

    def dataReceived(self, data: bytes) -> None:
        self.got += data
        if self.got == b"first second":
            self.whole.callback(self.got)

    def connectionLost(self, reason: Any = None) -> None:
        self.gone.callback(None)


class Loopback(TestCase):
    timeout = 10

    async def test_through_a_parent_proxy(self) -> None:
        parent: Any = Factory.forProtocol(Parent)
        port = reactor.listenTCP(0, parent, interface="127.0.0.1")
        self.addCleanup(port.stopListening)
        dialer = Dialer(reactor, proxy=ParentProxy("127.0.0.1", port.getHost().port))
        protocol: Any = await dialer.endpoint(HOST).connect(Factory.forProtocol(Echo))
        await protocol.whole
        self.assertTrue(parent.asked.startswith(b"CONNECT registry.example:5000 HTTP/1.1\r\n"))
        protocol.transport.loseConnection()
        await protocol.gone

    async def test_name_of_the_system_resolver(self) -> None:
        port = reactor.listenTCP(0, Factory.forProtocol(Protocol), interface="127.0.0.1")
        self.addCleanup(port.stopListening)
        addresses: list[str] = []
        endpoint = Dialer(reactor, ipv6=False).endpoint(Host("localhost", port.getHost().port), addresses.append)
        protocol: Any = await endpoint.connect(Factory.forProtocol(Echo))
        self.assertEqual(addresses, ["127.0.0.1"])
        protocol.transport.loseConnection()
        await protocol.gone
