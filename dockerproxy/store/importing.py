"""Taking over another registry's directory: `registry:2`'s, or one like ours.

Contents are verified by their digests on their way, and are hard-linked where they lie on our file system and are our
user's, else copied. Then come the links and, last, the tags: what a tag means is whole when it gets there. What is here
already stays, so that an import can be made again, and goes on where it was broken off.
"""

from __future__ import annotations

import os
import secrets
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from attrs import define, field, frozen

from dockerproxy.concurrency import in_thread
from dockerproxy.errors import ManifestInvalid, NameInvalid
from dockerproxy.oci.manifests import MAX_MANIFEST, media_type_of
from dockerproxy.oci.names import Digest, parse_repository
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.files import read_small, write_all
from dockerproxy.store.hosting import HostedStore
from dockerproxy.store.layout import Layout
from dockerproxy.store.links import Links
from dockerproxy.store.slices import Slices, Watch

_PIECE = 1024 * 1024


class NoRegistry(Exception):
    """A sentence about a directory that cannot be imported."""


@frozen
class Untaken:
    """Something that was not taken over, and a sentence about it.

    `kind` is ``damaged`` or ``missing`` (a content), ``invalid`` (a name, a manifest), ``unreadable`` (the disk's
    trouble), or ``conflict`` (a tag that means something else here).
    """

    kind: str
    what: str


@frozen
class Imported:
    """What was taken over: of the contents some were `hardlinked` and some `copied` (`bytes`: of both), and some were
    `present`. `conflicts` are among the `untaken`."""

    repositories: int = 0
    hardlinked: int = 0
    copied: int = 0
    present: int = 0
    bytes: int = 0
    manifests: int = 0
    tags: int = 0
    conflicts: int = 0
    untaken: int = 0


def source_in(directory: Path) -> Layout:
    """Return the tree in `directory`: a registry's root, or the ``v2`` directory within. Blocks; raise `NoRegistry`."""
    candidates = [directory]
    if directory.parts[-3:] == ("docker", "registry", "v2"):
        candidates.append(directory.parents[2])
    for root in candidates:
        layout = Layout(root)
        try:
            if os.listdir(layout.repositories) and os.listdir(layout.blobs):
                return layout
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise NoRegistry(f"{error.filename} cannot be read: {error.strerror}") from None
    raise NoRegistry(f"{directory} is no registry's directory: there is no docker/registry/v2 in it")


@define
class Importer:
    """Imports into `store`."""

    _reactor: Any
    _store: HostedStore
    _slices: Slices = field(kw_only=True)

    @_slices.default
    def _make_slices(self) -> Slices:
        return Slices(self._reactor, length=0.05)

    async def take(self, directory: Path, *, force: bool = False, watch: Watch[Untaken] | None = None) -> Imported:
        """Import `directory`. Tags that mean something else here are left alone unless `force`.

        `watch` is told of bytes, and then of manifests. It may be cancelled, and made again. Raise `NoRegistry`,
        OSError.
        """
        source = await in_thread(self._reactor, source_in, directory)
        if await in_thread(self._reactor, _same, source.root, self._store.layout.root):
            raise NoRegistry(f"{directory} is this registry's own directory")
        watch = watch or Watch()
        run = _Run(source, self._store, force, watch)
        bytes_told = watch.of("contents", lambda: run.looked_at, lambda: run.total)
        manifests_told = watch.of("manifests", lambda: run.counts["manifests"])
        await self._slices.run(run.survey(), run.note, after_slice=bytes_told)
        await self._slices.run(run.contents(), run.note, after_slice=bytes_told)
        for repository in run.repositories:
            await self._slices.run(run.layers(repository), run.note, after_slice=manifests_told)
            turn = partial(self._store.turns.hold, repository)
            await self._slices.run(run.manifests(repository), run.note, after_slice=manifests_told, turn=turn)
            await self._slices.run(run.tags(repository), run.note, after_slice=manifests_told, turn=turn)
        # Once for all: two or three times for each link would take longer than the rest.
        await in_thread(self._reactor, os.sync)
        return Imported(repositories=len(run.repositories), **run.counts)


