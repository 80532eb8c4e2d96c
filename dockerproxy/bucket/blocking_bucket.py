"""A bucket for code that blocks: in the threads of the daemon, and in the process of a long operation."""

from __future__ import annotations

from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any, Protocol, TypeVar

from attrs import frozen
from twisted.internet.defer import Deferred
from twisted.internet.threads import blockingCallFromThread

from dockerproxy.bucket.s3 import ListedKey, S3Bucket

T = TypeVar("T")

_PAGE = 1000  # keys that are taken from the reactor's thread at a time


class Wait(Protocol):
    """Runs a coroutine in the reactor's thread, and returns its result in another one, or raises its exception."""

    def __call__(self, coroutine: Coroutine[Any, Any, T], /) -> T: ...


@frozen
class ReactorWait:
    """A `Wait` for the threads of a running reactor."""

    _reactor: Any

    def __call__(self, coroutine: Coroutine[Any, Any, T]) -> T:
        def start() -> Any:
            return Deferred.fromCoroutine(coroutine)

        result: T = blockingCallFromThread(self._reactor, start)
        return result


@frozen
class BlockingBucket:
    """The requests to a bucket of code that only reads. They raise what those of `S3Bucket` raise."""

    bucket: S3Bucket
    wait: Wait

    def status(self, key: str) -> ListedKey | None:
        """Do what `S3Bucket.status` does."""
        return self.wait(self.bucket.status(key))

    def read_start(self, key: str, limit: int) -> bytes | None:
        """Do what `S3Bucket.read_start` does."""
        return self.wait(self.bucket.read_start(key, limit))

    def list_keys(self, prefix: str) -> Iterator[ListedKey]:
        """Yield the objects with keys that begin with `prefix`."""
        listing = self.bucket.list_keys(prefix)
        while page := self.wait(_take_page(listing)):
            yield from page


async def _take_page(listing: AsyncIterator[ListedKey]) -> list[ListedKey]:
    page: list[ListedKey] = []
    while len(page) < _PAGE:
        try:
            page.append(await anext(listing))
        except StopAsyncIteration:
            break
    return page
