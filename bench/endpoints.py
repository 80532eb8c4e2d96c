"""The servers as their clients reach them, and a client on blocking sockets: TLS directly or through CONNECT."""

from __future__ import annotations

import socket
import ssl
import struct

from attrs import frozen

from bench.servers import BenchServer

_HEAD_END = b"\r\n\r\n"
_OK = (b"HTTP/1.1 200", b"HTTP/1.0 200")

# Set as SO_RCVTIMEO: Python's own time-out polls the socket before each read, which would cost the clients CPU time.
_TIMEOUT = struct.pack("ll", 60, 0)


@frozen
class Endpoint:
    """The address of a server: `host` over TLS, on `port` of 127.0.0.1, which may be a proxy's (`through_connect`).

    If `ca_file` is empty, the server speaks plain HTTP, which only the load generator supports.
    """

    name: str
    port: int
    host: str
    ca_file: str
    through_connect: bool

    def tls_context(self) -> ssl.SSLContext:
        """Return a context that trusts only the server's CA."""
        return ssl.create_default_context(cafile=self.ca_file)

    def connect(self, context: ssl.SSLContext, session: ssl.SSLSession | None = None) -> ssl.SSLSocket:
        """Return a new connection after its handshake."""
        tcp_socket = socket.create_connection(("127.0.0.1", self.port))
        try:
            tcp_socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            tcp_socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEOUT)
            if self.through_connect:
                tcp_socket.sendall(f"CONNECT {self.host}:443 HTTP/1.1\r\nHost: {self.host}:443\r\n\r\n".encode())
                _read_connect_response(tcp_socket)
            return context.wrap_socket(tcp_socket, server_hostname=self.host, session=session)
        except BaseException:
            tcp_socket.close()
            raise

    def get_request(self, path: str) -> bytes:
        """Return the bytes of a GET request for `path`."""
        return f"GET {path} HTTP/1.1\r\nHost: {self.host}\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n".encode()


@frozen
class RunningServer:
    """A running server, and its endpoint."""

    process: BenchServer
    endpoint: Endpoint

    @property
    def name(self) -> str:
        return self.endpoint.name


def _read_connect_response(tcp_socket: socket.socket) -> None:
    response = b""
    while not response.endswith(_HEAD_END):
        data = tcp_socket.recv(4096)
        if not data:
            raise ConnectionError("the proxy closed the connection before it answered CONNECT")
        response += data
    if not response.startswith(_OK):
        raise ConnectionError(f"the proxy answered CONNECT with {response[:200]!r}")


def read_head(connection: ssl.SSLSocket, buffer: bytearray) -> tuple[int, int]:
    """Read the head of a response into `buffer`; return its length and the number of body bytes read after it."""
    received = connection.recv_into(buffer)
    end = buffer.find(_HEAD_END, 0, received)
    while end < 0:
        count = connection.recv_into(memoryview(buffer)[received:]) if received else 0
        if not count:
            raise ConnectionError("the server closed the connection within a response head")
        received += count
        end = buffer.find(_HEAD_END, 0, received)
    if not buffer.startswith(_OK):
        raise ConnectionError(f"the server answered {bytes(buffer[:600])!r}")
    length = end + len(_HEAD_END)
    return length, received - length


def read_body(connection: ssl.SSLSocket, buffer: bytearray, missing: int) -> None:
    """Read the `missing` bytes of a body and discard them; `buffer` is reused for each read."""
    while missing > 0:
        count = connection.recv_into(buffer)
        if not count:
            raise ConnectionError(f"the server closed the connection with {missing} bytes of the body missing")
        missing -= count
    if missing < 0:
        raise ConnectionError(f"the server sent {-missing} bytes after the end of the body")
