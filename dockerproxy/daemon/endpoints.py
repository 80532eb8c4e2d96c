"""Listening, in a way that an operator can rely on: a port that cannot be had stops the start, with one sentence."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import Any

from twisted.internet.defer import maybeDeferred
from twisted.internet.endpoints import AdoptedStreamServerEndpoint, serverFromString
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IListeningPort
from twisted.internet.protocol import Factory

_BACKLOG = 4096
"""Connections that may wait to be accepted; net.core.somaxconn, 4096 by default, is the kernel's bound.

Twisted's 50 is for less than a fleet that connects at once: the kernel then sends SYN cookies, and resets some of those
that come back with one.
"""

_BACKLOG_ENDPOINTS = ("tcp:", "tcp6:", "unix:")


class ListenError(Exception):
    """One sentence about an address that cannot be listened on."""


class SocketNotPassed(ListenError):
    """It is to be a socket of systemd's, who has handed in no such."""


async def listen(reactor: Any, descriptions: Sequence[str], factory: Factory, setting: str) -> list[IListeningPort]:
    """Listen with `factory` on every endpoint of `descriptions`, the value of `setting`; on all of them, or on none.

    Raise `ListenError`, `NotHandedIn`.
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


async def _listen(reactor: Any, description: str, factory: Factory, setting: str) -> IListeningPort:
    try:
        endpoint = serverFromString(reactor, _with_backlog(description))  # type: ignore[no-untyped-call]
        if isinstance(endpoint, AdoptedStreamServerEndpoint):
            endpoint.addressFamily = _address_family(endpoint.fileno)
        port: IListeningPort = await endpoint.listen(factory)
    except CannotListenError as error:
        reason = error_reason(error.socketError)
    except (TypeError, LookupError) as error:  # what Twisted raises for arguments that an endpoint does not know
        if isinstance(error, LookupError) and description.startswith("systemd:"):
            raise SocketNotPassed(
                f"{setting}: {description} cannot be listened on: systemd has no such socket."
            ) from None
        reason = "it describes no endpoint"
    except (ValueError, ArithmeticError, OSError) as error:
        reason = error_reason(error)
    else:
        return port
    raise ListenError(f"{setting}: {description} cannot be listened on: {reason}.")


def _with_backlog(description: str) -> str:
    if description.startswith(_BACKLOG_ENDPOINTS) and ":backlog=" not in description:
        return f"{description}:backlog={_BACKLOG}"
    return description


def _address_family(descriptor: int) -> int:
    """Return the address family of a socket that was handed in.

    `domain=` cannot know it: of ``ListenStream=3128`` systemd makes a socket for IPv6, and one for IPv4 where the
    kernel has no IPv6.
    """
    with socket.socket(fileno=os.dup(descriptor)) as duplicate:
        return duplicate.family


def error_reason(error: BaseException) -> str:
    """Return the reason in `error`, without an error number."""
    # The resolver's errors have numbers of their own, so the text that came with the error is the one to show.
    return (isinstance(error, OSError) and error.strerror) or str(error)


def format_address(port: IListeningPort) -> str:
    """Return the address of `port` for a log line."""
    address = port.getHost()
    host, number = getattr(address, "host", None), getattr(address, "port", None)
    if host is None:
        return str(address)
    return f"[{host}]:{number}" if ":" in host else f"{host}:{number}"
