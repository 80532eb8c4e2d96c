"""The states of a download, and what its readers know of it."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Protocol

from dockerproxy.cache.ahead import AheadRange
from dockerproxy.cache.resumable import ResumableGet
from dockerproxy.cache.upstream import UpstreamRepository
from dockerproxy.oci.names import Digest
from dockerproxy.oci.ranges import ByteRange

if TYPE_CHECKING:
    from hashlib import _Hash


class DownloadState(Enum):
    """The state of a download. Readers may be opened in FOLLOWING and DOWNLOADING.

    | state       | meaning                                                     | next states                        |
    | ----------- | ----------------------------------------------------------- | ---------------------------------- |
    | CONNECTING  | this process is about to write; upstream has not responded  | WAITING, DOWNLOADING, the ends     |
    | WAITING     | another process writes; its response is not known yet       | CONNECTING, FOLLOWING, the ends    |
    | FOLLOWING   | another process writes; readers here read along             | DOWNLOADING (it died), the ends    |
    | DOWNLOADING | this process writes; upstream has responded to it or to the | the ends                           |
    |             | process that it took over from                              |                                    |
    | COMMITTED   | an end: the blob is verified and in the store               |                                    |
    | FAILED      | an end: `failure` says why                                  |                                    |
    """

    CONNECTING = "connecting"
    WAITING = "waiting"
    FOLLOWING = "following"
    DOWNLOADING = "downloading"
    COMMITTED = "committed"
    FAILED = "failed"

    @property
    def is_pending(self) -> bool:
        """Whether no response of upstream is known yet."""
        return self in (DownloadState.CONNECTING, DownloadState.WAITING)

    @property
    def is_end(self) -> bool:
        """Whether the download is over, and accepts no new readers."""
        return self in (DownloadState.COMMITTED, DownloadState.FAILED)

    def may_become(self, state: DownloadState) -> bool:
        """Return whether `state` is this state or one of its next states."""
        return state is self or state in _NEXT_STATES[self]


_ENDS = {DownloadState.COMMITTED, DownloadState.FAILED}
_NEXT_STATES = {
    DownloadState.CONNECTING: {DownloadState.WAITING, DownloadState.DOWNLOADING, *_ENDS},
    DownloadState.WAITING: {DownloadState.CONNECTING, DownloadState.FOLLOWING, *_ENDS},
    DownloadState.FOLLOWING: {DownloadState.DOWNLOADING, *_ENDS},
    DownloadState.DOWNLOADING: _ENDS,
    DownloadState.COMMITTED: set(),
    DownloadState.FAILED: set(),
}


class Download(Protocol):
    """The view that a reader has of a download: how far it is, and how to go on without it."""

    @property
    def digest(self) -> Digest: ...

    @property
    def state(self) -> DownloadState: ...

    @property
    def failure(self) -> Exception | None:
        """Why the download is FAILED."""

    @property
    def size(self) -> int | None:
        """The size of the whole blob in bytes; None while it is unknown."""

    @property
    def written(self) -> int:
        """The number of bytes in the ingest file."""

    @property
    def readable(self) -> int:
        """The number of bytes from the start that clients may get."""

    def read_tail(self, offset: int, at_most: int) -> memoryview | None:
        """Return one or more bytes from `offset` on if they are still in memory."""

    async def wait_changed(self) -> None:
        """Wait until more is written, or the state has changed."""

    def fetch_ahead(
        self, span: ByteRange, repository: UpstreamRepository, client: str, *, has_waited: bool
    ) -> AheadRange | None:
        """Return `span`, fetched by a request of its own, if the download is far from it. Otherwise return None."""

    def detach_reader(self, repository: UpstreamRepository) -> tuple[ResumableGet, _Hash]:
        """Return the upstream source of the bytes after `written`, and the hash of those before."""
