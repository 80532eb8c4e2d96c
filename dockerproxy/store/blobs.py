"""Contents by digest. What is here under its name is whole and was verified; nothing here is ever changed."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import TracebackType

from attrs import define, field

from dockerproxy.errors import DigestInvalid
from dockerproxy.oci.names import Digest
from dockerproxy.store.eviction import Entry
from dockerproxy.store.files import Staging, list_names
from dockerproxy.store.layout import Layout, digest_from_names

# Seconds. The last use is a file's mtime (atime is coarser where `relatime` is mounted, and gone under `noatime`);
# eviction counts in days, so a blob read a thousand times a second needs no thousand inode updates.
_TOUCH_INTERVAL = 60
_SAMPLE_INTERVAL = 128 * 1024  # bytes: what Linux reads ahead by default

_PREFIX = re.compile(r"[0-9a-f]{2}")


@define
class OpenBlob:
    """A content that is open: eviction may remove its name, not its bytes. `size` in bytes.

    A context manager, or `close` it; not while a thread reads from it, for another file may get its number.
    """

    fd: int
    size: int
    digest: Digest

    def read(self, offset: int, size: int) -> bytearray | None:
        """Return up to `size` bytes from `offset` if memory has them; None: `read_blocking` has to fetch them."""
        return read_cached(self.fd, offset, max(0, min(size, self.size - offset)))

    def read_blocking(self, offset: int, size: int) -> bytes:
        """Return up to `size` bytes from `offset`, ``b""`` at the end only. Blocks."""
        return read_blocking(self.fd, offset, size)

    def is_cached(self, offset: int, size: int) -> bool:
        """Say whether memory has these bytes, as samples tell: the kernel reads and drops them in larger parts."""
        sample = bytearray(1)
        positions = [*range(offset, offset + size, _SAMPLE_INTERVAL), offset + size - 1]
        return all(fill_cached(self.fd, sample, position) for position in positions)

    def close(self) -> None:
        """Let go of the content; a second time does nothing."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> OpenBlob:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc_value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


