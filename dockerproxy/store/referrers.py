"""On-disk index of referrers, so that listing the referrers of a manifest does not read every manifest.

The index is an addition to distribution's tree. Manifests that another registry or an import wrote are not indexed.
They are recognized because they have no subject file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress

from attrs import define, field

from dockerproxy.bounded_dict import BoundedDict
from dockerproxy.errors import ManifestInvalid
from dockerproxy.oci.manifests import MAX_MANIFEST, parse_manifest
from dockerproxy.oci.names import ALGORITHMS, Digest
from dockerproxy.oci.referrers import Referrer, make_referrer
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.files import Staging
from dockerproxy.store.layout import Layout, digest_from_names
from dockerproxy.store.links import Links
from dockerproxy.store.tree_reader import list_names, read_small

_NO_SUBJECT = b"-"
_MAX_SIGNATURES = 10_000  # repositories that are remembered as indexed; for others, the index is looked through again

_Signature = tuple[tuple[int, int], ...]


@define(eq=False)
class Referrers:
    """The referrers index of a store. All methods except `is_complete` block.

    Methods that change a repository require its lock (see `HostedTree.locks`).
    """

    _layout: Layout
    _blobs: Blobs
    _links: Links
    _complete_signatures: BoundedDict[str, _Signature] = field(init=False)
    _staging: Staging = field(init=False)

    @_complete_signatures.default
    def _make_signatures(self) -> BoundedDict[str, _Signature]:
        return BoundedDict(_MAX_SIGNATURES)

    @_staging.default
    def _make_staging(self) -> Staging:
        return Staging(self._layout.staging, sync_data=True, sync_names=True)

    def record(self, repository: str, digest: Digest, referrer: Referrer | None) -> None:
        """Index the manifest `digest`, whose subject is `referrer.subject`. Call this before linking the manifest."""
        if referrer is not None:
            content = json.dumps(referrer.descriptor, separators=(",", ":"), ensure_ascii=False)
            path = self._layout.referrer(repository, referrer.subject, digest)
            self._staging.write(content.encode("utf-8", "surrogatepass"), path)
        subject_text = _NO_SUBJECT if referrer is None else str(referrer.subject).encode()
        if read_small(self._layout.subject(repository, digest), 256) != subject_text:
            self._staging.write(subject_text, self._layout.subject(repository, digest))

    def remove(self, repository: str, digest: Digest, subject: Digest | None) -> None:
        """Remove a manifest that was unlinked from the referrers of its `subject`."""
        if subject is not None:
            with suppress(FileNotFoundError, NotADirectoryError):
                os.unlink(self._layout.referrer(repository, subject, digest))

    def subject(self, repository: str, digest: Digest) -> Digest | None:
        """Return the subject of the manifest `digest` according to the index."""
        content = read_small(self._layout.subject(repository, digest), 256) or b""
        algorithm, _, encoded = content.decode("ascii", "replace").partition(":")
        return digest_from_names(algorithm, encoded)

    def list(self, repository: str, subject: Digest, after: str | None) -> Iterator[tuple[str, bytes]]:
        """Yield the names of `subject`'s referrers and their descriptors as JSON, sorted by name.

        Skip names up to and including `after`, and referrers that are no longer linked.
        """
        directory = self._layout.referrers(repository, subject)
        for name in sorted(list_names(directory)):
            digest = digest_from_names(*name.split("-", 1)) if "-" in name else None
            if (
                digest is None
                or (after is not None and name <= after)
                or not self._links.has_manifest(repository, digest)
            ):
                continue
            content = read_small(f"{directory}/{name}", 2 * MAX_MANIFEST)
            if content:
                yield name, content

    def is_complete(self, repository: str) -> bool:
        """Return whether every manifest of the repository is known to be indexed."""
        return self._complete_signatures.get(repository) == self.signature(repository)

    def index_missing(self, repository: str) -> None:
        """Index the manifests that another registry or an import added to the repository."""
        signature = self.signature(repository)
        for digest in self._links.manifests(repository):
            if not read_small(self._layout.subject(repository, digest), 1) and self._links.has_manifest(
                repository, digest
            ):
                self.record(repository, digest, self._read_referrer(repository, digest))
        self._complete_signatures[repository] = signature

    def record_change(self, repository: str, old_signature: _Signature) -> None:
        """Record that this daemon linked or unlinked an indexed manifest since `old_signature`.

        The index stays complete if it was complete before.
        """
        if self._complete_signatures.get(repository) == old_signature:
            self._complete_signatures[repository] = self.signature(repository)

    def signature(self, repository: str) -> _Signature:
        """Return a value that changes if the repository gains or loses a manifest."""
        revisions = self._layout.revisions(repository)
        return tuple(_directory_signature(f"{revisions}/{algorithm}") for algorithm in ALGORITHMS)

    def _read_referrer(self, repository: str, digest: Digest) -> Referrer | None:
        blob = self._blobs.open(digest)
        if blob is None:
            return None
        with blob:
            content = blob.read_blocking(0, MAX_MANIFEST + 1)
        try:
            manifest = parse_manifest(content, self._links.manifest_media_type(repository, digest))
        except ManifestInvalid:
            return None
        return make_referrer(manifest, digest, len(content))


def _directory_signature(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return 0, 0
    # The link count, which counts subdirectories, is included because two changes may get the same mtime.
    return status.st_mtime_ns, status.st_nlink
