"""HTTP servers in the process of the tests, which record their requests and can misbehave on demand."""

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
from io import BufferedReader
from typing import Any, BinaryIO

from attrs import define, field

_event_numbers = itertools.count()


@define
class RecordedRequest:
    """A request that a server received; the names of `headers` are in lower case.

    `started_event` and `ended_event` are numbers in the order of events of all servers (see `next_event`), and show
    which of two events was first. `ended_event` is None until the request is complete.
    """

    method: str
    path: str
    headers: dict[str, str] = field(repr=False)
    received_bytes: int = 0
    response_status: int = 0
    sent_bytes: int = 0
    started_event: int = field(factory=lambda: next(_event_numbers))
    ended_event: int | None = None


def next_event() -> int:
    """Return the next number in the order of events of all servers."""
    return next(_event_numbers)


class HTTPExchange:
    """One request to a server, with methods to send a correct or a broken response."""

    def __init__(self, handler: BaseHTTPRequestHandler, request: RecordedRequest) -> None:
        self._handler = handler
        self.request = request
        self.method = request.method
        self.path = request.path.partition("?")[0]
        self.query = request.path.partition("?")[2]

    def respond(self, status: int, headers: Mapping[str, str | list[str]] | None = None, body: bytes = b"") -> None:
        """Send a whole response. A Content-Length is added if `headers` do not determine the framing.

        A field whose value is a list has several lines.
        """
        fields = dict(headers or {})
        if not {"Content-Length", "Transfer-Encoding"} & set(fields) and status not in (204, 304):
            fields["Content-Length"] = str(len(body))
        self.send_head(status, fields)
        if self.method != "HEAD":
            self.send_body(body)

    def send_head(self, status: int, headers: Mapping[str, str | list[str]]) -> None:
        self.request.response_status = status
        head = f"HTTP/1.1 {status} {self._handler.responses.get(status, ('Odd',))[0]}\r\n"
        for name, value in headers.items():
            head += "".join(f"{name}: {line}\r\n" for line in ([value] if isinstance(value, str) else value))
        self._handler.wfile.write((head + "\r\n").encode("latin-1"))
        self._handler.wfile.flush()

    def send_body(self, data: bytes | memoryview) -> None:
        for start in range(0, len(data), 65536):
            chunk = data[start : start + 65536]
            self._handler.wfile.write(chunk)
            self.request.sent_bytes += len(chunk)

    def send_chunk(self, data: bytes) -> None:
        """Send a chunk of the chunked coding; an empty one ends the body."""
        self._handler.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
        self.request.sent_bytes += len(data)

    def close_after_response(self) -> None:
        """Close the connection after the data sent so far."""
        self._handler.close_connection = True

    def reset(self) -> None:
        """Reset the connection."""
        connection = self._handler.connection
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._handler.close_connection = True

    def take_over(self) -> tuple[BufferedReader, BinaryIO]:
        """Return the two directions of the connection, which speaks another protocol from now on."""
        self._handler.close_connection = True
        reader = self._handler.rfile
        assert isinstance(reader, BufferedReader)
        return reader, self._handler.wfile

    def read_body(self) -> Iterator[bytes]:
        """Yield the request's body as it is received."""
        reader = self._handler.rfile
        if self.request.headers.get("transfer-encoding", "").lower() == "chunked":
            while size := int(reader.readline().split(b";")[0], 16):
                while size:
                    chunk = reader.read1(min(size, 65536))
                    if not chunk:
                        raise ConnectionError("the request's body is incomplete")
                    size -= len(chunk)
                    self.request.received_bytes += len(chunk)
                    yield chunk
                reader.readline()
            reader.readline()
            return
        remaining = int(self.request.headers.get("content-length", "0"))
        while remaining:
            chunk = reader.read1(min(remaining, 65536))
            if not chunk:
                raise ConnectionError("the request's body is incomplete")
            remaining -= len(chunk)
            self.request.received_bytes += len(chunk)
            yield chunk


class StubServer(ABC):
    """An HTTP/1.1 server on a port of 127.0.0.1, over TLS if there is a context. `handle` responds to the requests."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.requests: list[RecordedRequest] = []
        self.port = 0
        self._context = context
        self._server: _ThreadingServer | None = None

    def start(self) -> None:
        """Listen, on the same port as before if the server was started earlier."""
        self._server = _ThreadingServer(self, self._context, self.port)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Close the port and every connection."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server.close_all()
            self._server = None

    def find_requests(self, method: str, path_part: str) -> list[RecordedRequest]:
        """Return the requests with this method and `path_part` in their path."""
        return [request for request in list(self.requests) if request.method == method and path_part in request.path]

    @abstractmethod
    def handle(self, exchange: HTTPExchange) -> None:
        """Respond to a request."""


class _ThreadingServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 256

    def __init__(self, stub: StubServer, context: ssl.SSLContext | None, port: int) -> None:
        self._stub = stub
        self._context = context
        self._connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), _make_handler(stub))

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Do the TLS handshake in the connection's own thread, so that a bad client does not block the others."""
        try:
            if self._context is not None:
                request.settimeout(20)
                request = self._context.wrap_socket(request, server_side=True)
            request.settimeout(120)
            self._connections.add(request)
            super().finish_request(request, client_address)
        except (OSError, ValueError):
            pass  # the client disconnected, which some tests do on purpose
        finally:
            self._connections.discard(request)
            with contextlib.suppress(OSError):
                request.close()

    def close_all(self) -> None:
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def _make_handler(stub: StubServer) -> type[BaseHTTPRequestHandler]:
    class _RequestHandler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_request(self) -> None:
            fields: dict[str, str] = {}
            for name, value in self.headers.items():
                fields[name.lower()] = f"{fields[name.lower()]}, {value}" if name.lower() in fields else value
            recorded = RecordedRequest(self.command, self.path, fields)
            stub.requests.append(recorded)
            if recorded.headers.get("expect", "").lower() == "100-continue":
                self.send_response_only(100)
                self.end_headers()
            try:
                stub.handle(HTTPExchange(self, recorded))
            finally:
                recorded.ended_event = next_event()

        do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_CONNECT = handle_request

        def handle_expect_100(self) -> bool:
            return True

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    return _RequestHandler
