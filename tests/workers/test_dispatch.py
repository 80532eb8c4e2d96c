"""Dispatch of real connections on loopback. This process plays the main process and the worker."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
from collections.abc import Iterator
from typing import Any

from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IListeningPort
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread
from twisted.logger import LogEvent, globalLogPublisher
from twisted.trial.unittest import TestCase

from dockerproxy.daemon.listener_service import Listener
from dockerproxy.http.request import Request
from dockerproxy.http.site import ServerTimeouts, Site
from dockerproxy.workers.dispatch import ConnectionReceiver, DispatchingOpener
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

        return Site(
            reactor,
            handle,
            timeouts=ServerTimeouts(),
            on_request_finished=lambda request, seconds: None,
            on_connection_closed=self.count_closed,
        )

    def count_closed(self) -> None:
        self.closed_connections += 1


class DispatchTestCase(TestCase):
    """The main process has the sites "here 0" and "here 1", the worker has "there 0" and "there 1"."""

    timeout = 60

    def setUp(self) -> None:
        self.local, self.remote = SiteProcess("here 0", "here 1"), SiteProcess("there 0", "there 1")
        parent_socket, child_socket = socketpair()
        sites = {f"LISTEN_{number}": site for number, site in enumerate(self.remote.sites)}
        self.receiver = ConnectionReceiver(reactor, sites, self.remote.count_closed)
        self.sender = MessageSocket(reactor, parent_socket, lambda message: None, lambda: None)
        self.receiving_end = MessageSocket(reactor, child_socket, lambda message: None, lambda: None, self.receiver)
        self.addCleanup(self.sender.close)
        self.addCleanup(self.receiving_end.close)
        self.dispatched: list[bool] = []
        self.settings: list[str] = []
        self.local_connections = 0

    def dispatch(self, setting: str, sock: socket.socket) -> bool:
        self.settings.append(setting)
        try:
            self.sender.send_descriptors(setting, [sock.fileno()])
        except OSError:
            self.dispatched.append(False)
        else:
            self.dispatched.append(True)
        return self.dispatched[-1]

    def count_local(self) -> None:
        self.local_connections += 1

    async def open(self, description: str, number: int) -> IListeningPort:
        listener = Listener(f"LISTEN_{number}", (description,), self.local.sites[number])
        [port] = await DispatchingOpener(reactor, self.dispatch, self.count_local).open(listener)
        self.addCleanup(port.stopListening)
        return port

    async def listen(self, number: int = 0, interface: str = "127.0.0.1") -> int:
        port = await self.open(f"tcp:0:interface={interface}".replace("::", r"\:\:"), number)
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
        self.assertEqual(await self.get("127.0.0.1", await self.listen()), b"there 0 127.0.0.1")
        self.assertEqual((self.settings, self.local_connections), (["LISTEN_0"], 0))
        await self.wait_until(lambda: self.remote.closed_connections)
        self.assertEqual((self.local.closed_connections, self.remote.closed_connections), (0, 1))

    async def test_each_listener_has_its_own_site(self) -> None:
        ports = [await self.listen(0), await self.listen(1)]
        bodies = [await self.get("127.0.0.1", port) for port in ports]
        self.assertEqual(bodies, [b"there 0 127.0.0.1", b"there 1 127.0.0.1"])

    async def test_ipv6(self) -> None:
        port = await self.listen(interface="::1")
        self.assertEqual(await self.get("::1", port, family=socket.AF_INET6), b"there 0 ::1")

    async def test_ipv4_on_a_dual_stack_socket(self) -> None:
        self.assertEqual(await self.get("127.0.0.1", await self.listen(interface="::")), b"there 0 127.0.0.1")

    async def test_undispatched_connection_is_handled_locally(self) -> None:
        port = await self.listen()
        self.sender.close()
        self.assertEqual(await self.get("127.0.0.1", port), b"here 0 127.0.0.1")
        self.assertEqual((self.dispatched, self.local_connections), ([False], 1))
        await self.wait_until(lambda: self.local.closed_connections)
        self.assertEqual((self.local.closed_connections, self.remote.closed_connections), (1, 0))

    async def test_full_message_socket(self) -> None:
        port = await self.listen()
        reactor.removeReader(self.receiving_end)
        while not self.sender.queued:
            self.sender.send("x" * 1000)
        self.assertEqual(await self.get("127.0.0.1", port), b"here 0 127.0.0.1")
        reactor.addReader(self.receiving_end)
        await self.wait_until(lambda: not self.sender.queued)
        self.assertEqual(await self.get("127.0.0.1", port), b"there 0 127.0.0.1")
        self.assertEqual(self.dispatched, [False, True])

    async def test_unix_sockets_are_handled_locally(self) -> None:
        path = os.path.relpath(self.mktemp())  # because an absolute one may exceed the 107 bytes of a socket's address
        await self.open(f"unix:{path}", 1)
        self.assertTrue((await self.get(path, family=socket.AF_UNIX)).startswith(b"here 1 "))
        self.assertEqual((self.dispatched, self.local_connections), ([], 1))

    async def test_client_disconnects_before_adoption(self) -> None:
        port = await self.listen()
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

    async def test_worker_at_its_limit_of_open_files(self) -> None:
        """The connection is closed, counted and logged. The worker serves the next one."""
        events: list[LogEvent] = []
        globalLogPublisher.addObserver(events.append)
        self.addCleanup(globalLogPublisher.removeObserver, events.append)
        port = await self.listen()
        reactor.removeReader(self.receiving_end)
        with contextlib.ExitStack() as stack:
            clients = [
                stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT)) for _ in range(3)
            ]
            await self.wait_until(lambda: len(self.dispatched) == 3)
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            used = []
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, limits[1]))
                with contextlib.suppress(OSError):
                    while True:
                        used.append(os.dup(0))
                self.receiving_end.doRead()
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
                for descriptor in used:
                    os.close(descriptor)
            for client in clients:
                self.assertEqual(await deferToThread(_read_until_closed, client), b"")
        self.assertEqual(self.remote.closed_connections, 3)
        lost = [event["count"] for event in events if "too many open files" in (event.get("log_format") or "")]
        self.assertEqual(lost, [1])  # further lines follow later, because each connection could be lost
        reactor.addReader(self.receiving_end)
        self.assertEqual(await self.get("127.0.0.1", port), b"there 0 127.0.0.1")

    async def test_no_descriptors_leak(self) -> None:
        port = await self.listen()
        descriptors_before = _count_sockets()
        for _ in range(5):
            await self.get("127.0.0.1", port)
        await self.wait_until(lambda: self.remote.closed_connections == 5)
        self.assertEqual(_count_sockets(), descriptors_before)

    async def test_dispatch_does_not_shut_the_connection_down(self) -> None:
        """The worker reads the bytes that arrived before the dispatch and those that arrive after it."""
        port = await self.listen()
        reactor.removeReader(self.receiving_end)
        with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT) as client:
            client.sendall(GET[:5])
            await self.wait_until(lambda: self.dispatched)
            reactor.addReader(self.receiving_end)
            self.assertEqual(self.remote.closed_connections, 0)
            received = deferToThread(_send_rest, client)
            self.assertTrue((await received).endswith(b"there 0 127.0.0.1"))

    async def test_concurrent_connections(self) -> None:
        ports = [await self.listen(0), await self.listen(1)]
        bodies: list[Deferred[bytes]] = [
            Deferred.fromCoroutine(self.get("127.0.0.1", ports[number % 2])) for number in range(40)
        ]
        for number, body in enumerate(bodies):
            self.assertEqual(await body, f"there {number % 2} 127.0.0.1".encode())
        self.assertEqual(self.dispatched, [True] * 40)


def _read_until_closed(client: socket.socket) -> bytes:
    """Return what arrives on `client`; a reset counts as the end."""
    try:
        return client.recv(1000)
    except ConnectionResetError as error:
        assert error.errno == errno.ECONNRESET
        return b""


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
