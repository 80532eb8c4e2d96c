"""Listening on endpoint descriptions, with an error of one sentence that names the setting and the endpoint."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import Any

from twisted.internet.defer import maybeDeferred
from twisted.internet.endpoints import AdoptedStreamServerEndpoint, serverFromString
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IListeningPort, IProtocolFactory

_BACKLOG = 4096
"""Connections that may wait in the accept queue. The kernel caps it at net.core.somaxconn, 4096 by default.

Twisted's default of 50 is too small if a fleet connects at the same time: the kernel then sends SYN cookies, and resets
some of the clients that return one.
"""

_BACKLOG_ENDPOINTS = ("tcp:", "tcp6:", "unix:")


class ListenError(Exception):
    """Listening failed. The message is one sentence for the operator."""


class SocketNotPassed(ListenError):
    """The endpoint names a systemd socket that was not passed to this process."""


async def listen(
    reactor: Any, descriptions: Sequence[str], factory: IProtocolFactory, setting: str
) -> list[IListeningPort]:
    """Listen with `factory` on all endpoints of `descriptions`, the value of `setting`, and return their ports.

    If one endpoint fails, stop listening on the others and raise `ListenError` (`SocketNotPassed` for systemd's).
    """
    ports: list[IListeningPort] = []
    try:
        for description in descriptions:
            ports.append(await _listen(reactor, description, factory, setting))
    except ListenError:
        for port in ports:
            await maybeDeferred(port.stopListening)
        raise
    return ports


async def _listen(reactor: Any, description: str, factory: IProtocolFactory, setting: str) -> IListeningPort:
    try:
        endpoint = serverFromString(reactor, _with_backlog(description))  # type: ignore[no-untyped-call]
        if isinstance(endpoint, AdoptedStreamServerEndpoint):
            endpoint.addressFamily = _address_family(endpoint.fileno)
        port: IListeningPort = await endpoint.listen(factory)
    except CannotListenError as error:
        reason = error_reason(error.socketError)
    except (TypeError, LookupError) as error:  # Twisted's parsers raise these for unknown arguments
        if isinstance(error, LookupError) and description.startswith("systemd:"):
            raise SocketNotPassed(
                f"{setting}: cannot listen on {description}: systemd passed no such socket; is its .socket unit active?"
            ) from None
        reason = "not a valid endpoint description"
    except (ValueError, ArithmeticError, OSError) as error:
        reason = error_reason(error)
    else:
        return port
    raise ListenError(f"{setting}: cannot listen on {description}: {reason}.")


def _with_backlog(description: str) -> str:
    if description.startswith(_BACKLOG_ENDPOINTS) and ":backlog=" not in description:
        return f"{description}:backlog={_BACKLOG}"
    return description


def _address_family(descriptor: int) -> int:
    """Return the address family of the socket `descriptor`, which systemd passed.

    The `domain=` of a description cannot be relied on: for ``ListenStream=3128`` systemd creates an IPv6 socket, or an
    IPv4 one if the kernel has no IPv6.
    """
    with socket.socket(fileno=os.dup(descriptor)) as duplicate:
        return duplicate.family


def error_reason(error: BaseException) -> str:
    """Return the message of `error` without its number."""
    # Use the error's own text instead of os.strerror(), because getaddrinfo's error numbers are not errno values.
    return (isinstance(error, OSError) and error.strerror) or str(error)


def format_address(port: IListeningPort) -> str:
    """Return the address of `port` for a log line."""
    address = port.getHost()
    host, number = getattr(address, "host", None), getattr(address, "port", None)
    if host is None:
        return str(address)
    return f"[{host}]:{number}" if ":" in host else f"{host}:{number}"
