"""Listening, in a way that an operator can rely on: a port that cannot be had stops the start, with one sentence."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from twisted.internet.defer import maybeDeferred
from twisted.internet.endpoints import serverFromString
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IListeningPort
from twisted.internet.protocol import Factory


class ListenError(Exception):
    """One sentence about an address that cannot be listened on."""


async def listen(reactor: Any, descriptions: Sequence[str], factory: Factory, setting: str) -> list[IListeningPort]:
    """Listen with `factory` on every endpoint of `descriptions`, the value of `setting`; on all of them, or on none."""
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
        endpoint = serverFromString(reactor, description)  # type: ignore[no-untyped-call]
        port: IListeningPort = await endpoint.listen(factory)
    except CannotListenError as error:
        why = error.socketError
        reason = os.strerror(why.errno) if isinstance(why, OSError) and why.errno else str(why)
        raise ListenError(f"{setting}: {description} cannot be listened on: {reason}.") from None
    except (ValueError, TypeError, LookupError, OSError) as error:
        raise ListenError(f"{setting}: {description} cannot be listened on: {error}.") from None
    return port


def where(port: IListeningPort) -> str:
    """Return the address of `port` for a log line."""
    address = port.getHost()
    host, number = getattr(address, "host", None), getattr(address, "port", None)
    return f"{host}:{number}" if host is not None else str(address)