@define
class Blobs:
    """The contents below a root. `durable`: what is published outlives a power cut; the clock dates the last use."""

    _layout: Layout
    _durable: bool
    _clock: Callable[[], float] = time.time
    _staging: Staging = field(init=False)

    @_staging.default
    def _make_staging(self) -> Staging:
        # The cache syncs data as well, not names. Readers trust a blob by its name alone and for good, and after a
        # power cut a renamed file may have its size and zeros for bytes, so no look at the size later would tell. It
        # costs 0.3 to 0.4 s for 1 GiB and 0.3 ms for a small blob (NVMe), once, in the writer's thread, beside 0.2 s
        # of writing and 0.6 s of hashing. A name that is lost costs another download.
        return Staging(self._layout.staging, sync_data=True, sync_names=self._durable)

    def open(self, digest: Digest) -> OpenBlob | None:
        """Return the content, opened and noted as used now, or None where there is none."""
        try:
            fd = os.open(self._layout.blob(digest), os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return None
        status = os.fstat(fd)
        now = self._clock()
        # A date in the future (a clock that was set back) would keep the blob for ever.
        if not 0 <= now - status.st_mtime < _TOUCH_INTERVAL:
            # Not ours (a tree that another user's registry wrote), or read-only: it can be read all the same.
            with suppress(OSError):
                os.utime(fd, (now, now))
        return OpenBlob(fd, status.st_size, digest)

    def touch(self, digest: Digest) -> int | None:
        """Note the content as used now, and return its length in bytes; None where there is none.

        Garbage collection leaves alone what was used within the hour: what was found here stays here (`removal`).
        """
        path = self._layout.blob(digest)
        try:
            status = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        now = self._clock()
        if not 0 <= now - status.st_mtime < _TOUCH_INTERVAL:
            try:
                os.utime(path, (now, now))
            except FileNotFoundError:
                return None
            except OSError:
                pass  # as in `open`; nothing removes what it could not date
        return status.st_size

    def size(self, digest: Digest) -> int | None:
        """Return the content's length in bytes, None where there is none."""
        try:
            return os.stat(self._layout.blob(digest)).st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def exists(self, digest: Digest) -> bool:
        """Say whether the content is here."""
        return self.size(digest) is not None

    def commit(self, staged_path: str, digest: Digest) -> None:
        """Give the file at `staged`, whose content was verified, its place. Blocks.

        It is gone from where it was, also where the content is here already. Raises `OSError`; the file then stays.
        """
        fd = os.open(staged_path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # One of another length is no content of this digest: damage, which ours mends.
            if self.touch(digest) == os.fstat(fd).st_size:
                os.unlink(staged_path)
                return
            now = self._clock()
            os.utime(fd, (now, now))
            os.fdatasync(fd)
        finally:
            os.close(fd)
        # Two who publish at once both get here: the second rename puts the same bytes over the first.
        self._staging.move(staged_path, self._layout.blob(digest))

    def put(self, content: bytes, digest: Digest) -> None:
        """Keep a small content, a manifest. Blocks. Raise `DigestInvalid` where `digest` is not its digest."""
        if Digest.of(content, digest.algorithm) != digest:
            raise DigestInvalid(f"the content is not that of {digest}")
        if self.touch(digest) != len(content):
            self._staging.write(content, self._layout.blob(digest))

    def remove(self, digest: Digest) -> bool:
        """Remove the content, and say whether it was here; who has it open goes on reading."""
        path = self._layout.blob(digest)
        try:
            os.unlink(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        # Another may be publishing there at this moment.
        with suppress(OSError):
            os.rmdir(os.path.dirname(path))
        return True

    def walk(self) -> Iterator[Entry]:
        """Yield what is here, in no order; what comes or goes meanwhile may be missed or be gone. Blocks."""
        for digest in self.digests():
            with suppress(FileNotFoundError, NotADirectoryError):
                status = os.stat(self._layout.blob(digest))
                yield Entry(digest, status.st_size, status.st_mtime)

    def digests(self, partition: int = 0, partitions: int = 1) -> Iterator[Digest]:
        """Yield the digests of what is here, as `walk` does, or one of `parts` of them. Blocks."""
        for algorithm in list_names(self._layout.blobs):
            for prefix in list_names(f"{self._layout.blobs}/{algorithm}"):
                if _PREFIX.fullmatch(prefix) and int(prefix, 16) % partitions == partition:
                    for encoded in list_names(f"{self._layout.blobs}/{algorithm}/{prefix}"):
                        digest = digest_from_names(algorithm, encoded)
                        if digest is not None and encoded.startswith(prefix):
                            yield digest


def read_cached(fd: int, offset: int, size: int) -> bytearray | None:
    """Return up to `size` bytes of a file from `offset` without waiting for the disk, None where that cannot be.

    Empty at the file's end only. The bytearray is the caller's: nothing writes to it afterwards.
    """
    # CPU seconds per GiB at 256 KiB a piece, measured: 0.12 this way (a new bytearray, 0.02 of it for the zeroing),
    # 0.14 to 0.16 with a copy into bytes, 0.10 with `os.pread`, which waits for the disk, 0.11 with `fill_cached`.
    buffer = bytearray(size)
    length = fill_cached(fd, buffer, offset)
    if length is None:
        return None
    del buffer[length:]
    return buffer


def fill_cached(fd: int, buffer: bytearray | memoryview, offset: int) -> int | None:
    """Read as `read_cached` does, into `buffer`, which must not be one that a transport still keeps; return the length.

    None, too, where the file system cannot tell what is in memory. That is not remembered: asking again costs some
    microseconds, the thread that has to read then costs a hundred.
    """
    try:
        return os.preadv(fd, [buffer], offset, os.RWF_NOWAIT)
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS):
            return None
        raise


def read_blocking(fd: int, offset: int, size: int) -> bytes:
    """Return up to `size` bytes of a file from `offset`, ``b""`` at the end only. Blocks."""
    return os.pread(fd, size, offset)
