"""Forms as the bodies of requests (``application/x-www-form-urlencoded``)."""

from __future__ import annotations

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IConsumer
from twisted.web.iweb import IBodyProducer
from zope.interface import implementer


@implementer(IBodyProducer)
class FormBody:
    """A request body that is in memory."""

    def __init__(self, form: bytes) -> None:
        self.length = len(form)
        self._form = form

    def startProducing(self, consumer: IConsumer) -> Deferred[None]:
        consumer.write(self._form)
        return succeed(None)

    def pauseProducing(self) -> None: ...

    def resumeProducing(self) -> None: ...

    def stopProducing(self) -> None: ...
