"""A download that another process makes, read along by the flight of this one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from twisted.internet.task import deferLater

from dockerproxy.cache.ingests import Ingests
from dockerproxy.errors import UpstreamBroken
from dockerproxy.store.ingest import ForeignIngest, Ingest

if TYPE_CHECKING:
    from dockerproxy.cache.downloads import BlobDownload

_POLL_INTERVAL = 0.01  # seconds between two looks at the file


async def _follow_ingest(
    reactor: Any, download: BlobDownload, ingests: Ingests, foreign: ForeignIngest
) -> Ingest | None:
    """Let the readers of `flight` have what comes, to the end of it.

    Return the right to go on where the other process has died, None where it published the blob or gave it up. Raise
    `UpstreamBroken` where it took back what readers have a part of.
    """
    ingest = None
    try:
        while foreign.in_progress and (ingest := foreign.try_take_over()) is None:
            _update_from(download, ingests, foreign)
            await deferLater(reactor, _POLL_INTERVAL)
        _update_from(download, ingests, foreign)
    except BaseException:
        if ingest is not None:
            ingest.release()
        raise
    finally:
        if ingest is None:
            foreign.close()
    return ingest


def _update_from(download: BlobDownload, ingests: Ingests, foreign: ForeignIngest) -> None:
    if not download.started and (info := ingests.read_info(download.digest)) is not None:
        download.mark_started(info)
    size = foreign.size
    if size < download.written:
        # What readers have of it was never hashed.
        raise UpstreamBroken(f"another process took back what it had received of {download.digest}")
    if size > download.written:
        download.grow(size)
