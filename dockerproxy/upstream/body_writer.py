"""A request's body on its way to the transport."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IConsumer, IPushProducer
from twisted.python.failure import Failure
from twisted.web.iweb import UNKNOWN_LENGTH, IBodyProducer
from zope.interface import implementer

from dockerproxy.errors import BadRequest
from dockerproxy.upstream.idle_timer import IdleTimer


def framing_field(body: IBodyProducer) -> tuple[str, str]:
    """Return the field that says how `body` is framed."""
    if body.length is UNKNOWN_LENGTH:
        return "Transfer-Encoding", "chunked"
    return "Content-Length", str(body.length)


@implementer(IConsumer, IPushProducer)
class BodyWriter:
    """Frames what `body` produces, holds it back while `transport` is full, and calls `stalled` when that lasts.

    Only the upstream's slowness counts, `seconds` of it: how long the client may take is the client side's affair.
    """

    def __init__(
        self, clock: Any, transport: Any, body: IBodyProducer, timeout: float, on_stalled: Callable[[], None]
    ) -> None:
        self._transport = transport
        self._body: Any = body
        self._remaining: int | None = None if body.length is UNKNOWN_LENGTH else body.length
        self._send_timer = IdleTimer(clock, timeout, on_stalled)
        self._done: Deferred[None] = Deferred()
        self.active = False

    def start(self) -> Deferred[None]:
        """Send the body; fires when all of it is handed over, fails with what ended it before. Silent after `stop`."""
        self.active = True
        self._transport.registerProducer(self, True)
        if self.active:  # else the transport is gone already
            self._body.startProducing(self).addCallbacks(self._on_body_complete, self._on_body_failed)
        return self._done

    def stop(self) -> None:
        """Send no more."""
        if self.active:
            self._finish()
            self._body.stopProducing()

    def _finish(self) -> None:
        self.active = False
        self._send_timer.stop()
        self._transport.unregisterProducer()

    def _on_body_complete(self, _: object) -> None:
        if not self.active:
            return
        if self._remaining is None:
            self._transport.write(b"0\r\n\r\n")
        self._finish()
        if self._remaining:
            self._done.errback(BadRequest("the request's body is shorter than its length says"))
        else:
            self._done.callback(None)

    def _on_body_failed(self, failure: Failure) -> None:
        if self.active:
            self._finish()
            self._done.errback(failure)
        # else it was stopped, and how its producer takes that is nobody's concern

    # IConsumer, for the body

    def write(self, data: bytes) -> None:
        if not self.active or not data:
            return
        if self._remaining is None:
            self._transport.writeSequence([b"%x\r\n" % len(data), data, b"\r\n"])
        elif len(data) <= self._remaining:
            self._remaining -= len(data)
            self._transport.write(data)
        else:
            self.stop()
            self._done.errback(BadRequest("the request's body is longer than its length says"))

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        raise RuntimeError("a body is started by its startProducing")

    def unregisterProducer(self) -> None:
        raise RuntimeError("a body has ended when the Deferred of its startProducing fires")

    # IPushProducer, for the transport

    def pauseProducing(self) -> None:
        if self.active:
            self._send_timer.start()
            self._body.pauseProducing()

    def resumeProducing(self) -> None:
        if self.active:
            self._send_timer.pause()
            self._body.resumeProducing()

    def stopProducing(self) -> None:
        """Stop: the connection is lost."""
        if self.active:
            self.active = False
            self._send_timer.stop()
            self._body.stopProducing()
