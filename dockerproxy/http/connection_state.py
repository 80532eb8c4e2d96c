"""The states of a server connection. Pure: `HTTPChannel` does the I/O.

Theory of operation
===================

A connection handles one request at a time. A request and its response overlap, and either may end first, because a
handler may respond before it has read the body. Pipelined requests wait in a buffer. The main cycle is therefore::

    READING_HEAD ── REQUEST ──► RESPONDING ── RESPONSE_END ──► READING_HEAD
                                    │
                       EARLY_RESPONSE_END ──► DISCARDING_BODY ── BODY_END ──► READING_HEAD

A connection is reused only if the end of the request is known. After INVALID_INPUT it is unknown, so all further input
is ignored, and a response in progress is the last one. Three states end a connection; the first two are optional:

- LINGERING: The client may still be sending, and a reset would destroy the response that it has not read yet (RFC 9112,
  section 9.6). So input is read and dropped for some seconds.
- CLOSING: The pending output is sent, and then the connection is closed.
- CLOSED: The transport is lost, reset, or belongs to another protocol. A handler may still run, and report its end.

`TRANSITIONS` has every event that may occur in a state. Any other is an error in the caller. Back-pressure is not part
of the state: reading may be paused in each state that reads input, and writing in each state.

Each state treats input, the client's timeouts (`ServerTimeouts`) and the end of the daemon in its own way:

===============  ====================  ==================================  ==============================
state            input                 deadline, if output is not blocked  `Site.drain`
===============  ====================  ==================================  ==============================
READING_HEAD     buffer, then parser   keepalive or header                 CLOSE
RESPONDING       body, then buffer     body, if the handler waits for it   after the response
DISCARDING_BODY  dropped, then buffer  body, for all of the rest           CLOSE
LAST_RESPONSE    ignored               none: the handler is working        after the response
LINGERING        ignored               5 s                                 nothing: it ends soon
CLOSING          ignored               send                                nothing: it ends with the output
CLOSED           ignored               none                                nothing
===============  ====================  ==================================  ==============================

If output is blocked, the send timeout applies instead, except in LINGERING.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum, auto


class ConnectionState(IntEnum):  # not Enum: its members hash in Python code, which each request would pay for
    READING_HEAD = auto()
    RESPONDING = auto()
    DISCARDING_BODY = auto()
    LAST_RESPONSE = auto()
    LINGERING = auto()
    CLOSING = auto()
    CLOSED = auto()


class ConnectionEvent(IntEnum):
    REQUEST = auto()
    """A request head is complete."""
    RESPONSE_END = auto()
    """The response has ended, after the request."""
    EARLY_RESPONSE_END = auto()
    """The response has ended, before the request body."""
    BODY_END = auto()
    """The request body has ended, after the response."""
    INVALID_INPUT = auto()
    """The input is not HTTP, so the start of the next request cannot be known."""
    CLOSE = auto()
    """No further request is to be handled. The client may still be sending."""
    GIVE_UP = auto()
    """The client has sent nothing for too long."""
    DETACH = auto()
    """The handler takes over the transport."""
    LOST = auto()
    """The transport is lost or was reset."""


_S, _E = ConnectionState, ConnectionEvent

TRANSITIONS: Mapping[ConnectionState, Mapping[ConnectionEvent, ConnectionState]] = {
    _S.READING_HEAD: {
        _E.REQUEST: _S.RESPONDING,
        _E.INVALID_INPUT: _S.LINGERING,
        _E.CLOSE: _S.CLOSING,
        _E.GIVE_UP: _S.CLOSING,
        _E.LOST: _S.CLOSED,
    },
    _S.RESPONDING: {
        _E.RESPONSE_END: _S.READING_HEAD,
        _E.EARLY_RESPONSE_END: _S.DISCARDING_BODY,
        _E.INVALID_INPUT: _S.LAST_RESPONSE,
        _E.DETACH: _S.CLOSED,
        _E.LOST: _S.CLOSED,
    },
    _S.DISCARDING_BODY: {
        _E.BODY_END: _S.READING_HEAD,
        _E.INVALID_INPUT: _S.LINGERING,
        _E.CLOSE: _S.LINGERING,
        _E.GIVE_UP: _S.CLOSING,
        _E.LOST: _S.CLOSED,
    },
    _S.LAST_RESPONSE: {
        _E.RESPONSE_END: _S.LINGERING,
        _E.LOST: _S.CLOSED,
    },
    _S.LINGERING: {
        _E.CLOSE: _S.LINGERING,
        _E.GIVE_UP: _S.CLOSING,
        _E.LOST: _S.CLOSED,
    },
    _S.CLOSING: {
        _E.CLOSE: _S.CLOSING,
        _E.LOST: _S.CLOSED,
    },
    _S.CLOSED: {
        _E.RESPONSE_END: _S.CLOSED,
        _E.EARLY_RESPONSE_END: _S.CLOSED,
        _E.CLOSE: _S.CLOSED,
        _E.DETACH: _S.CLOSED,  # the transport was reset, but reports that only in the next reactor iteration
        _E.LOST: _S.CLOSED,
    },
}

READS_INPUT = frozenset({_S.READING_HEAD, _S.RESPONDING, _S.DISCARDING_BODY})
"""The states in which the connection looks at its input."""


def next_state(state: ConnectionState, event: ConnectionEvent) -> ConnectionState:
    """Return the state after `event`; raise RuntimeError if it must not occur in `state`."""
    try:
        return TRANSITIONS[state][event]
    except KeyError:
        raise RuntimeError(f"{event.name} in the state {state.name}") from None
