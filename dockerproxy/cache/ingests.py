"""Where downloads of the same blob meet, those of other processes too.

The ingest file and its lock are the meeting point. What the file does not tell - how long the blob is, and on whose
word it is being sent - its writer announces in a record beside it.
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
    """What upstream began to send: `size` bytes (None: it does not say), to `identity`, out of the repository `key`.

    `opened` is the reactor's time, which processes share.
    """

    size: int | None
    key: str
    identity: str
    opened: float


@frozen
class Ingests:
    """The ingest files of a cache. `shared`: other processes use it, too."""

    _layout: Layout
    _blobs: Blobs
    _records: Records
    shared: bool = False

    def acquire(self, digest: Digest) -> Ingest | ForeignIngest | None:
        """Return the right to write the ingest of `digest`, or it as another process writes it.

        None where the blob has come meanwhile. Blocks. Raises `OSError`.
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
        """Say whether the blob is here."""
        return self._blobs.exists(digest)

    def publish_info(self, digest: Digest, info: DownloadInfo) -> None:
        """Tell the others what is being written."""
        if self.shared:
            try_put(self._records, asdict(info), _RECORD_KIND, str(digest))

    def remove_info(self, digest: Digest) -> None:
        """Take back what was announced."""
        if self.shared:
            try_remove(self._records, _RECORD_KIND, str(digest))

    def read_info(self, digest: Digest) -> DownloadInfo | None:
        """Return what the writer announced, None while it did not."""
        return _parse_info(self._records.get(_RECORD_KIND, str(digest)) or {})


def _parse_info(record: Mapping[str, Any]) -> DownloadInfo | None:
    match record:
        case {"size": int() | None as size, "key": str(key), "identity": str(identity), "opened": float(opened)}:
            return DownloadInfo(size, key, identity, opened)
    return None
