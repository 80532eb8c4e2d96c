"""Verification of a store: checks every blob against its digest, and every link against its target.

Move a blob that does not match its digest to ROOT/damaged, so that clients do not receive it and a push can restore it.
Mend a torn link if its content is there and matches. Change and delete nothing else. Only report dangling links,
because an administrator must decide about them.
"""

from __future__ import annotations

import os
from collections import Counter

from attrs import define, field, frozen

from dockerproxy.errors import ManifestInvalid
from dockerproxy.oci.manifests import KNOWN_TYPES, MAX_MANIFEST, is_nondistributable, parse_manifest
from dockerproxy.oci.names import Digest
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.layout import Layout
from dockerproxy.store.links import Links, LinkState
from dockerproxy.store.progress import Progress, RepositoryLock, no_lock
from dockerproxy.store.tree_reader import Missing, StrictReader, UnsafeFile

_CHUNK_SIZE = 1024 * 1024

_FileID = tuple[int, int, int]


@frozen
class Finding:
    """A problem found in the store. `message` is for the user.

    `kind` is ``damaged`` (a blob, now quarantined), ``unreadable`` (an I/O error), ``torn`` (a link), ``missing`` (the
    target of a link or reference) or ``invalid`` (a manifest).
    """

    kind: str
    message: str
    repository: str | None = None
    digest: Digest | None = None


@frozen
class ScrubResult:
    """Numbers of checked objects and of findings. `bytes` is the size of the blobs."""

    blobs: int = 0
    bytes: int = 0
    repositories: int = 0
    links: int = 0
    tags: int = 0
    damaged: int = 0
    findings: int = 0


def scrub(
    layout: Layout,
    *,
    check_links: bool = True,
    sparse: bool = False,
    progress: Progress[Finding] | None = None,
    lock: RepositoryLock = no_lock,
) -> ScrubResult:
    """Verify the store in `layout`. Blocks. Raises `OSError` and `Stopped`.

    `progress` reports bytes, and then repositories. If `check_links` is false, skip the repositories, because in a
    cache they may refer to evicted blobs. With `sparse`, an index may lack manifests.
    """
    run = _ScrubRun(layout, progress or Progress(), lock, sparse)
    run.scrub_blobs()
    if check_links:
        run.check_repositories()
    return ScrubResult(**run.counts)


