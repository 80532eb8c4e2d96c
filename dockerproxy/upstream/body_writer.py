"""The writer of request bodies: framing, back-pressure and the send time-out."""

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
    """Return the header field that declares the framing of `body`."""
    if body.length is UNKNOWN_LENGTH:
        return "Transfer-Encoding", "chunked"
    return "Content-Length", str(body.length)


@implementer(IConsumer, IPushProducer)
class BodyWriter:
    """Frames the data of `body`, writes it to `transport`, and pauses `body` while the transport's buffer is full.

    Calls `on_stalled` if the buffer stays full for `timeout` seconds. Time in which the client sends nothing does not
    count, because the client's connection has its own time-out.
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
        """Send the body. The Deferred fires once all of it is written, or fails with the body's error.

        After `stop` it never fires.
        """
        self.active = True
        self._transport.registerProducer(self, True)
        if self.active:  # False if the transport is already closed: then `registerProducer` called `stopProducing`
            self._body.startProducing(self).addCallbacks(self._on_body_complete, self._on_body_failed)
        return self._done

    def stop(self) -> None:
        """Stop sending."""
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
            self._done.errback(BadRequest("the request body is shorter than its declared length"))
        else:
            self._done.callback(None)

    def _on_body_failed(self, failure: Failure) -> None:
        if self.active:
            self._finish()
            self._done.errback(failure)
        # Otherwise it was stopped, and the producer's error does not matter.

    # IConsumer: called by the body

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
            self._done.errback(BadRequest("the request body is longer than its declared length"))

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        raise RuntimeError("IBodyProducer.startProducing starts a body, not registerProducer")

    def unregisterProducer(self) -> None:
        raise RuntimeError("the Deferred of IBodyProducer.startProducing ends a body, not unregisterProducer")

    # IPushProducer: called by the transport

    def pauseProducing(self) -> None:
        if self.active:
            self._send_timer.start()
            self._body.pauseProducing()

    def resumeProducing(self) -> None:
        if self.active:
            self._send_timer.pause()
            self._body.resumeProducing()

    def stopProducing(self) -> None:
        """Stop the body, because the connection is lost."""
        if self.active:
            self.active = False
            self._send_timer.stop()
            self._body.stopProducing()
