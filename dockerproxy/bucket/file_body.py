"""A part of a file as the body of a request."""

from __future__ import annotations

import errno
import os
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IConsumer
from twisted.web.iweb import IBodyProducer
from zope.interface import implementer

from dockerproxy.concurrency import in_thread

_READ_SIZE = 256 * 1024


@implementer(IBodyProducer)
class FileBody:
    """The `length` bytes from `offset` of the open file `fd`, which may be closed after `startProducing`.

    They are read in a thread, one piece after the other as the consumer takes them.
    """

    def __init__(self, reactor: Any, fd: int, offset: int, length: int) -> None:
        self.length = length
        self._reactor = reactor
        self._fd = fd
        self._offset = offset
        self._end = offset + length
        self._resumed: Deferred[None] | None = None
        self._stopped = False

    def startProducing(self, consumer: IConsumer) -> Deferred[None]:
        self._fd = os.dup(self._fd)
        return Deferred.fromCoroutine(self._send(consumer))

    async def _send(self, consumer: IConsumer) -> None:
        try:
            while self._offset < self._end and not self._stopped:
                size = min(_READ_SIZE, self._end - self._offset)
                data = await in_thread(self._reactor, os.pread, self._fd, size, self._offset)
                if not data:
                    raise OSError(errno.EIO, "the file of an upload is shorter than it was")
                self._offset += len(data)
                if not self._stopped:
                    consumer.write(data)
                if self._resumed is not None:
                    await self._resumed
        finally:
            os.close(self._fd)

    def pauseProducing(self) -> None:
        if self._resumed is None:
            self._resumed = Deferred()

    def resumeProducing(self) -> None:
        resumed, self._resumed = self._resumed, None
        if resumed is not None:
            resumed.callback(None)

    def stopProducing(self) -> None:
        self._stopped = True
        self.resumeProducing()
