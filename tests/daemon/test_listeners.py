"""Listening on real ports of loopback: on all that a setting names, or on none, and with a sentence about why."""

from __future__ import annotations

import re
import socket
import struct
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from twisted.internet import reactor
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.testing import MemoryReactor
from twisted.trial.unittest import TestCase

from dockerproxy.daemon.listeners import ListenError, listen, where

LOCAL = "tcp:0:interface=127.0.0.1"


def connects(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def backlog(port: Any) -> int:
    """Return how many connections may wait to be accepted, which the kernel tells as `tcpi_sacked` (linux/tcp.h)."""
    most: int = struct.unpack_from("=I", port.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32), 28)[0]
    return most


class Listening(TestCase):
    def setUp(self) -> None:
        self.factory = Factory.forProtocol(Protocol)
        self.factory.noisy = False

    async def why(self, *descriptions: str) -> str:
        """Return the sentence about why these cannot be listened on."""
        try:
            ports = await listen(reactor, descriptions, self.factory, "PROXY_LISTEN")
        except ListenError as error:
            return str(error)
        for port in ports:
            await port.stopListening()
        raise AssertionError("it can be listened on")

    async def test_every_description_is_listened_on(self) -> None:
        ports = await listen(reactor, [LOCAL, LOCAL], self.factory, "PROXY_LISTEN")
        numbers = [port.getHost().port for port in ports]
        self.assertEqual([connects(number) for number in numbers], [True, True])
        for port in ports:
            await port.stopListening()
        self.assertEqual([connects(number) for number in numbers], [False, False])

    async def test_a_fleet_may_wait_to_be_accepted(self) -> None:
        """Where more connect at once than may wait, the kernel turns some away that believe to be connected."""
        most = int(Path("/proc/sys/net/core/somaxconn").read_text())
        descriptions = [LOCAL, "tcp:port=0:interface=127.0.0.1", "tcp6:0:interface=\\:\\:1", f"{LOCAL}:backlog=7"]
        ports = await listen(reactor, descriptions, self.factory, "PROXY_LISTEN")
        self.assertEqual([backlog(port) for port in ports], [*[min(4096, most)] * 3, 7])
        for port in ports:
            await port.stopListening()

    async def test_as_many_may_wait_at_a_unix_socket(self) -> None:
        with ExitStack() as stack:
            path = f"{stack.enter_context(TemporaryDirectory())}/socket"
            (port,) = await listen(reactor, [f"unix:{path}"], self.factory, "PROXY_LISTEN")
            for _ in range(100):  # which the reactor does not get to accept meanwhile
                waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
                waiting.setblocking(False)
                waiting.connect(path)  # BlockingIOError where no more may wait
            await port.stopListening()

    async def test_nothing_is_nothing(self) -> None:
        self.assertEqual(await listen(reactor, [], self.factory, "PROXY_LISTEN"), [])

    async def test_a_port_that_is_taken(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            description = f"tcp:{taken.getsockname()[1]}:interface=127.0.0.1"
            sentence = f"PROXY_LISTEN: {description} cannot be listened on: Address already in use."
            self.assertEqual(await self.why(description), sentence)

    async def test_where_one_cannot_be_had_none_is_kept(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
            free, taken = one.getsockname()[1], other.getsockname()[1]
            one.close()
            self.assertIn(str(taken), await self.why(*(f"tcp:{port}:interface=127.0.0.1" for port in (free, taken))))
            self.assertFalse(connects(free))

    async def test_what_is_wrong_is_said(self) -> None:
        folder = Path(self.mktemp())
        for description, reason in [
            ("tcp:0:interface=192.0.2.1", "Cannot assign requested address"),
            ("tcp:0:interface=999.1.1.1", "[Nn]ame or service|[Nn]ot known|resolution"),
            ("foo:3128", "Unknown endpoint type: 'foo'"),
            ("tcp:port=http", "invalid literal"),
            ("tcp:port=70000", "0-65535"),
            ("tcp:colour=red", "it describes no endpoint"),
            ("tcp6:1:interface=::1", "it describes no endpoint"),
            ("systemd:domain=INET:index=9", "systemd has no such socket"),
            ("systemd:domain=INET:colour=red", "it describes no endpoint"),
            (f"unix:{folder}/missing/socket", "No such file or directory"),
        ]:
            sentence = await self.why(description)
            self.assertTrue(sentence.startswith(f"PROXY_LISTEN: {description} cannot be listened on: "), sentence)
            self.assertTrue(re.search(reason, sentence), sentence)
            self.assertNotIn("\n", sentence)
            self.assertNotIn("Errno", sentence)
            self.assertNotIn("_parse", sentence)

    def test_where_a_port_is(self) -> None:
        class Port:
            def __init__(self, address: Any) -> None:
                self.address = address

            def getHost(self) -> Any:
                return self.address

        self.assertEqual(where(Port(IPv4Address("TCP", "127.0.0.1", 3128))), "127.0.0.1:3128")  # type: ignore[arg-type]
        self.assertEqual(where(Port(IPv6Address("TCP", "::1", 3128))), "[::1]:3128")  # type: ignore[arg-type]
        self.assertIn("/run/x", where(Port(UNIXAddress("/run/x"))))  # type: ignore[arg-type]

    async def test_the_reactor_is_the_one_that_is_given(self) -> None:
        memory = MemoryReactor()
        await listen(memory, ["tcp:3128:interface=127.0.0.1"], self.factory, "PROXY_LISTEN")
        self.assertEqual(memory.tcpServers[0][:2], (3128, self.factory))
