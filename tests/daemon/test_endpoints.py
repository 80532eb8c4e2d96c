"""Listening on real loopback ports: on all endpoints of a setting or on none, with a one-sentence error."""

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

from dockerproxy.daemon.endpoints import ListenError, format_address, listen

LOCAL = "tcp:0:interface=127.0.0.1"


def connects(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def backlog(port: Any) -> int:
    """Return the limit of the accept queue. The kernel reports it as `tcpi_sacked` for a listener (linux/tcp.h)."""
    limit: int = struct.unpack_from("=I", port.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32), 28)[0]
    return limit


class ListenTests(TestCase):
    def setUp(self) -> None:
        self.factory = Factory.forProtocol(Protocol)
        self.factory.noisy = False

    async def listen_error(self, *descriptions: str) -> str:
        """Return the error message of listening on `descriptions`."""
        try:
            ports = await listen(reactor, descriptions, self.factory, "PROXY_LISTEN")
        except ListenError as error:
            return str(error)
        for port in ports:
            await port.stopListening()
        raise AssertionError(f"listening on {descriptions} succeeded")

    async def test_listens_on_every_description(self) -> None:
        ports = await listen(reactor, [LOCAL, LOCAL], self.factory, "PROXY_LISTEN")
        numbers = [port.getHost().port for port in ports]
        self.assertEqual([connects(number) for number in numbers], [True, True])
        for port in ports:
            await port.stopListening()
        self.assertEqual([connects(number) for number in numbers], [False, False])

    async def test_tcp_endpoints_get_a_large_backlog(self) -> None:
        """If the accept queue is full, the kernel resets clients that already regard themselves as connected."""
        limit = int(Path("/proc/sys/net/core/somaxconn").read_text())
        descriptions = [LOCAL, "tcp:port=0:interface=127.0.0.1", "tcp6:0:interface=\\:\\:1", f"{LOCAL}:backlog=7"]
        ports = await listen(reactor, descriptions, self.factory, "PROXY_LISTEN")
        self.assertEqual([backlog(port) for port in ports], [*[min(4096, limit)] * 3, 7])
        for port in ports:
            await port.stopListening()

    async def test_unix_endpoints_get_a_large_backlog(self) -> None:
        with ExitStack() as stack:
            path = f"{stack.enter_context(TemporaryDirectory())}/socket"
            (port,) = await listen(reactor, [f"unix:{path}"], self.factory, "PROXY_LISTEN")
            for _ in range(100):  # the reactor accepts none of them, because the test does not yield to it
                client = stack.enter_context(socket.socket(socket.AF_UNIX))
                client.setblocking(False)
                client.connect(path)  # raises BlockingIOError if the queue is full
            await port.stopListening()

    async def test_an_empty_setting_opens_no_port(self) -> None:
        self.assertEqual(await listen(reactor, [], self.factory, "PROXY_LISTEN"), [])

    async def test_a_port_in_use_is_reported(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            description = f"tcp:{listener.getsockname()[1]}:interface=127.0.0.1"
            message = f"PROXY_LISTEN: cannot listen on {description}: Address already in use."
            self.assertEqual(await self.listen_error(description), message)

    async def test_one_failure_closes_all_ports(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
            free_port, port_in_use = one.getsockname()[1], other.getsockname()[1]
            one.close()
            self.assertIn(
                str(port_in_use),
                await self.listen_error(*(f"tcp:{port}:interface=127.0.0.1" for port in (free_port, port_in_use))),
            )
            self.assertFalse(connects(free_port))

    async def test_error_messages_name_the_endpoint_and_the_reason(self) -> None:
        folder = Path(self.mktemp())
        for description, reason in [
            ("tcp:0:interface=192.0.2.1", "Cannot assign requested address"),
            ("tcp:0:interface=999.1.1.1", "[Nn]ame or service|[Nn]ot known|resolution"),
            ("foo:3128", "Unknown endpoint type: 'foo'"),
            ("tcp:port=http", "invalid literal"),
            ("tcp:port=70000", "0-65535"),
            ("tcp:colour=red", "not a valid endpoint description"),
            ("tcp6:1:interface=::1", "not a valid endpoint description"),
            ("systemd:domain=INET:index=9", "systemd passed no such socket"),
            ("systemd:domain=INET:colour=red", "not a valid endpoint description"),
            (f"unix:{folder}/missing/socket", "No such file or directory"),
        ]:
            message = await self.listen_error(description)
            self.assertTrue(message.startswith(f"PROXY_LISTEN: cannot listen on {description}: "), message)
            self.assertTrue(re.search(reason, message), message)
            self.assertNotIn("\n", message)
            self.assertNotIn("Errno", message)
            self.assertNotIn("_parse", message)

    def test_addresses_are_formatted(self) -> None:
        class Port:
            def __init__(self, address: Any) -> None:
                self.address = address

            def getHost(self) -> Any:
                return self.address

        self.assertEqual(format_address(Port(IPv4Address("TCP", "127.0.0.1", 3128))), "127.0.0.1:3128")  # type: ignore[arg-type]
        self.assertEqual(format_address(Port(IPv6Address("TCP", "::1", 3128))), "[::1]:3128")  # type: ignore[arg-type]
        self.assertIn("/run/x", format_address(Port(UNIXAddress("/run/x"))))  # type: ignore[arg-type]

    async def test_uses_the_given_reactor(self) -> None:
        memory = MemoryReactor()
        await listen(memory, ["tcp:3128:interface=127.0.0.1"], self.factory, "PROXY_LISTEN")
        self.assertEqual(memory.tcpServers[0][:2], (3128, self.factory))
