"""On-disk index of referrers, so that listing the referrers of a manifest does not read every manifest.

The index is an addition to distribution's tree. Manifests that another registry or an import wrote are not indexed.
They are recognized because they have no subject file.

The file of a referrer has two lines of JSON: its artifact type (or null), so that a list of one type reads no more of
the others, and its descriptor, whose annotations may have megabytes. An earlier version wrote the descriptor only. Such
a file is written again when it is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from operator import itemgetter

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
from dockerproxy.store.tree_reader import Missing, list_names, open_regular, read_small

_NO_SUBJECT = b"-"
_MAX_NOTE = 64 * 1024  # bytes of an artifact type as JSON; that of a query has a tenth
_MAX_SIGNATURES = 10_000  # repositories that are remembered as indexed; for others, the index is looked through again

Signature = tuple[tuple[int, int], ...]


@define(eq=False)
class Referrers:
    """The referrers index of a store. All methods except `is_complete` block.

    Methods that change a repository require its lock (see `HostedTree.locks`).
    """

    _layout: Layout
    _blobs: Blobs
    _links: Links
    _complete_signatures: BoundedDict[str, Signature] = field(init=False)
    _staging: Staging = field(init=False)

    @_complete_signatures.default
    def _make_signatures(self) -> BoundedDict[str, Signature]:
        return BoundedDict(_MAX_SIGNATURES)

    @_staging.default
    def _make_staging(self) -> Staging:
        return Staging(self._layout.staging, sync_data=True, sync_names=True)

    def record(self, repository: str, digest: Digest, referrer: Referrer | None) -> None:
        """Index the manifest `digest`, whose subject is `referrer.subject`. Call this before linking the manifest."""
        if referrer is not None:
            self._staging.write(format_referrer(referrer), self._layout.referrer(repository, referrer.subject, digest))
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

    def list(
        self, repository: str, subject: Digest, after: str | None, artifact_type: str | None = None
    ) -> Iterator[tuple[str, bytes | None]]:
        """Yield the entries of `subject`'s referrers and their descriptors as JSON, the oldest first.

        The age is that of the link, because some clients take the last one for the newest. An entry is a text that
        sorts so. Skip those up to and including `after`, and referrers that are no longer linked. If `artifact_type` is
        given, the descriptors of others are None.
        """
        directory = self._layout.referrers(repository, subject)
        entries: list[tuple[str, Digest]] = []
        for name in list_names(directory):
            digest = digest_from_names(*name.split("-", 1)) if "-" in name else None
            time = None if digest is None else self._links.manifest_time(repository, digest)
            if digest is not None and time is not None:
                entry = f"{time:020}-{name}"
                if after is None or entry > after:
                    entries.append((entry, digest))
        for entry, digest in sorted(entries, key=itemgetter(0)):
            path = self._layout.referrer(repository, subject, digest)
            try:
                yield entry, self._read_descriptor(repository, path, digest, artifact_type)
            except Missing:
                continue

    def _read_descriptor(self, repository: str, path: str, digest: Digest, artifact_type: str | None) -> bytes | None:
        with open(open_regular(path), "rb") as file:
            # A note that is longer than a query can be belongs to none, and is not read to its end.
            note = file.readline(_MAX_NOTE)
            if note.startswith(b"{"):
                return self._upgrade(repository, path, digest, artifact_type)
            if artifact_type is not None and note != _format_note(artifact_type):
                return None
            while note and not note.endswith(b"\n"):
                note = file.readline(_MAX_NOTE)
            return file.read(2 * MAX_MANIFEST) or None

    def _upgrade(self, repository: str, path: str, digest: Digest, artifact_type: str | None) -> bytes | None:
        """Write a file of an earlier version again, from its manifest."""
        referrer = self._read_referrer(repository, digest)
        if referrer is None:
            return None
        content = format_referrer(referrer)
        with suppress(OSError):
            self._staging.write(content, path)
        return matching_descriptor(content, artifact_type)

    def is_complete(self, repository: str) -> bool:
        """Return whether every manifest of the repository is known to be indexed."""
        return self._complete_signatures.get(repository) == self.signature(repository)

    def missing(self, repository: str) -> Sequence[Digest]:
        """Return the manifests that another registry or an import added to the repository, and that are not indexed."""
        return [
            digest
            for digest in self._links.manifests(repository)
            if not read_small(self._layout.subject(repository, digest), 1)
        ]

    def index(self, repository: str, digests: Iterable[Digest]) -> None:
        """Index manifests of the repository. Those that it does not have any more are skipped."""
        for digest in digests:
            if self._links.has_manifest(repository, digest):
                self.record(repository, digest, self._read_referrer(repository, digest))

    def record_complete(self, repository: str, signature: Signature) -> None:
        """Record that all manifests that the repository had at the time of `signature` are indexed."""
        self._complete_signatures[repository] = signature

    def record_change(self, repository: str, old_signature: Signature) -> None:
        """Record that this daemon linked or unlinked an indexed manifest since `old_signature`.

        The index stays complete if it was complete before.
        """
        if self._complete_signatures.get(repository) == old_signature:
            self._complete_signatures[repository] = self.signature(repository)

    def signature(self, repository: str) -> Signature:
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


def format_referrer(referrer: Referrer) -> bytes:
    """Return the content of the file of a referrer."""
    descriptor = json.dumps(referrer.descriptor, separators=(",", ":"), ensure_ascii=False)
    try:
        encoded = descriptor.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which only JSON's escapes can express
        encoded = json.dumps(referrer.descriptor, separators=(",", ":")).encode()
    return _format_note(referrer.descriptor.get("artifactType")) + encoded


def matching_descriptor(content: bytes, artifact_type: str | None) -> bytes | None:
    """Return the descriptor in the content of a referrer's file; None if its type is another one than `artifact_type`.

    An earlier version wrote only the descriptor; no such file is in a bucket.
    """
    note, _, descriptor = content.partition(b"\n")
    return descriptor if artifact_type is None or note + b"\n" == _format_note(artifact_type) else None


def _format_note(artifact_type: str | None) -> bytes:
    return json.dumps(artifact_type).encode() + b"\n"


def _directory_signature(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return 0, 0
    # The link count, which counts subdirectories, is included because two changes may get the same mtime.
    return status.st_mtime_ns, status.st_nlink
