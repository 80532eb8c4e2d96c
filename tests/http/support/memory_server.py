"""A server whose memory test_memory.py measures. Run it in its own process; it prints its TLS and its plain port.

The response to `/large` is a GiB of zeros. The response to `/blocked?N` is sent once N responses wait for slow clients.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

from twisted.internet import reactor as _reactor
from twisted.internet.task import deferLater

from dockerproxy.http.request import Request
from dockerproxy.http.site import ServerTimeouts, Site
from dockerproxy.proxy.authority import CertificateAuthority
from dockerproxy.registry.streaming import stream_content

reactor: Any = _reactor
SIZE = 1 << 30


class Zeros:
    """Content in a sparse file."""

    size: int | None = SIZE

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()
        self._file.truncate(SIZE)

    async def read(self, offset: int, max_bytes: int) -> bytes:
        return os.pread(self._file.fileno(), max_bytes, offset)

    async def sendfile_source(self, offset: int, max_bytes: int) -> tuple[int, int] | None:
        return self._file.fileno(), min(max_bytes, SIZE - offset)

    async def wait_verified(self) -> None: ...

    def close(self) -> None: ...


def main() -> None:
    content = Zeros()

    def count_blocked() -> int:
        return sum(channel._flow_control.paused for channel in site._channels)

    async def handle(request: Request) -> None:
        if request.path == "/large":
            request.start(200, [], SIZE)
            await stream_content(request, content, 0, SIZE, reactor)
            return
        while request.path == "/blocked" and count_blocked() < int(request.query):
            await deferLater(reactor, 0.01)
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
