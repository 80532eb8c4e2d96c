"""A client's TLS to a proxy, as a plain socket: what is written to it travels in that TLS."""

from __future__ import annotations

import select
import socket
import ssl
import threading


def open_tls(address: tuple[str, int], context: ssl.SSLContext, server_hostname: str) -> socket.socket:
    """Connect to `address` with TLS, and return a socket for the bytes within.

    Python cannot wrap one SSLSocket in another, so a thread copies between the TLS and a socket pair.
    """
    tls = context.wrap_socket(socket.create_connection(address, timeout=30), server_hostname=server_hostname)
    tls.setblocking(False)
    near, far = socket.socketpair()
    near.settimeout(30)
    threading.Thread(target=_copy, args=(tls, far), daemon=True).start()
    return near


def _copy(tls: ssl.SSLSocket, plain: socket.socket) -> None:
    outgoing: bytes = b""
    with tls, plain:
        try:
            while True:
                readers = [tls] if outgoing else [tls, plain]
                readable, _, _ = select.select(readers, [tls] if outgoing else [], [])
                if tls in readable and not _receive(tls, plain):
                    return
                if plain in readable:
                    outgoing = plain.recv(65536)
                    if not outgoing:
                        return
                if outgoing:
                    outgoing = outgoing[_send(tls, outgoing) :]
        except OSError:
            return


def _receive(tls: ssl.SSLSocket, plain: socket.socket) -> bool:
    """Copy all that can be read; return False at the end of the stream."""
    try:
        while data := tls.recv(65536):
            plain.sendall(data)
    except ssl.SSLWantReadError:
        return True
    return False


def _send(tls: ssl.SSLSocket, data: bytes) -> int:
    try:
        return tls.send(data)
    except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
        return 0