@define
class _Run:
    _source: Layout
    _store: HostedStore
    _force: bool
    _watch: Watch[Untaken]
    repositories: list[str] = field(factory=list, init=False)
    counts: Counter[str] = field(factory=Counter, init=False)
    _wanted: dict[str, int] = field(factory=dict, init=False)  # digests as text (as `survey.Text`), and lengths
    total: int | None = field(default=None, init=False)  # bytes, once they are known
    looked_at: int = field(default=0, init=False)
    _links: Links = field(init=False)
    _our_blobs: Blobs = field(init=False)
    _our_links: Links = field(init=False)

    @_links.default
    def _make_links(self) -> Links:
        return Links(self._source, durable=False)

    # What is written here is synced at the end.

    @_our_blobs.default
    def _make_our_blobs(self) -> Blobs:
        return Blobs(self._store.layout, durable=False)

    @_our_links.default
    def _make_our_links(self) -> Links:
        return Links(self._store.layout, durable=False)

    def note(self, untaken: Untaken) -> None:
        """Count something that was not taken, and tell of it."""
        self.counts.update(untaken=1, conflicts=untaken.kind == "conflict")
        self._watch.found(untaken)

    # in a thread

    def survey(self) -> Iterator[Untaken | None]:
        """Find the repositories, and the contents that these have."""
        total = 0
        for repository in self._links.repositories():
            try:
                parse_repository(repository)
            except NameInvalid as error:
                yield Untaken("invalid", error.message)
                continue
            self.repositories.append(repository)
            for links in (self._links.layers, self._links.manifests):
                for digest in links(repository):
                    if str(digest) not in self._wanted:
                        with suppress(FileNotFoundError, NotADirectoryError):
                            size = self._wanted[str(digest)] = os.stat(self._source.blob(digest)).st_size
                            total += size
                    yield None
        self.total = total

    def contents(self) -> Iterator[Untaken | None]:
        """Bring the contents, up to a piece of one a step."""
        for text, size in self._wanted.items():
            digest = Digest.parse(text)
            if self._our_blobs.touch(digest) == size:
                self.counts.update(present=1)
                self.looked_at += size
                yield None
                continue
            try:
                yield from self._bring(digest)
            except _SourceError as error:
                yield Untaken("unreadable", f"{digest} cannot be read: {error}")

    def layers(self, repository: str) -> Iterator[Untaken | None]:
        """Link the repository's blobs."""
        for digest in self._links.layers(repository):
            if not self._links.has_layer(repository, digest):
                yield None
            elif self._our_blobs.exists(digest):
                self._our_links.link_layer(repository, digest)
                yield None
            else:
                yield Untaken("missing", f"{repository}: the blob {digest} is missing")

    def manifests(self, repository: str) -> Iterator[Untaken | None]:
        """Link the repository's manifests."""
        for digest in self._links.manifests(repository):
            if not self._links.has_manifest(repository, digest):
                yield None
                continue
            content = read_small(self._our_path(digest), MAX_MANIFEST + 1)
            if content is None:
                yield Untaken("missing", f"{repository}: the manifest {digest} is missing")
                continue
            try:
                media_type = self._links.manifest_media_type(repository, digest) or media_type_of(content)
            except ManifestInvalid as error:
                yield Untaken("invalid", f"{repository}: {digest} is not a manifest ({error.message})")
                continue
            if not self._our_links.has_manifest(repository, digest):
                self._our_links.link_manifest(repository, digest, media_type)
                self.counts.update(manifests=1)
            yield None

    def tags(self, repository: str) -> Iterator[Untaken | None]:
        """Set the repository's tags."""
        for tag, digest in self._links.each_tag(repository):
            ours = self._our_links.tag(repository, tag)
            if digest is None or not self._our_links.has_manifest(repository, digest):
                yield Untaken("missing", f"{repository}:{tag}: what the tag means is missing")
            elif ours is not None and ours != digest and not self._force:
                yield Untaken("conflict", f"{repository}:{tag} means {ours} here, and {digest} there")
            elif ours != digest:
                self._our_links.set_tag(repository, tag, digest)
                self.counts.update(tags=1)
            yield None

    def _our_path(self, digest: Digest) -> str:
        return self._store.layout.blob(digest)

    def _bring(self, digest: Digest) -> Iterator[Untaken | None]:
        os.makedirs(self._store.layout.staging, exist_ok=True)
        staged = f"{self._store.layout.staging}/{secrets.token_hex(8)}"
        source = _open(self._source.blob(digest))
        copy = -1
        try:
            if not (linked := _link(source, self._source.blob(digest), staged)):
                copy = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            hasher, size = digest.hasher(), 0
            while piece := _read(source):
                hasher.update(piece)
                if not linked:
                    write_all(copy, [piece], size)
                size += len(piece)
                self.looked_at += len(piece)
                yield None
            if hasher.hexdigest() != digest.hex:
                yield Untaken("damaged", f"{digest} is damaged")
                return
            self._our_blobs.publish(staged, digest)
            self.counts.update(hardlinked=linked, copied=not linked, bytes=size)
        finally:
            os.close(source)
            if copy >= 0:
                os.close(copy)
            with suppress(FileNotFoundError):
                os.unlink(staged)


class _SourceError(Exception):
    """What the disk said of a file that was to be imported."""


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise _SourceError(error.strerror) from None


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, _PIECE)
    except OSError as error:
        raise _SourceError(error.strerror) from None


def _link(fd: int, path: str, staged: str) -> bool:
    """Link the file that is open to `staged`, and say whether that could be."""
    status = os.fstat(fd)
    # What another user owns, that user may write to and we may not date (`Removal`).
    if status.st_uid != os.geteuid():
        return False
    try:
        os.link(path, staged)
    except OSError:  # another file system; too many links; none allowed
        return False
    if os.path.samestat(status, os.stat(staged)):
        return True
    os.unlink(staged)
    return False


def _same(one: Path, other: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samefile(one, other)
    return False
