"""Verification of the repositories of a store, on a disk or in a bucket: every link against its target.

Mend a torn link if its content is there. Change nothing else, because an administrator must decide about it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

from attrs import define, field, frozen

from dockerproxy.errors import ManifestInvalid
from dockerproxy.oci.manifests import KNOWN_TYPES, MAX_MANIFEST, is_nondistributable, parse_manifest
from dockerproxy.oci.names import Digest
from dockerproxy.store.contents import Contents
from dockerproxy.store.links import Links, LinkState
from dockerproxy.store.progress import Progress, RepositoryLock


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
    """Numbers of checked objects and of findings. `bytes` is the size of the blobs.

    `unlinked` counts the blobs that no repository has, which gc deletes.
    """

    blobs: int = 0
    bytes: int = 0
    repositories: int = 0
    links: int = 0
    tags: int = 0
    damaged: int = 0
    findings: int = 0
    unlinked: int = 0


def describe_damage(digest: Digest, quarantine: object) -> str:
    """Return the sentence about a blob that was moved to `quarantine`, because it did not match its digest."""
    remedy = "push an image with it again, or get it from a copy by `dockerproxy import DIRECTORY`"
    return f"{digest} is damaged; moved to {quarantine}; {remedy}"


class LinkWriter(Protocol):
    """Writes links that are torn again."""

    def link_layer(self, repository: str, digest: Digest) -> None: ...

    def mend_manifest(self, repository: str, digest: Digest) -> None: ...

    def set_tag(self, repository: str, tag: str, digest: Digest) -> None: ...


@define
class RepositoryCheck:
    """Checks repositories whose `links` and `contents` it reads, and mends links by `writer` under their `lock`.

    `counts` has the numbers of a `ScrubResult`. With `sparse`, an index may lack manifests. Blobs that a repository has
    leave `unlinked`.
    """

    _links: Links
    _contents: Contents
    _writer: LinkWriter
    _progress: Progress[Finding]
    _lock: RepositoryLock
    _sparse: bool
    counts: Counter[str] = field(factory=Counter, init=False)
    unlinked: set[Digest] = field(factory=set, init=False)

    def record(self, kind: str, message: str, repository: str | None = None, digest: Digest | None = None) -> None:
        """Count and report a finding."""
        self.counts.update(findings=1, damaged=int(kind == "damaged"))
        self._progress.emit(Finding(kind, message, repository, digest))

    def check_repositories(self) -> None:
        """Check the links, tags and manifests of all repositories."""
        for repository in self._links.repositories():
            self.check_repository(repository)
            self.counts.update(repositories=1)
            self._report()
        self.counts.update(unlinked=len(self.unlinked))

    def check_repository(self, repository: str) -> None:
        """Check the links, tags and manifests of one repository."""
        self._check_links(repository, "blob", self._links.layers(repository), self._links.layer_state)
        self._check_links(repository, "manifest", self._links.manifests(repository), self._links.manifest_state)
        read = partial(self._read_manifest, repository)
        for digest, content, media_type in self._contents.map(read, self._links.manifests(repository)):
            if content is not None:  # else `_check_link` has reported it
                self._check_manifest(repository, digest, content, media_type)
        self._check_tags(repository)

    def _check_links(
        self,
        repository: str,
        kind: str,
        digests: Iterator[Digest],
        state_of: Callable[[str, Digest], LinkState],
    ) -> None:
        def read(digest: Digest) -> tuple[Digest, LinkState, bool]:
            # The link may be absent, because it is being written or removed, or because a crash interrupted that.
            return digest, state_of(repository, digest), self._contents.exists(digest)

        for digest, state, is_here in self._contents.map(read, digests):
            self.unlinked.discard(digest)
            self.counts.update(links=1)
            self._report()
            if state is LinkState.TORN and is_here:
                with self._lock(repository):
                    if state_of(repository, digest) is LinkState.TORN:
                        self._mend(repository, kind, digest)
                self._record_torn(repository, f"the link to the {kind} {digest}", True, digest)
            elif state is LinkState.TORN:
                self._record_torn(repository, f"the link to the {kind} {digest}", False, digest)
            elif not is_here and state_of(repository, digest) is LinkState.WHOLE:
                self.record("missing", f"{repository}: the {kind} {digest} is missing", repository, digest)

    def _mend(self, repository: str, kind: str, digest: Digest) -> None:
        (self._writer.link_layer if kind == "blob" else self._writer.mend_manifest)(repository, digest)

    def _record_torn(self, repository: str, name: str, is_mended: bool, digest: Digest | None) -> None:
        outcome = "was torn; it was mended, because its content is here" if is_mended else "is torn"
        self.record("torn", f"{repository}: {name} {outcome}", repository, digest)

    def _read_manifest(self, repository: str, digest: Digest) -> tuple[Digest, bytes | None, str | None]:
        content = self._contents.read(digest, MAX_MANIFEST + 1)
        return digest, content, None if content is None else self._links.manifest_media_type(repository, digest)

    def _check_manifest(self, repository: str, digest: Digest, content: bytes, media_type: str | None) -> None:
        try:
            manifest = parse_manifest(content, media_type)
        except ManifestInvalid as error:
            if media_type is not None and media_type.lower() not in KNOWN_TYPES:
                return  # a manifest of an unknown type need not parse
            message = f"{repository}: the manifest {digest} is invalid ({error.message})"
            self.record("invalid", message, repository, digest)
            return
        layers = manifest.layers if manifest.config is None else (manifest.config, *manifest.layers)
        for blob in layers:
            if not self._has_blob(repository, blob.digest) and not is_nondistributable(blob.media_type):
                self._record_missing_reference(repository, digest, blob.digest)
            self._report()
        for child in () if self._sparse else manifest.manifests:
            is_manifest = self._links.has_manifest(repository, child.digest) and self._contents.exists(child.digest)
            if not is_manifest and not self._has_blob(repository, child.digest):
                self._record_missing_reference(repository, digest, child.digest)
            self._report()

    def _has_blob(self, repository: str, digest: Digest) -> bool:
        return self._links.has_layer(repository, digest) and self._contents.exists(digest)

    def _record_missing_reference(self, repository: str, digest: Digest, reference: Digest) -> None:
        if self._links.has_manifest(repository, digest):  # it may have been deleted meanwhile
            message = f"{repository}: the manifest {digest} refers to {reference}, which is missing"
            self.record("missing", message, repository, digest)

    def _check_tags(self, repository: str) -> None:
        for tag, digest in self._links.iter_tags(repository):
            self.counts.update(tags=1)
            remedy = f"; push the tag again, or run `dockerproxy rm {repository}:{tag}`"
            if digest is None:
                mended = self._mend_tag(repository, tag)
                suffix = "" if mended else remedy
                outcome = "was torn; it was mended, because it has had one manifest only" if mended else "is torn"
                self.record("torn", f"{repository}:{tag}: the tag's link {outcome}{suffix}", repository, mended)
            elif not self._links.has_manifest(repository, digest) and self._links.tag(repository, tag) == digest:
                message = f"{repository}:{tag}: the tag points to {digest}, which is not a manifest of the repository"
                self.record("missing", message + remedy, repository, digest)
            self._report()

    def _mend_tag(self, repository: str, tag: str) -> Digest | None:
        """Point a torn tag to its manifest again, if it has had one only. Return that."""
        with self._lock(repository):
            digest = self._links.only_target(repository, tag)
            if digest is None or not self._contents.exists(digest):
                return None
            if self._links.tag(repository, tag) is None:
                self._writer.set_tag(repository, tag, digest)
            return digest

    def _report(self) -> None:
        self._progress.report("repositories", self.counts["repositories"], None)
