"""Dispatch of real connections on loopback. This process plays the main process and the worker."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any

from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import TestCase

from dockerproxy.http.request import Request
from dockerproxy.http.site import ServerTimeouts, Site
from dockerproxy.workers.dispatch import ConnectionDispatcher, ConnectionReceiver
from dockerproxy.workers.message_socket import MessageSocket, socketpair

reactor: Any = _reactor

TIMEOUT = 20
GET = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


class SiteProcess:
    """The sites of one process, which respond with their names. Counts the closed connections."""

    def __init__(self, *names: str) -> None:
        self.closed_connections = 0
        self.sites = [self._make_site(name) for name in names]

    def _make_site(self, name: str) -> Site:
        async def handle(request: Request) -> None:
            request.respond(200, [], f"{name} {request.client}".encode())

        site = Site(reactor, handle, timeouts=ServerTimeouts(), on_request_finished=lambda request, seconds: None)
        site.on_closed = self.count_closed
        return site

    def count_closed(self) -> None:
        self.closed_connections += 1


class DispatchTestCase(TestCase):
    """The main process has the sites "here 0" and "here 1", the worker has "there 0" and "there 1"."""

    timeout = 60

    def setUp(self) -> None:
        self.local, self.remote = SiteProcess("here 0", "here 1"), SiteProcess("there 0", "there 1")
        parent_socket, child_socket = socketpair()
        self.receiver = ConnectionReceiver(reactor, self.remote.sites, self.remote.count_closed)
        self.sender = MessageSocket(
            reactor, parent_socket, lambda message: None, lambda label, descriptor: None, lambda: None
        )
        self.receiving_end = MessageSocket(reactor, child_socket, lambda message: None, self.receiver, lambda: None)
        self.addCleanup(self.sender.close)
        self.addCleanup(self.receiving_end.close)
        self.dispatched: list[bool] = []
        self.labels: list[bytes] = []

    def dispatch(self, label: bytes, sock: socket.socket | None) -> bool:
        self.labels.append(label)
        self.dispatched.append(sock is not None and self.sender.send_descriptors(label, sock.fileno()))
        return self.dispatched[-1]

    def listen(self, number: int = 0, interface: str = "127.0.0.1") -> int:
        factory = ConnectionDispatcher(number, self.local.sites[number], self.dispatch)
        port = reactor.listenTCP(0, factory, interface=interface)
        self.addCleanup(port.stopListening)
        port_number: int = port.getHost().port
        return port_number

    async def get(self, *address: Any, family: int = socket.AF_INET) -> bytes:
        body: bytes = await deferToThread(_get, family, address)
        return body

    async def wait_until(self, condition: Any) -> None:
        while not condition():
            await deferLater(reactor, 0)


def _get(family: int, address: Any) -> bytes:
    """Send GET. Return the body of the response, after the other side has closed the connection."""
    with socket.socket(family) as client:
        client.settimeout(TIMEOUT)
        client.connect(address if len(address) > 1 else address[0])
        client.sendall(GET)
        received = b"".join(iter(lambda: client.recv(65536), b""))
    return received.partition(b"\r\n\r\n")[2]


class ConnectionDispatcherTests(DispatchTestCase):
    async def test_connection_is_handled_by_the_other_process(self) -> None:
        self.assertEqual(await self.get("127.0.0.1", self.listen()), b"there 0 127.0.0.1")
        self.assertEqual(self.labels, [bytes([0, socket.AF_INET])])
        await self.wait_until(lambda: self.remote.closed_connections)
        self.assertEqual((self.local.closed_connections, self.remote.closed_connections), (0, 1))

    async def test_each_listener_has_its_own_site(self) -> None:
        ports = [self.listen(0), self.listen(1)]
        bodies = [await self.get("127.0.0.1", port) for port in ports]
        self.assertEqual(bodies, [b"there 0 127.0.0.1", b"there 1 127.0.0.1"])

    async def test_ipv6(self) -> None:
        port = self.listen(interface="::1")
        self.assertEqual(await self.get("::1", port, family=socket.AF_INET6), b"there 0 ::1")
        self.assertEqual(self.labels, [bytes([0, socket.AF_INET6])])

    async def test_ipv4_on_a_dual_stack_socket(self) -> None:
        self.assertEqual(await self.get("127.0.0.1", self.listen(interface="::")), b"there 0 127.0.0.1")

    async def test_undispatched_connection_is_handled_locally(self) -> None:
        port = self.listen()
        self.sender.close()
        self.assertEqual(await self.get("127.0.0.1", port), b"here 0 127.0.0.1")
        self.assertEqual(self.dispatched, [False])
        await self.wait_until(lambda: self.local.closed_connections)
        self.assertEqual((self.local.closed_connections, self.remote.closed_connections), (1, 0))

    async def test_full_message_socket(self) -> None:
        port = self.listen()
        reactor.removeReader(self.receiving_end)
        while not self.sender._send_queue:
            self.sender.send("x" * 1000)
        self.assertEqual(await self.get("127.0.0.1", port), b"here 0 127.0.0.1")
        reactor.addReader(self.receiving_end)
        await self.wait_until(lambda: not self.sender._send_queue)
        self.assertEqual(await self.get("127.0.0.1", port), b"there 0 127.0.0.1")
        self.assertEqual(self.dispatched, [False, True])

    async def test_unix_sockets_are_handled_locally(self) -> None:
        path = os.path.relpath(self.mktemp())  # because an absolute one may exceed the 107 bytes of a socket's address
        port = reactor.listenUNIX(path, ConnectionDispatcher(1, self.local.sites[1], self.dispatch))
        self.addCleanup(port.stopListening)
        self.assertTrue((await self.get(path, family=socket.AF_UNIX)).startswith(b"here 1 "))
        self.assertEqual(self.dispatched, [False])

    async def test_client_disconnects_before_adoption(self) -> None:
        port = self.listen()
        reactor.removeReader(self.receiving_end)
        with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT) as client:
            await self.wait_until(lambda: self.dispatched)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")  # reset
        descriptors_before = _count_sockets()
        reactor.addReader(self.receiving_end)
        await self.wait_until(lambda: self.remote.closed_connections)
        self.assertEqual(self.remote.closed_connections, 1)
        self.assertEqual(_count_sockets() - descriptors_before, 0)
        self.assertEqual(await self.get("127.0.0.1", port), b"there 0 127.0.0.1")

    async def test_no_descriptors_leak(self) -> None:
        port = self.listen()
        descriptors_before = _count_sockets()
        for _ in range(5):
            await self.get("127.0.0.1", port)
        await self.wait_until(lambda: self.remote.closed_connections == 5)
        self.assertEqual(_count_sockets(), descriptors_before)

    async def test_dispatch_does_not_shut_the_connection_down(self) -> None:
        """The worker reads the bytes that arrived before the dispatch and those that arrive after it."""
        port = self.listen()
        reactor.removeReader(self.receiving_end)
        with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT) as client:
            client.sendall(GET[:5])
            await self.wait_until(lambda: self.dispatched)
            reactor.addReader(self.receiving_end)
            self.assertEqual(self.remote.closed_connections, 0)
            received = deferToThread(_send_rest, client)
            self.assertTrue((await received).endswith(b"there 0 127.0.0.1"))

    async def test_concurrent_connections(self) -> None:
        ports = [self.listen(0), self.listen(1)]
        bodies: list[Deferred[bytes]] = [
            Deferred.fromCoroutine(self.get("127.0.0.1", ports[number % 2])) for number in range(40)
        ]
        for number, body in enumerate(bodies):
            self.assertEqual(await body, f"there {number % 2} 127.0.0.1".encode())
        self.assertEqual(self.dispatched, [True] * 40)


def _send_rest(client: socket.socket) -> bytes:
    client.sendall(GET[5:])
    return b"".join(iter(lambda: client.recv(65536), b""))


def _count_sockets() -> int:
    return sum(1 for _ in _open_sockets())


def _open_sockets() -> Iterator[str]:
    """Yield the open sockets of this process. Other descriptors are ignored, because threads open and close some."""
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue
        if target.startswith("socket:"):
            yield target