@define
class _ScrubRun:
    _layout: Layout
    _progress: Progress[Finding]
    _lock: RepositoryLock
    _sparse: bool
    counts: Counter[str] = field(factory=Counter, init=False)
    _total_bytes: int | None = field(default=None, init=False)  # None until they are known
    _reader: StrictReader = field(init=False)
    _blobs: Blobs = field(init=False)
    _links: Links = field(init=False)

    @_reader.default
    def _make_reader(self) -> StrictReader:
        return StrictReader(self._layout.anchors, self._record_unsafe)

    @_blobs.default
    def _make_blobs(self) -> Blobs:
        return Blobs(self._layout, durable=False, reader=self._reader)

    @_links.default
    def _make_links(self) -> Links:
        return Links(self._layout, durable=True, reader=self._reader)

    def _record(self, kind: str, message: str, repository: str | None = None, digest: Digest | None = None) -> None:
        self.counts.update(findings=1, damaged=int(kind == "damaged"))
        self._progress.emit(Finding(kind, message, repository, digest))

    def _record_unsafe(self, error: UnsafeFile) -> None:
        self._record("unreadable", str(error))

    # Blobs.

    def scrub_blobs(self) -> None:
        """Check every blob."""
        total = 0
        for entry in self._blobs.walk():
            total += entry.size
            self._report_bytes()
        self._total_bytes = total
        # Walk again, because a list of all entries could be large.
        for digest in self._blobs.digests():
            try:
                self._scrub_blob(digest)
            except Missing:
                continue  # the blob was deleted meanwhile
            except OSError as error:
                reason = str(error) if isinstance(error, UnsafeFile) else error.strerror
                self._record("unreadable", f"{digest} cannot be read: {reason}", digest=digest)
            self.counts.update(blobs=1)

    def _scrub_blob(self, digest: Digest) -> None:
        hasher, path = digest.hasher(), self._layout.blob(digest)
        with open(self._reader.open(path), "rb", buffering=0) as file:
            file_id = _file_id(os.fstat(file.fileno()))
            remaining = file_id[2]
            while chunk := file.read(min(_CHUNK_SIZE, remaining)):
                remaining -= len(chunk)
                hasher.update(chunk)
                self.counts.update(bytes=len(chunk))
                self._report_bytes()
        if hasher.hexdigest() != digest.hex and self._quarantine(digest, file_id):
            self._record("damaged", f"{digest} is damaged; moved to {self._layout.damaged}", digest=digest)

    def _quarantine(self, digest: Digest, file_id: _FileID) -> bool:
        """Move the blob to ROOT/damaged, unless its file has been replaced since it was read."""
        os.makedirs(self._layout.damaged, exist_ok=True)
        quarantine_path, number = f"{self._layout.damaged}/{digest.algorithm}-{digest.hex}", 0
        while os.path.lexists(quarantine_path):
            number += 1
            quarantine_path = f"{self._layout.damaged}/{digest.algorithm}-{digest.hex}.{number}"
        path = self._layout.blob(digest)
        os.rename(path, quarantine_path)
        if _file_id(os.lstat(quarantine_path)) == file_id:
            return True
        os.rename(quarantine_path, path)
        return False

    def _report_bytes(self) -> None:
        self._progress.report("contents", self.counts["bytes"], self._total_bytes)

    # Links, tags and manifests.

    def check_repositories(self) -> None:
        """Check the links, tags and manifests of all repositories."""
        for repository in self._links.repositories():
            for layer in self._links.layers(repository):
                self._check_link(repository, layer, "blob")
            for digest in self._links.manifests(repository):
                self._check_link(repository, digest, "manifest")
            for digest in self._links.manifests(repository):
                self._check_manifest(repository, digest)
            self._check_tags(repository)
            self.counts.update(repositories=1)
            self._report_repositories()

    def _check_link(self, repository: str, digest: Digest, kind: str) -> None:
        """Check one link, and mend it if it is torn."""
        self._report_repositories()
        self.counts.update(links=1)
        state_of = self._links.layer_state if kind == "blob" else self._links.manifest_state
        # The link may be absent, because it is being written or removed, or because a crash interrupted that.
        state, is_here = state_of(repository, digest), self._blobs.exists(digest)
        if state is LinkState.TORN and is_here:
            with self._lock(repository):
                if state_of(repository, digest) is LinkState.TORN:
                    (self._links.link_layer if kind == "blob" else self._links.mend_manifest)(repository, digest)
            self._record_torn(repository, f"the link to the {kind} {digest}", True, digest)
        elif state is LinkState.TORN:
            self._record_torn(repository, f"the link to the {kind} {digest}", False, digest)
        elif not is_here and state_of(repository, digest) is LinkState.WHOLE:
            self._record("missing", f"{repository}: the {kind} {digest} is missing", repository, digest)

    def _record_torn(self, repository: str, name: str, is_mended: bool, digest: Digest | None) -> None:
        outcome = "was torn; it was mended, because its content is here" if is_mended else "is torn"
        self._record("torn", f"{repository}: {name} {outcome}", repository, digest)

    def _check_manifest(self, repository: str, digest: Digest) -> None:
        content = self._reader.read_small(self._layout.blob(digest), MAX_MANIFEST + 1)
        if content is None:
            return  # `_check_link` has reported it
        media_type = self._links.manifest_media_type(repository, digest)
        try:
            manifest = parse_manifest(content, media_type)
        except ManifestInvalid as error:
            if media_type is not None and media_type.lower() not in KNOWN_TYPES:
                return  # a manifest of an unknown type need not parse
            message = f"{repository}: the manifest {digest} is invalid ({error.message})"
            self._record("invalid", message, repository, digest)
            return
        layers = manifest.layers if manifest.config is None else (manifest.config, *manifest.layers)
        for blob in layers:
            if not self._has_blob(repository, blob.digest) and not is_nondistributable(blob.media_type):
                self._record_missing_reference(repository, digest, blob.digest)
            self._report_repositories()
        for child in () if self._sparse else manifest.manifests:
            is_manifest = self._links.has_manifest(repository, child.digest) and self._blobs.exists(child.digest)
            if not is_manifest and not self._has_blob(repository, child.digest):
                self._record_missing_reference(repository, digest, child.digest)
            self._report_repositories()

    def _has_blob(self, repository: str, digest: Digest) -> bool:
        return self._links.has_layer(repository, digest) and self._blobs.exists(digest)

    def _record_missing_reference(self, repository: str, digest: Digest, reference: Digest) -> None:
        if self._links.has_manifest(repository, digest):  # it may have been deleted meanwhile
            message = f"{repository}: the manifest {digest} refers to {reference}, which is missing"
            self._record("missing", message, repository, digest)

    def _check_tags(self, repository: str) -> None:
        for tag, digest in self._links.iter_tags(repository):
            self.counts.update(tags=1)
            remedy = f"; push the tag again, or run `dockerproxy rm {repository}:{tag}`"
            if digest is None:
                mended = self._mend_tag(repository, tag)
                suffix = "" if mended else remedy
                outcome = "was torn; it was mended, because it has had one manifest only" if mended else "is torn"
                self._record("torn", f"{repository}:{tag}: the tag's link {outcome}{suffix}", repository, mended)
            elif not self._links.has_manifest(repository, digest) and self._links.tag(repository, tag) == digest:
                message = f"{repository}:{tag}: the tag points to {digest}, which is not a manifest of the repository"
                self._record("missing", message + remedy, repository, digest)
            self._report_repositories()

    def _mend_tag(self, repository: str, tag: str) -> Digest | None:
        """Point a torn tag to its manifest again, if it has had one only. Return that."""
        with self._lock(repository):
            digest = self._links.only_target(repository, tag)
            if digest is None or not self._blobs.exists(digest):
                return None
            if self._links.tag(repository, tag) is None:
                self._links.set_tag(repository, tag, digest)
            return digest

    def _report_repositories(self) -> None:
        self._progress.report("repositories", self.counts["repositories"], None)


def _file_id(status: os.stat_result) -> _FileID:
    # Neither mtime nor ctime can be included, because reading a blob changes both (`Blobs.open`).
    return status.st_dev, status.st_ino, status.st_size
