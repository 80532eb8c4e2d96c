"""Connections on their way between processes: real ones on loopback; both ends of the line are in this process."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import TestCase

from dockerproxy.http.request import Request
from dockerproxy.http.site import Site, Timeouts
from dockerproxy.workers.line import Line, pair
from dockerproxy.workers.passing import PassingOn, Taking

reactor: Any = _reactor

SECONDS = 20
GET = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


class Process:
    """Sites of one process, each of which answers with its name, and how many connections have ended there."""

    def __init__(self, *names: str) -> None:
        self.ended = 0
        self.sites = [self._make(name) for name in names]

    def _make(self, name: str) -> Site:
        async def answer(request: Request) -> None:
            request.answer(200, [], f"{name} {request.client}".encode())

        site = Site(reactor, answer, timeouts=Timeouts(), finished=lambda request, seconds: None)
        site.gone = self.count
        return site

    def count(self) -> None:
        self.ended += 1


class Case(TestCase):
    """The doors are `site`s 0 and 1 of the process `here`; `line` leads to the process `there`."""

    timeout = 60

    def setUp(self) -> None:
        self.here, self.there = Process("here 0", "here 1"), Process("there 0", "there 1")
        ours, theirs = pair()
        self.taking = Taking(reactor, self.there.sites, self.there.count)
        self.line = Line(reactor, ours, lambda message: None, lambda label, descriptor: None, lambda: None)
        self.end = Line(reactor, theirs, lambda message: None, self.taking, lambda: None)
        self.addCleanup(self.line.close)
        self.addCleanup(self.end.close)
        self.passed: list[bool] = []
        self.labels: list[bytes] = []

    def pass_on(self, label: bytes, handle: socket.socket | None) -> bool:
        self.labels.append(label)
        self.passed.append(handle is not None and self.line.pass_on(label, handle.fileno()))
        return self.passed[-1]

    def listen(self, number: int = 0, interface: str = "127.0.0.1") -> int:
        factory = PassingOn(number, self.here.sites[number], self.pass_on)
        port = reactor.listenTCP(0, factory, interface=interface)
        self.addCleanup(port.stopListening)
        found: int = port.getHost().port
        return found

    async def ask(self, *address: Any, family: int = socket.AF_INET) -> bytes:
        body: bytes = await deferToThread(_ask, family, address)
        return body

    async def until(self, condition: Any) -> None:
        while not condition():
            await deferLater(reactor, 0)


def _ask(family: int, address: Any) -> bytes:
    """Return the body of what is answered until the other side closes in good order."""
    with socket.socket(family) as client:
        client.settimeout(SECONDS)
        client.connect(address if len(address) > 1 else address[0])
        client.sendall(GET)
        received = b"".join(iter(lambda: client.recv(65536), b""))
    return received.partition(b"\r\n\r\n")[2]


class Passing(Case):
    async def test_another_process_serves_it(self) -> None:
        self.assertEqual(await self.ask("127.0.0.1", self.listen()), b"there 0 127.0.0.1")
        self.assertEqual(self.labels, [bytes([0, socket.AF_INET])])
        await self.until(lambda: self.there.ended)
        self.assertEqual((self.here.ended, self.there.ended), (0, 1))

    async def test_each_door_has_its_own_site(self) -> None:
        ports = [self.listen(0), self.listen(1)]
        answers = [await self.ask("127.0.0.1", port) for port in ports]
        self.assertEqual(answers, [b"there 0 127.0.0.1", b"there 1 127.0.0.1"])

    async def test_ipv6(self) -> None:
        port = self.listen(interface="::1")
        self.assertEqual(await self.ask("::1", port, family=socket.AF_INET6), b"there 0 ::1")
        self.assertEqual(self.labels, [bytes([0, socket.AF_INET6])])

    async def test_ipv4_on_a_socket_for_both(self) -> None:
        self.assertEqual(await self.ask("127.0.0.1", self.listen(interface="::")), b"there 0 127.0.0.1")

    async def test_what_is_not_passed_on_is_served_here(self) -> None:
        port = self.listen()
        self.line.close()
        self.assertEqual(await self.ask("127.0.0.1", port), b"here 0 127.0.0.1")
        self.assertEqual(self.passed, [False])
        await self.until(lambda: self.here.ended)
        self.assertEqual((self.here.ended, self.there.ended), (1, 0))

    async def test_a_line_that_is_full(self) -> None:
        port = self.listen()
        reactor.removeReader(self.end)
        while not self.line._waiting:
            self.line.send("x" * 1000)
        self.assertEqual(await self.ask("127.0.0.1", port), b"here 0 127.0.0.1")
        reactor.addReader(self.end)
        await self.until(lambda: not self.line._waiting)
        self.assertEqual(await self.ask("127.0.0.1", port), b"there 0 127.0.0.1")
        self.assertEqual(self.passed, [False, True])

    async def test_unix_sockets_are_served_here(self) -> None:
        path = str(Path(self.mktemp()).absolute())
        port = reactor.listenUNIX(path, PassingOn(1, self.here.sites[1], self.pass_on))
        self.addCleanup(port.stopListening)
        relative = os.path.relpath(path)  # a socket's address has some 100 bytes
        self.assertTrue((await self.ask(relative, family=socket.AF_UNIX)).startswith(b"here 1 "))
        self.assertEqual(self.passed, [False])

    async def test_a_client_that_has_gone_before_it_is_taken_in(self) -> None:
        port = self.listen()
        reactor.removeReader(self.end)
        with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as client:
            await self.until(lambda: self.passed)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")  # reset
        open_before = _descriptors()
        reactor.addReader(self.end)
        await self.until(lambda: self.there.ended)
        self.assertEqual(self.there.ended, 1)
        self.assertEqual(_descriptors() - open_before, 0)
        self.assertEqual(await self.ask("127.0.0.1", port), b"there 0 127.0.0.1")

    async def test_nothing_is_left_open_here(self) -> None:
        port = self.listen()
        before = _descriptors()
        for _ in range(5):
            await self.ask("127.0.0.1", port)
        await self.until(lambda: self.there.ended == 5)
        self.assertEqual(_descriptors(), before)

    async def test_who_passes_a_connection_on_does_not_shut_it_down(self) -> None:
        """Bytes that came before, and those that come when it is long elsewhere, are all read there."""
        port = self.listen()
        reactor.removeReader(self.end)
        with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as client:
            client.sendall(GET[:5])
            await self.until(lambda: self.passed)
            reactor.addReader(self.end)
            self.assertEqual(self.there.ended, 0)
            received = deferToThread(_rest, client)
            self.assertTrue((await received).endswith(b"there 0 127.0.0.1"))

    async def test_many_at_once(self) -> None:
        ports = [self.listen(0), self.listen(1)]
        answers: list[Deferred[bytes]] = [
            Deferred.fromCoroutine(self.ask("127.0.0.1", ports[number % 2])) for number in range(40)
        ]
        for number, answer in enumerate(answers):
            self.assertEqual(await answer, f"there {number % 2} 127.0.0.1".encode())
        self.assertEqual(self.passed, [True] * 40)


def _rest(client: socket.socket) -> bytes:
    client.sendall(GET[5:])
    return b"".join(iter(lambda: client.recv(65536), b""))


def _descriptors() -> int:
    return sum(1 for _ in _sockets())


def _sockets() -> Iterator[str]:
    """Yield the sockets that this process has open; its threads' pipes and files come and go."""
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue
        if target.startswith("socket:"):
            yield target
