"""The answers of the bucket that pulls use while it does not answer: in the records of the cache, for all processes.

Nothing of this is used while the bucket answers. Losing an answer costs an error during an outage.
"""

from __future__ import annotations

from typing import Any

from attrs import frozen

from dockerproxy.cache.best_effort import try_put, try_remove
from dockerproxy.concurrency import in_thread
from dockerproxy.errors import DigestInvalid
from dockerproxy.oci.names import Digest, Repository, Tag
from dockerproxy.store.records import Records

_TAG, _MANIFEST, _BLOB = "hosted-tag", "hosted-manifest", "hosted-blob"


@frozen
class KeptAnswers:
    """Which repository had which tag, manifest and blob when the bucket said so last."""

    _reactor: Any
    _records: Records

    def tag(self, repository: Repository, tag: Tag) -> Digest | None:
        """Return the manifest that the tag had."""
        value = (self._records.get(_TAG, repository, tag) or {}).get("digest")
        try:
            return Digest.parse(value) if isinstance(value, str) else None
        except DigestInvalid:
            return None

    def media_type(self, repository: Repository, digest: Digest) -> str | None:
        """Return the media type of a manifest that the repository had; None if it had none."""
        value = (self._records.get(_MANIFEST, repository, str(digest)) or {}).get("type")
        return value if isinstance(value, str) else None

    def blob_size(self, repository: Repository, digest: Digest) -> int | None:
        """Return the size in bytes of a blob that the repository had; None if it had none."""
        value = (self._records.get(_BLOB, repository, str(digest)) or {}).get("size")
        return value if isinstance(value, int) else None

    async def keep_tag(self, repository: Repository, tag: Tag, digest: Digest | None) -> None:
        """Keep the manifest of a tag; None if there is none."""
        if self.tag(repository, tag) != digest:
            await self._keep(None if digest is None else {"digest": str(digest)}, _TAG, repository, tag)

    async def keep_manifest(self, repository: Repository, digest: Digest, media_type: str | None) -> None:
        """Keep that a repository has a manifest; None if it has not."""
        if self.media_type(repository, digest) != media_type:
            await self._keep(None if media_type is None else {"type": media_type}, _MANIFEST, repository, str(digest))

    async def keep_blob(self, repository: Repository, digest: Digest, size: int | None) -> None:
        """Keep that a repository has a blob; None if it has not."""
        if self.blob_size(repository, digest) != size:
            await self._keep(None if size is None else {"size": size}, _BLOB, repository, str(digest))

    async def _keep(self, value: dict[str, Any] | None, *key: str) -> None:
        if value is None:
            await in_thread(self._reactor, try_remove, self._records, *key)
        else:
            await in_thread(self._reactor, try_put, self._records, value, *key)
