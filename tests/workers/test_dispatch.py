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

from dockerproxy.daemon.listener_service import EndpointOpener, Listener
from dockerproxy.errors import TooManyRequests
from dockerproxy.http.request import Request
from dockerproxy.http.site import ServerTimeouts, Site
from dockerproxy.workers.connection_table import ConnectionTable
from dockerproxy.workers.dispatch import ConnectionDispatcher, ConnectionReceiver
from dockerproxy.workers.message_socket import MessageSocket, socketpair
from dockerproxy.workers.scoreboard import Scoreboard

reactor: Any = _reactor

TIMEOUT = 20
GET = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


class SiteProcess:
    """The sites of one process, which respond with their names. Notes the numbers of closed connections."""

    def __init__(self, *names: str) -> None:
        self.closed_connections: list[int] = []
        self.sites = [self._make_site(name) for name in names]

    def _make_site(self, name: str) -> Site:
        async def handle(request: Request) -> None:
            request.respond(200, [], f"{name} {request.client}".encode())

        return Site(
            reactor,
            handle,
            timeouts=ServerTimeouts(),
            on_request_finished=lambda request, seconds: None,
        )

    def note_closed(self, index: int) -> None:
        self.closed_connections.append(index)


class DispatchTestCase(TestCase):
    """The main process has the sites "here 0" and "here 1", the worker has "there 0" and "there 1"."""

    timeout = 60

    def setUp(self) -> None:
        self.local, self.remote = SiteProcess("here 0", "here 1"), SiteProcess("there 0", "there 1")
        parent_socket, child_socket = socketpair()
        sites = {f"LISTEN_{number}": site for number, site in enumerate(self.remote.sites)}
        self.receiver = ConnectionReceiver(reactor, sites, self.remote.note_closed)
        self.sender = MessageSocket(reactor, parent_socket, lambda message: None, lambda: None)
        self.receiving_end = MessageSocket(reactor, child_socket, lambda message: None, lambda: None, self.receiver)
        self.addCleanup(self.sender.close)
        self.addCleanup(self.receiving_end.close)
        self.dispatched: list[bool] = []
        self.settings: list[str] = []
        self.clients: list[str] = []
        self.scoreboard = Scoreboard.create(1, 100)
        self.idle_closed: list[str] = []
        self.table = ConnectionTable(reactor, self.scoreboard, self.idle_closed.append, share=4)

    @property
    def local_connections(self) -> tuple[int, int]:
        """The connections that this process serves, and those that it has closed."""
        return self.table.open_in(0), self.scoreboard.slot(0).closed_connections

    def dispatch(self, setting: str, sock: socket.socket, client: str) -> bool:
        self.settings.append(setting)
        self.clients.append(client)
        try:
            self.sender.send_descriptors([setting, 5], [sock.fileno()])
        except OSError:
            self.dispatched.append(False)
        else:
            self.dispatched.append(True)
        return self.dispatched[-1]

    async def open(self, description: str, number: int) -> IListeningPort:
        listener = Listener(f"LISTEN_{number}", (description,), self.local.sites[number])
        opener = EndpointOpener(reactor, lambda listener: ConnectionDispatcher(listener, self.table, self.dispatch))
        [port] = await opener.open(listener)
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
        self.assertEqual((self.settings, self.clients, self.local_connections), (["LISTEN_0"], ["127.0.0.1"], (0, 0)))
        await self.wait_until(lambda: self.remote.closed_connections)
        self.assertEqual(self.remote.closed_connections, [5])

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
        self.assertEqual(self.dispatched, [False])
        await self.wait_until(lambda: self.local_connections == (0, 1))
        self.assertEqual(self.remote.closed_connections, [])

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
        self.assertEqual(self.dispatched, [])
        await self.wait_until(lambda: self.local_connections == (0, 1))

    async def test_client_disconnects_before_adoption(self) -> None:
        port = await self.listen()
        reactor.removeReader(self.receiving_end)
        with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT) as client:
            await self.wait_until(lambda: self.dispatched)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")  # reset
        descriptors_before = _count_sockets()
        reactor.addReader(self.receiving_end)
        await self.wait_until(lambda: self.remote.closed_connections)
        self.assertEqual(self.remote.closed_connections, [5])
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
        self.assertEqual(self.remote.closed_connections, [5, 5, 5])
        lost = [event["count"] for event in events if "too many open files" in (event.get("log_format") or "")]
        self.assertEqual(lost, [1])  # further lines follow later, because each connection could be lost
        reactor.addReader(self.receiving_end)
        self.assertEqual(await self.get("127.0.0.1", port), b"there 0 127.0.0.1")

    async def test_no_descriptors_leak(self) -> None:
        port = await self.listen()
        descriptors_before = _count_sockets()
        for _ in range(5):
            await self.get("127.0.0.1", port)
        await self.wait_until(lambda: len(self.remote.closed_connections) == 5)
        self.assertEqual(_count_sockets(), descriptors_before)

    async def test_dispatch_does_not_shut_the_connection_down(self) -> None:
        """The worker reads the bytes that arrived before the dispatch and those that arrive after it."""
        port = await self.listen()
        reactor.removeReader(self.receiving_end)
        with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT) as client:
            client.sendall(GET[:5])
            await self.wait_until(lambda: self.dispatched)
            reactor.addReader(self.receiving_end)
            self.assertEqual(self.remote.closed_connections, [])
            received = deferToThread(_send_rest, client)
            self.assertTrue((await received).endswith(b"there 0 127.0.0.1"))

    async def use_whole_share(self, stack: contextlib.ExitStack, port: int) -> None:
        """Open the four connections that 127.0.0.1 may have, all of which stay in this process."""
        self.sender.close()
        for _ in range(4):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT))
        await self.wait_until(lambda: self.local_connections == (4, 0))

    async def test_a_client_at_its_share_is_told_so_and_another_is_served(self) -> None:
        port = await self.listen()
        with contextlib.ExitStack() as stack:
            await self.use_whole_share(stack, port)
            response = await deferToThread(_converse, ("127.0.0.1", port), GET)
            head, _, body = response.partition(b"\r\n\r\n")
            self.assertEqual(
                head.split(b"\r\n")[0],
                b"HTTP/1.1 429 127.0.0.1 has 4 of the 4 open connections that one client may have "
                b"(MAX_CONNECTIONS_PER_CLIENT) (docker-registry-proxy)",
            )
            self.assertIn(b"Retry-After: 1", head)
            self.assertEqual(
                body,
                b"127.0.0.1 has 4 of the 4 open connections that one client may have (MAX_CONNECTIONS_PER_CLIENT)\n",
            )
            self.assertEqual(self.idle_closed, ["127.0.0.1"])
            response = await deferToThread(_converse, ("127.0.0.1", port), GET, "127.0.0.2")
            self.assertTrue(response.endswith(b"here 0 127.0.0.2"))
        await self.wait_until(lambda: self.local_connections[0] == 0)
        self.assertEqual(await self.get("127.0.0.1", port), b"here 0 127.0.0.1")

    async def test_a_refused_connection_leaks_no_descriptor(self) -> None:
        port = await self.listen()
        with contextlib.ExitStack() as stack:
            await self.use_whole_share(stack, port)
            descriptors_before = _count_sockets()
            for _ in range(3):
                self.assertIn(b"429", await deferToThread(_converse, ("127.0.0.1", port), GET))
            self.assertEqual(_count_sockets(), descriptors_before)

    async def test_a_refused_connection_gets_nothing_before_tls(self) -> None:
        self.local.sites[1]._get_tls_context = lambda: None  # type: ignore[assignment,return-value]
        port = await self.listen(1)
        self.table.refusal = lambda client: TooManyRequests("no")  # type: ignore[method-assign]
        self.assertEqual(await deferToThread(_converse, ("127.0.0.1", port), b""), b"")

    async def test_concurrent_connections(self) -> None:
        ports = [await self.listen(0), await self.listen(1)]
        bodies: list[Deferred[bytes]] = [
            Deferred.fromCoroutine(self.get("127.0.0.1", ports[number % 2])) for number in range(40)
        ]
        for number, body in enumerate(bodies):
            self.assertEqual(await body, f"there {number % 2} 127.0.0.1".encode())
        self.assertEqual(self.dispatched, [True] * 40)


def _converse(address: tuple[str, int], data: bytes, source: str = "127.0.0.1") -> bytes:
    """Send `data` and return all that arrives until the end."""
    with socket.create_connection(address, timeout=TIMEOUT, source_address=(source, 0)) as client:
        with contextlib.suppress(ConnectionError):
            client.sendall(data)
        return b"".join(iter(lambda: _read_until_closed(client), b""))


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
