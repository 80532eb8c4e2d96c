"""Coordination of downloads of the same blob, across processes too.

Downloads coordinate through the ingest file and its lock. The file does not contain the size of the blob, nor the
repository and identity of the request. The writing process publishes these as a `DownloadInfo` record.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import asdict, frozen

from dockerproxy.cache.best_effort import try_put, try_remove
from dockerproxy.oci.names import Digest
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.ingest import ForeignIngest, Ingest
from dockerproxy.store.layout import Layout
from dockerproxy.store.records import Records

_RECORD_KIND = "flight"


@frozen
class DownloadInfo:
    """A response that upstream has begun to send to `identity`, from the repository `key`.

    `size` is in bytes, or None if upstream does not give it. `opened` is the reactor's time, which all processes share.
    """

    size: int | None
    key: str
    identity: str
    opened: float


@frozen
class Ingests:
    """The ingest files of a cache. `shared` is true if other processes use the same cache."""

    _layout: Layout
    _blobs: Blobs
    _records: Records
    shared: bool = False

    def acquire(self, digest: Digest) -> Ingest | ForeignIngest | None:
        """Return the ingest of `digest`, locked for writing, or a read-only view if another process writes it.

        Return None if the blob was published in the meantime. Block the thread. Raise `OSError`.
        """
        while True:
            ingest = Ingest.open(self._layout, digest)
            if ingest is not None:
                if self.shared and self._blobs.exists(digest):
                    ingest.discard()
                    return None
                return ingest
            foreign = ForeignIngest.open(self._layout, digest)
            if foreign is not None:
                return foreign

    def is_published(self, digest: Digest) -> bool:
        """Return whether the blob is in the store."""
        return self._blobs.exists(digest)

    def publish_info(self, digest: Digest, info: DownloadInfo) -> None:
        """Publish `info` to other processes."""
        if self.shared:
            try_put(self._records, asdict(info), _RECORD_KIND, str(digest))

    def remove_info(self, digest: Digest) -> None:
        """Remove the published information."""
        if self.shared:
            try_remove(self._records, _RECORD_KIND, str(digest))

    def read_info(self, digest: Digest) -> DownloadInfo | None:
        """Return the information that the writing process published; None if there is none yet."""
        return _parse_info(self._records.get(_RECORD_KIND, str(digest)) or {})


def _parse_info(record: Mapping[str, Any]) -> DownloadInfo | None:
    match record:
        case {"size": int() | None as size, "key": str(key), "identity": str(identity), "opened": float(opened)}:
            return DownloadInfo(size, key, identity, opened)
    return None
