"""HTTP servers inside the tests' own process: they log what they were asked, and can be told what to do."""

from __future__ import annotations

import contextlib
import itertools
import socket
import ssl
import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from attrs import define, field

_sequence = itertools.count()


@define
class Seen:
    """A request as a server saw it; headers by lower-case name.

    `sent` counts the bytes of the answer's body, `received` those of the request's. `began` and `ended` are places in
    the order of events of all servers: they tell what was before what.
    """

    method: str
    path: str
    headers: dict[str, str] = field(repr=False)
    received: int = 0
    status: int = 0
    sent: int = 0
    began: int = field(factory=lambda: next(_sequence))
    ended: int | None = None


def moment() -> int:
    """Return the present place in the order of events."""
    return next(_sequence)


class Exchange:
    """One request to a server, and the means to answer it well or badly."""

    def __init__(self, handler: BaseHTTPRequestHandler, seen: Seen) -> None:
        self._handler = handler
        self.seen = seen
        self.method = seen.method
        self.path = seen.path.partition("?")[0]
        self.query = seen.path.partition("?")[2]

    def answer(self, status: int, headers: Mapping[str, str] | None = None, body: bytes = b"") -> None:
        """Answer in one piece, with a Content-Length where `headers` have no opinion."""
        fields = dict(headers or {})
        if not {"Content-Length", "Transfer-Encoding"} & set(fields) and status not in (204, 304):
            fields["Content-Length"] = str(len(body))
        self.begin(status, fields)
        if self.method != "HEAD":
            self.send(body)

    def begin(self, status: int, headers: Mapping[str, str]) -> None:
        self.seen.status = status
        head = f"HTTP/1.1 {status} {self._handler.responses.get(status, ('Odd',))[0]}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self._handler.wfile.write((head + "\r\n").encode("latin-1"))
        self._handler.wfile.flush()

    def send(self, data: bytes | memoryview) -> None:
        for start in range(0, len(data), 65536):
            piece = data[start : start + 65536]
            self._handler.wfile.write(piece)
            self.seen.sent += len(piece)

    def send_chunk(self, data: bytes) -> None:
        """Send a chunk of chunked coding; an empty one ends it."""
        self._handler.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
        self.seen.sent += len(data)

    def hang_up(self) -> None:
        """End the connection after what was sent."""
        self._handler.close_connection = True

    def reset(self) -> None:
        """Break the connection off."""
        connection = self._handler.connection
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._handler.close_connection = True

    def body(self) -> Iterator[bytes]:
        """Yield the request's body as it comes."""
        reader = self._handler.rfile
        if self.seen.headers.get("transfer-encoding", "").lower() == "chunked":
            while size := int(reader.readline().split(b";")[0], 16):
                while size:
                    piece = reader.read1(min(size, 65536))
                    if not piece:
                        raise ConnectionError("the body broke off")
                    size -= len(piece)
                    self.seen.received += len(piece)
                    yield piece
                reader.readline()
            reader.readline()
            return
        left = int(self.seen.headers.get("content-length", "0"))
        while left:
            piece = reader.read1(min(left, 65536))
            if not piece:
                raise ConnectionError("the body broke off")
            left -= len(piece)
            self.seen.received += len(piece)
            yield piece


class Server(ABC):
    """An HTTP/1.1 server on a port of 127.0.0.1, over TLS where it has a context. `serve` says what it answers."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.requests: list[Seen] = []
        self.port = 0
        self._context = context
        self._server: _Listener | None = None

    def start(self) -> None:
        """Listen, at the port of the last time where there was one."""
        self._server = _Listener(self, self._context, self.port)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Close the port and every connection: nobody is there any more."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server.hang_up_all()
            self._server = None

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Be gone for a while."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    def seen(self, method: str, part: str) -> list[Seen]:
        """Return the requests with this method whose path holds `part`."""
        return [seen for seen in list(self.requests) if seen.method == method and part in seen.path]

    @abstractmethod
    def serve(self, exchange: Exchange) -> None:
        """Answer a request."""


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 256

    def __init__(self, owner: Server, context: ssl.SSLContext | None, port: int) -> None:
        self._owner = owner
        self._context = context
        self._connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), _handler(owner))

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Shake hands in the connection's own thread, so that one bad client does not stop the others."""
        try:
            if self._context is not None:
                request.settimeout(20)
                request = self._context.wrap_socket(request, server_side=True)
            request.settimeout(120)
            self._connections.add(request)
            super().finish_request(request, client_address)
        except (OSError, ValueError):
            pass  # the client went away, which some of the tests are about
        finally:
            self._connections.discard(request)
            with contextlib.suppress(OSError):
                request.close()

    def hang_up_all(self) -> None:
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def _handler(owner: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            fields: dict[str, str] = {}
            for name, value in self.headers.items():
                fields[name.lower()] = f"{fields[name.lower()]}, {value}" if name.lower() in fields else value
            seen = Seen(self.command, self.path, fields)
            owner.requests.append(seen)
            if seen.headers.get("expect", "").lower() == "100-continue":
                self.send_response_only(100)
                self.end_headers()
            try:
                owner.serve(Exchange(self, seen))
            finally:
                seen.ended = moment()

        do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_CONNECT = handle_any

        def handle_expect_100(self) -> bool:
            return True

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    return Handler
