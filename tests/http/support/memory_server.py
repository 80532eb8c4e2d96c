"""A server whose memory test_memory.py measures. Run it in its own process; it prints its TLS and its plain port.

The plain port also accepts CONNECT, after which TLS follows. The response to `/large` is a GiB of zeros. The response
to `/blocked?N` is sent once N responses wait for slow clients. It is the number of bytes that the kernel holds for
them.
"""

from __future__ import annotations

import os
import socket
import struct
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twisted.internet import reactor as _reactor
from twisted.internet.task import deferLater

from dockerproxy.http.channel import HTTPChannel
from dockerproxy.http.request import Request
from dockerproxy.http.site import ServerTimeouts, Site
from dockerproxy.http.tls import upgrade_to_tls
from dockerproxy.oci.ranges import ByteRange
from dockerproxy.proxy.authority import CertificateAuthority
from dockerproxy.registry.streaming import stream_content

reactor: Any = _reactor
SIZE = 1 << 30
SO_MEMINFO, SK_MEMINFO_WMEM_QUEUED = 55, 5


class Zeros:
    """Content in a sparse file."""

    size: int | None = SIZE

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()
        self._file.truncate(SIZE)

    async def read(self, offset: int, max_bytes: int) -> bytes:
        return os.pread(self._file.fileno(), max_bytes, offset)

    def expect(self, ranges: Sequence[ByteRange]) -> None:
        pass

    async def sendfile_source(self, offset: int, max_bytes: int) -> tuple[int, int] | None:
        return self._file.fileno(), min(max_bytes, SIZE - offset)

    async def wait_verified(self) -> None: ...

    def close(self) -> None: ...


def kernel_memory(sock: socket.socket) -> int:
    """Return the bytes that the kernel holds for sending."""
    return int(struct.unpack("@9I", sock.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 36))[SK_MEMINFO_WMEM_QUEUED])


def main() -> None:
    content = Zeros()

    def blocked_sockets() -> list[socket.socket]:
        channels = [*site._channels, *plain._channels]
        return [channel.transport._socket for channel in channels if channel._flow_control.paused]

    async def handle(request: Request) -> None:
        if request.path == "/large":
            request.start(200, [], SIZE)
            await stream_content(request, content, [ByteRange(0, SIZE)], reactor)
            return
        if request.path == "/blocked":
            while len(sockets := blocked_sockets()) < int(request.query):
                await deferLater(reactor, 0.01)
            request.respond(200, [], str(sum(map(kernel_memory, sockets))).encode())
        elif request.method == "CONNECT":
            transport, received = request.detach()
            transport.write(b"HTTP/1.1 200 OK\r\n\r\n")
            upgrade_to_tls(transport, context, HTTPChannel(plain, handle, secure=True), received)
        else:
            request.respond(200, [], b"yes")

    with tempfile.TemporaryDirectory() as directory:
        authority = CertificateAuthority.open(
            Path(directory), certificate_file=None, key_file=None, passphrase=None, clock=time.time
        )

    def ignore_request(request: Request, seconds: float) -> None: ...

    context = authority.context_for("a.test")
    site = Site(
        reactor, handle, timeouts=ServerTimeouts(), on_request_finished=ignore_request, get_tls_context=lambda: context
    )
    plain = Site(reactor, handle, timeouts=ServerTimeouts(), on_request_finished=ignore_request)
    ports = [reactor.listenTCP(0, each, backlog=1000, interface="127.0.0.1") for each in (site, plain)]
    print(*(port.getHost().port for port in ports), flush=True)
    reactor.run()


main()
