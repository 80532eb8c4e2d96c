"""How the hosted store reaches its directory: directly on a local disk, and in threads of its own on any other.

A system call on a local disk takes some microseconds, unless it reads what is not in memory. On NFS, SMB, FUSE or a
shared folder of a virtual machine each one asks another program, which may never answer. The reactor's thread must not
wait for that, nor may the threads in which the cache reads and writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

from attrs import field, frozen
from twisted.internet.defer import Deferred, TimeoutError
from twisted.internet.task import deferLater
from twisted.logger import Logger

from dockerproxy.concurrency import current_client, in_thread
from dockerproxy.errors import ServiceOverloaded, StorageFailed
from dockerproxy.oci.content import BytesLike, Content
from dockerproxy.oci.names import Digest
from dockerproxy.oci.ranges import ByteRange
from dockerproxy.shares import ClientShares
from dockerproxy.store.blob_reader import StoredBlobReader
from dockerproxy.store.blobs import Blobs, OpenBlob
from dockerproxy.thread_pool import BoundedThreadPool, PoolLimits

T = TypeVar("T")

NETWORK_DISK_LIMITS = PoolLimits(threads=16, threads_per_client=8, waiting=4000, waiting_per_client=1000)
"""If the file system hangs, its threads wait, and each request for one. 500 hosts behind a NAT are one client."""

READ_TIMEOUT = 30.0
"""Seconds after which a request that only reads is refused. A write goes on: it may be half done."""

_MAX_INLINE_MANIFEST = 256 * 1024  # bytes that are hashed in the reactor's thread, in 0.2 ms; most have some KiB
_RETRY_INTERVAL = 1.0  # seconds until a function that must run is tried again

log = Logger()


class DiskAccess(Protocol):
    """Runs functions that access the directory of the store.

    `file_system` is the type of its file system if that may hang, and None if it is local.
    """

    @property
    def file_system(self) -> str | None: ...

    async def read(self, function: Callable[..., T], *args: object) -> T:
        """Return what `function` returns: some system calls that change nothing but times of use.

        Raise `ServiceOverloaded` or `TooManyRequests` if the file system does not answer.
        """

    async def run(self, function: Callable[..., T], *args: object, quick: bool = False, required: bool = False) -> T:
        """Return what `function` returns, which may change anything, and may take long unless it is `quick`.

        Raise `ServiceOverloaded` or `TooManyRequests` if too many functions wait, except for a `required` one.
        """

    def read_at_once(self, blob: OpenBlob) -> bytes | None:
        """Return a manifest, or None if it must be read by `run`. Call it in a function that `read` runs."""

    def open_content(self, blobs: Blobs, blob: OpenBlob) -> Content:
        """Return the content of `blob`, which the caller closes instead. Call it in a function that `read` runs."""


@frozen
class LocalDisk:
    """A `DiskAccess` that does what is quick in the reactor's thread, and the rest in its pool."""

    _reactor: Any
    file_system: None = field(default=None, init=False)

    async def read(self, function: Callable[..., T], *args: object) -> T:
        return function(*args)

    async def run(self, function: Callable[..., T], *args: object, quick: bool = False, required: bool = False) -> T:
        return function(*args) if quick else await in_thread(self._reactor, function, *args)

    def read_at_once(self, blob: OpenBlob) -> bytes | None:
        content = blob.read(0, blob.size) if blob.size <= _MAX_INLINE_MANIFEST else None
        return bytes(content) if content is not None and len(content) == blob.size else None

    def open_content(self, blobs: Blobs, blob: OpenBlob) -> Content:
        return StoredBlobReader(self._reactor, blob)


@frozen
class NetworkDisk:
    """A `DiskAccess` for the directory of the setting `name`, which is on a file system of the type `file_system`."""

    _reactor: Any
    name: str
    file_system: str
    _pool: BoundedThreadPool

    @classmethod
    def start(cls, reactor: Any, name: str, file_system: str) -> NetworkDisk:
        """Return it with daemon threads, none of which is started before there is work."""
        pool = BoundedThreadPool.start(reactor, f"accesses to {name}", NETWORK_DISK_LIMITS)
        return cls(reactor, name, file_system, pool)

    async def read(self, function: Callable[..., T], *args: object) -> T:
        job: Deferred[T] = Deferred.fromCoroutine(self.run(function, *args))
        job.addTimeout(READ_TIMEOUT, self._reactor)
        try:
            return await job
        except TimeoutError:
            raise ServiceOverloaded(
                f"{self.name} is on {self.file_system}, which has not answered for {READ_TIMEOUT:.0f} seconds",
                headers=[("Retry-After", f"{READ_TIMEOUT:.0f}")],
            ) from None
        except OSError as error:
            log.error("cannot read in {name} on {type}: {reason}", name=self.name, type=self.file_system, reason=error)
            raise StorageFailed(f"{self.name} is on {self.file_system}, which failed: {error.strerror}") from error

    async def run(self, function: Callable[..., T], *args: object, quick: bool = False, required: bool = False) -> T:
        if not required:
            return await self._pool.run(function, *args, client=current_client.get())
        while True:
            try:
                return await self._pool.run(function, *args)  # for the daemon itself, which has no share
            except ServiceOverloaded:
                await deferLater(self._reactor, _RETRY_INTERVAL)

    @property
    def bounds(self) -> tuple[ClientShares, ...]:
        """The bounds of the accesses that run and of those that wait."""
        return self._pool.bounds

    def read_at_once(self, blob: OpenBlob) -> bytes | None:
        return blob.read_blocking(0, blob.size)

    def open_content(self, blobs: Blobs, blob: OpenBlob) -> Content:
        blob.close()
        return NetworkBlobReader(self, blobs, blob.digest, blob.size)


@frozen
class NetworkBlobReader:
    """A `Content` that opens the file for each read, in a thread, because even closing a file may take for ever."""

    _disk: NetworkDisk
    _blobs: Blobs
    _digest: Digest
    size: int | None

    def expect(self, ranges: Sequence[ByteRange]) -> None:
        """Do nothing, because everything can be read at once."""

    async def read(self, offset: int, max_bytes: int) -> BytesLike:
        """Return 1 to `max_bytes` bytes from `offset`, or ``b""`` at the end. Raise as `DiskAccess.read` does."""
        return await self._disk.read(partial(self._read, offset, max_bytes))

    def _read(self, offset: int, max_bytes: int) -> bytes:
        blob = self._blobs.open(self._digest)
        if blob is None:
            raise StorageFailed(f"{self._digest} was deleted while it was sent")
        with blob:
            return blob.read_blocking(offset, max_bytes)

    async def sendfile_source(self, offset: int, max_bytes: int) -> None:
        """Return None: sendfile(2) would wait for the file system in the reactor's thread."""

    async def wait_verified(self) -> None:
        """Return at once, because every stored blob has been verified."""

    def close(self) -> None:
        """Do nothing: no file is open between two reads."""
