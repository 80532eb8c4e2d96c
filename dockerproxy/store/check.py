"""Whether a store is whole: every content by its digest, every link by what it leads to.

Content that is not what its name says is set aside, in ROOT/damaged, so that nobody is served it and a push brings it
anew. Nothing else is changed, and nothing is removed: what to do about a link that leads nowhere is for people.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

from attrs import define, field, frozen

from dockerproxy.errors import ManifestInvalid
from dockerproxy.oci.manifests import KNOWN_TYPES, MAX_MANIFEST, is_elsewhere, parse_manifest
from dockerproxy.oci.names import Digest
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.files import read_small
from dockerproxy.store.layout import Layout
from dockerproxy.store.links import Links
from dockerproxy.store.slices import Slices, Watch

_PIECE = 1024 * 1024
_LINK_LIMIT = 256

_Identity = tuple[int, int, int]


@frozen
class Finding:
    """Something wrong. `kind` is ``damaged`` (a content, set aside), ``unreadable`` (the disk's trouble), ``torn`` (a
    link), ``missing`` (what something leads to) or ``invalid`` (a manifest); `what` is a sentence about it."""

    kind: str
    what: str
    repository: str | None = None
    digest: Digest | None = None


@frozen
class Checked:
    """How much was looked at, and how much was found wrong; `bytes` of content."""

    blobs: int = 0
    bytes: int = 0
    repositories: int = 0
    links: int = 0
    tags: int = 0
    damaged: int = 0
    findings: int = 0


@define
class Checker:
    """Checks what is below `layout`. `links`: its repositories too, which in a cache may well lack what was evicted."""

    _reactor: Any
    _layout: Layout
    _check_links: bool = True
    # Hashing lets go of the interpreter, so longer slices do no harm.
    _slices: Slices = field(kw_only=True)

    @_slices.default
    def _make_slices(self) -> Slices:
        return Slices(self._reactor, length=0.05)

    async def check(self, watch: Watch[Finding] | None = None) -> Checked:
        """Check everything. `watch` is told of bytes and then of repositories. It may be cancelled."""
        watch = watch or Watch()
        run = _Run(self._layout, watch)
        told = watch.of("contents", lambda: run.counts["bytes"], lambda: run.total)
        await self._slices.run(run.contents(), run.note, after_slice=told)
        if self._check_links:
            told = watch.of("repositories", lambda: run.counts["repositories"])
            await self._slices.run(run.repositories(), run.note, after_slice=told)
        return Checked(**run.counts)


@define
class _Run:
    _layout: Layout
    _watch: Watch[Finding]
    counts: Counter[str] = field(factory=Counter, init=False)
    total: int | None = field(default=None, init=False)  # bytes, once they are known
    _blobs: Blobs = field(init=False)
    _links: Links = field(init=False)

    @_blobs.default
    def _make_blobs(self) -> Blobs:
        return Blobs(self._layout, durable=False)

    @_links.default
    def _make_links(self) -> Links:
        return Links(self._layout, durable=False)

    def note(self, finding: Finding) -> None:
        """Count a finding, and tell of it."""
        self.counts.update(findings=1, damaged=finding.kind == "damaged")
        self._watch.found(finding)

    # in a thread: contents

    def contents(self) -> Iterator[Finding | None]:
        """Check every content, up to a piece of it a step."""
        total = 0
        for entry in self._blobs.walk():
            total += entry.size
            yield None
        self.total = total
        # Once more, rather than with a list of all of them.
        for entry in self._blobs.walk():
            try:
                yield from self._content(entry.digest)
            except (FileNotFoundError, NotADirectoryError):
                continue  # it was removed meanwhile
            except OSError as error:
                what = f"{entry.digest} cannot be read: {error.strerror}"
                yield Finding("unreadable", what, digest=entry.digest)
            self.counts.update(blobs=1)

    def _content(self, digest: Digest) -> Iterator[Finding | None]:
        hasher, path = digest.hasher(), self._layout.blob(digest)
        with open(path, "rb", buffering=0) as file:
            identity = _identity(os.fstat(file.fileno()))
            while piece := file.read(_PIECE):
                hasher.update(piece)
                self.counts.update(bytes=len(piece))
                yield None
        if hasher.hexdigest() != digest.hex and self._set_aside(digest, identity):
            yield Finding("damaged", f"{digest} was damaged, and is set aside", digest=digest)

    def _set_aside(self, digest: Digest, identity: _Identity) -> bool:
        """Move a content away, unless a whole one took the place of what was read."""
        os.makedirs(self._layout.damaged, exist_ok=True)
        aside, number = f"{self._layout.damaged}/{digest.algorithm}-{digest.hex}", 0
        while os.path.exists(aside):
            number += 1
            aside = f"{self._layout.damaged}/{digest.algorithm}-{digest.hex}.{number}"
        path = self._layout.blob(digest)
        os.rename(path, aside)
        if _identity(os.stat(aside)) == identity:
            return True
        os.rename(aside, path)
        return False

    # in a thread: what leads to them

    def repositories(self) -> Iterator[Finding | None]:
        """Check the repositories, a link a step."""
        for repository in self._links.repositories():
            for layer in self._links.layers(repository):
                yield self._link(repository, layer, self._layout.layer(repository, layer), "blob")
            for digest in self._links.manifests(repository):
                found = self._link(repository, digest, self._layout.manifest(repository, digest), "manifest")
                yield found
                if found is None:
                    yield from self._manifest(repository, digest)
            yield from self._tags(repository)
            self.counts.update(repositories=1)

    def _link(self, repository: str, digest: Digest, path: str, kind: str) -> Finding | None:
        self.counts.update(links=1)
        content = read_small(path, _LINK_LIMIT)
        if content is None or content.strip() != str(digest).encode():
            # Not there: it is being written, or was removed, or a crash came between the two halves of that.
            what = f"{repository}: the link to the {kind} {digest} is torn"
            return Finding("torn", what, repository, digest) if content is not None else None
        if self._blobs.exists(digest) or not os.path.exists(path):
            return None
        return Finding("missing", f"{repository}: the {kind} {digest} is missing", repository, digest)

    def _manifest(self, repository: str, digest: Digest) -> Iterator[Finding | None]:
        content = read_small(self._layout.blob(digest), MAX_MANIFEST + 1)
        if content is None:
            return
        media_type = self._links.manifest_media_type(repository, digest)
        try:
            manifest = parse_manifest(content, media_type)
        except ManifestInvalid as error:
            if media_type is not None and media_type.lower() not in KNOWN_TYPES:
                return  # whatever it is, it was pushed as that
            what = f"{repository}: the manifest {digest} is not understood ({error.message})"
            yield Finding("invalid", what, repository, digest)
            return
        layers = manifest.layers if manifest.config is None else (manifest.config, *manifest.layers)
        for blob in layers:
            lacking = not self._has(repository, blob.digest) and not is_elsewhere(blob.media_type)
            yield self._lack(repository, digest, blob.digest) if lacking else None
        for child in manifest.manifests:
            linked = self._links.has_manifest(repository, child.digest) and self._blobs.exists(child.digest)
            if not linked and not self._has(repository, child.digest):
                yield self._lack(repository, digest, child.digest)
            yield None

    def _has(self, repository: str, blob: Digest) -> bool:
        return self._links.has_layer(repository, blob) and self._blobs.exists(blob)

    def _lack(self, repository: str, digest: Digest, lacking: Digest) -> Finding | None:
        if not self._links.has_manifest(repository, digest):
            return None  # it was removed meanwhile
        return Finding("missing", f"{repository}: the manifest {digest} lacks {lacking}", repository, digest)

    def _tags(self, repository: str) -> Iterator[Finding | None]:
        for tag, digest in self._links.each_tag(repository):
            self.counts.update(tags=1)
            if digest is None:
                yield Finding("torn", f"{repository}:{tag}: the tag's link is torn", repository)
            elif not self._links.has_manifest(repository, digest) and self._links.tag(repository, tag) == digest:
                what = f"{repository}:{tag}: the tag means {digest}, which is no manifest there"
                yield Finding("missing", what, repository, digest)
            yield None


def _identity(status: os.stat_result) -> _Identity:
    # Whoever reads a content dates it (`Blobs.open`), so neither mtime nor ctime can be part of this.
    return status.st_dev, status.st_ino, status.st_size
