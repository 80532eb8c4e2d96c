"""Links: small files that contain a digest. They record the blobs, manifests and tags of each repository.

A link that a power cut left empty or torn counts as absent for clients. Import, check and gc tell the two apart.

A private link has a newline after its digest. The cache makes one for content that upstream sent to a client with a
credential. If upstream has also sent it to a client without one, the link is public, as all links of the hosted
registry are. CNCF distribution reads only public links.
"""

from __future__ import annotations

import os
import stat
from bisect import bisect_right
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import suppress
from enum import Enum
from itertools import islice

from attrs import define, field, frozen

from dockerproxy.errors import DigestInvalid, NameInvalid
from dockerproxy.oci.names import Digest, parse_tag
from dockerproxy.oci.paging import sort_key
from dockerproxy.store.files import Staging, try_remove
from dockerproxy.store.layout import Layout, digest_from_names
from dockerproxy.store.tree_reader import Missing, TreeReader, UnsafeFile

# The longest link contains a sha512 digest. A media type has at most 255 characters (RFC 6838, section 4.2: 127 + 1 +
# 127); longer content is invalid.
_LINK_LIMIT = 256
_MEDIA_TYPE_LIMIT = 255

_CONTENT_DIRECTORIES = ("_layers", "_manifests")
_USE_INTERVAL = 86400  # seconds between two updates of the time of a link's last use


class Visibility(Enum):
    """The clients that a link counts for."""

    PRIVATE = "clients with access of their own"
    PUBLIC = "clients without a credential as well"


class LinkState(Enum):
    """The state of a link, for code that mends it."""

    ABSENT = "there is no link: it was never written, or removed"
    TORN = "a crash left it without its digest"
    WHOLE = "the repository has what it leads to"


@frozen(slots=True)
class LinkEntry:
    """A link, or a tag: its directory, its digest (None if torn), and its last use (POSIX time)."""

    directory: str
    digest: Digest | None
    last_used: float


@define
class Links:
    """The links of a store. If `durable`, changes survive a power cut. Methods that write block.

    Callers build `repository` from validated parts. Every method raises `NameInvalid` for an invalid name.

    If `clock`, which returns POSIX time, is given, the mtime of a link is its last use, at most a day late. `on_create`
    is called after each new file or directory. `reader` reads the tree.
    """

    _layout: Layout
    _durable: bool
    _clock: Callable[[], float] | None = None
    _on_create: Callable[[], object] | None = None
    _reader: TreeReader = field(factory=TreeReader)
    _staging: Staging = field(init=False)

    @_staging.default
    def _make_staging(self) -> Staging:
        return Staging(
            self._layout.staging, sync_data=self._durable, sync_names=self._durable, on_create=self._on_create
        )

    def has_layer(self, repository: str, digest: Digest) -> bool:
        """Return whether the repository has the blob."""
        return self.layer_visibility(repository, digest) is not None

    def layer_visibility(self, repository: str, digest: Digest) -> Visibility | None:
        """Return for whom the repository has the blob; None if it does not have it."""
        return self._use_link(self._layout.layer(repository, digest), digest)

    def link_layer(self, repository: str, digest: Digest, visibility: Visibility = Visibility.PUBLIC) -> None:
        """Link the blob to the repository. A public link stays public."""
        self._link(self._layout.layer(repository, digest), digest, visibility)

    def unlink_layer(self, repository: str, digest: Digest) -> bool:
        """Unlink the blob from the repository. Return whether it was linked."""
        return self._staging.remove_tree(os.path.dirname(self._layout.layer(repository, digest)))

    def has_manifest(self, repository: str, digest: Digest) -> bool:
        """Return whether the repository has the manifest."""
        return self.manifest_visibility(repository, digest) is not None

    def manifest_visibility(self, repository: str, digest: Digest) -> Visibility | None:
        """Return for whom the repository has the manifest; None if it does not have it."""
        return self._use_link(self._layout.manifest(repository, digest), digest)

    def link_manifest(
        self, repository: str, digest: Digest, media_type: str, visibility: Visibility = Visibility.PUBLIC
    ) -> None:
        """Link the manifest to the repository. A public link stays public.

        `media_type` is the type stated by upstream or by the pushing client.
        """
        # Write the type first, so that every link has one.
        if self.manifest_media_type(repository, digest) != media_type:
            self._staging.write(media_type.encode(), self._layout.media_type(repository, digest))
        self._link(self._layout.manifest(repository, digest), digest, visibility)
        # distribution's catalog, and thus the mark phase of its garbage collector, recognizes a repository by its
        # `_layers` (catalog.go, handleRepository). It would sweep the manifests of a repository without that directory.
        self._staging.makedirs(self._layout.layers(repository))

    def manifest_time(self, repository: str, digest: Digest) -> int | None:
        """Return when the manifest was linked, in POSIX nanoseconds. Return None if the repository does not have it."""
        try:
            status = self._reader.stat(self._layout.manifest(repository, digest))
        except (*Missing, UnsafeFile):
            return None
        return max(0, status.st_mtime_ns) if status.st_size and stat.S_ISREG(status.st_mode) else None

    def set_manifest_time(self, repository: str, digest: Digest, time: int) -> None:
        """Set when the manifest was linked, as `manifest_time` returns it."""
        os.utime(self._layout.manifest(repository, digest), ns=(time, time))

    def mend_manifest(self, repository: str, digest: Digest) -> None:
        """Write the link to the manifest again."""
        self._link(self._layout.manifest(repository, digest), digest)

    def unlink_manifest(self, repository: str, digest: Digest) -> bool:
        """Unlink the manifest from the repository. Return whether it was linked. The caller removes its tags."""
        return self._staging.remove_tree(os.path.dirname(self._layout.manifest(repository, digest)))

    def manifest_media_type(self, repository: str, digest: Digest) -> str | None:
        """Return the manifest's media type, or None if it is not known (a tree that another registry wrote)."""
        content = self._reader.read_small(self._layout.media_type(repository, digest), _MEDIA_TYPE_LIMIT + 1)
        # The media type is sent in a header field, so reject the characters that a torn or foreign file may contain.
        if not content or len(content) > _MEDIA_TYPE_LIMIT or not content.isascii():
            return None
        text = content.decode("ascii")
        return text if text.isprintable() else None

    def tag(self, repository: str, tag: str) -> Digest | None:
        """Return the digest of the tag's manifest, or None if there is no such tag."""
        return _read_link(self._reader, self._layout.tag_current(repository, tag))

    def has_tag(self, repository: str, tag: str) -> bool:
        """Return whether the tag exists, even with a torn link."""
        try:
            return stat.S_ISREG(self._reader.stat(self._layout.tag_current(repository, tag)).st_mode)
        except (*Missing, UnsafeFile):
            return False

    def former_targets(self, repository: str, tag: str) -> list[Digest]:
        """Return all manifests that the tag has had, including the current one, in no order. Blocks."""
        return list(_iter_digests(self._reader, f"{self._layout.tag(repository, tag)}/index"))

    def only_target(self, repository: str, tag: str) -> Digest | None:
        """Return the only manifest that the tag has had, if the repository has it. Return None otherwise. Blocks."""
        targets = self.former_targets(repository, tag)
        return targets[0] if len(targets) == 1 and self.has_manifest(repository, targets[0]) else None

    def layer_state(self, repository: str, digest: Digest) -> LinkState:
        """Return the state of the link to a blob."""
        return self._state(self._layout.layer(repository, digest), digest)

    def manifest_state(self, repository: str, digest: Digest) -> LinkState:
        """Return the state of the link to a manifest."""
        return self._state(self._layout.manifest(repository, digest), digest)

    def _state(self, path: str, digest: Digest) -> LinkState:
        content = self._reader.read_small(path, _LINK_LIMIT)
        if content is None:
            return LinkState.ABSENT
        return LinkState.WHOLE if _parse_link(content) == digest else LinkState.TORN

    def set_tag(self, repository: str, tag: str, digest: Digest) -> None:
        """Point the tag to the manifest `digest`."""
        # Same order as distribution (tagstore.go, Tag): the current manifest is always in the index.
        self._link(self._layout.tag_index(repository, tag, digest), digest)
        self._link(self._layout.tag_current(repository, tag), digest)

    def remove_tag(self, repository: str, tag: str) -> bool:
        """Remove the tag, but not its manifest. Return whether the tag existed, even with a torn link."""
        existed = self.has_tag(repository, tag)
        return self._staging.remove_tree(self._layout.tag(repository, tag)) and existed

    def mark_orphaned(self, repository: str, tag: str) -> None:
        """Record that the repository had a manifest, and that the name of the tag is derived from its digest."""
        self._staging.write(b"-", self._layout.orphaned_tag(repository, tag))

    def is_orphaned(self, repository: str, tag: str) -> bool:
        """Return whether `mark_orphaned` was called for the tag."""
        return _link_exists(self._reader, self._layout.orphaned_tag(repository, tag))

    def targets(self, repository: str, tags: Iterable[str]) -> Iterator[tuple[str, Digest | None]]:
        """Yield each of `tags` with its manifest, None if it has none, in their order. Blocks."""

        def read(tag: str) -> tuple[str, Digest | None]:
            return tag, self.tag(repository, tag)

        return self._reader.map(read, tags)

    def tags(self, repository: str) -> list[str]:
        """Return the repository's tags, sorted. Blocks."""
        names = self._reader.list_names(self._layout.tags(repository))
        return sorted(
            tag
            for tag in names
            if _is_tag(tag) and _link_exists(self._reader, self._layout.tag_current(repository, tag))
        )

    def tags_after(self, repository: str, after: str | None) -> Iterator[str]:
        """Yield the repository's tags behind `after` (None: all) in the order of `sort_key`. Blocks.

        Only the tags that are taken cost more than a directory entry.
        """
        names = sorted(filter(_is_tag, self._reader.list_names(self._layout.tags(repository))), key=sort_key)
        start = 0 if after is None else bisect_right(names, sort_key(after), key=sort_key)
        for tag in islice(names, start, None):
            if _link_exists(self._reader, self._layout.tag_current(repository, tag)):
                yield tag

    def iter_tags(self, repository: str) -> Iterator[tuple[str, Digest | None]]:
        """Yield the repository's tags, in no order, each with its manifest (None if the link is torn). Blocks."""

        def read(tag: str) -> tuple[str, bytes | None]:
            return tag, self._reader.read_small(self._layout.tag_current(repository, tag), _LINK_LIMIT)

        tags = filter(_is_tag, self._reader.list_names(self._layout.tags(repository)))
        for tag, content in self._reader.map(read, tags):
            if content is not None:
                yield tag, _parse_link(content)

    def layers(self, repository: str) -> Iterator[Digest]:
        """Yield the blobs to which the repository has a link, even a torn one, in no order. Blocks."""
        yield from _iter_digests(self._reader, self._layout.layers(repository))

    def manifests(self, repository: str) -> Iterator[Digest]:
        """Yield the manifests to which the repository has a link, even a torn one, in no order. Blocks."""
        yield from _iter_digests(self._reader, self._layout.revisions(repository))

    def layer_entries(self, repository: str) -> Iterator[LinkEntry]:
        """Yield the links of `layers`. Blocks."""
        yield from _iter_entries(self._reader, self._layout.layers(repository))

    def manifest_entries(self, repository: str) -> Iterator[LinkEntry]:
        """Yield the links of `manifests`. Blocks."""
        yield from _iter_entries(self._reader, self._layout.revisions(repository))

    def tag_entries(self, repository: str) -> Iterator[LinkEntry]:
        """Yield the tags, in no order. A tag is used with its manifest. Blocks."""
        for tag in filter(_is_tag, self._reader.list_names(self._layout.tags(repository))):
            digest = self.tag(repository, tag)
            last_used = _mtime(
                self._reader, self._layout.tag_current(repository, tag), self._layout.tag(repository, tag)
            )
            if digest is not None:
                last_used = max(last_used, _mtime(self._reader, self._layout.manifest(repository, digest)))
            yield LinkEntry(self._layout.tag(repository, tag), digest, last_used)

    def discard(self, entry: LinkEntry, is_needed: Callable[[], bool]) -> bool:
        """Remove a link or tag, unless `is_needed` is true once nobody sees it any more. Return whether it is removed.

        Code that needs a link first creates what it leads to, and then creates the link if it does not exist. One of
        the two therefore notices the other.
        """
        staged_path = self._staging.move_aside(entry.directory)
        if staged_path is None:
            return False
        needed = is_needed()
        if needed:
            with suppress(OSError):  # it was created again in the meantime
                self._staging.move(staged_path, entry.directory)
        try_remove(staged_path)
        return not needed

    def prune_tag_index(self, repository: str, digests: Container[str]) -> Iterator[None]:
        """Remove the former manifests in `digests` from the index of every tag. Each step blocks briefly."""
        for tag in filter(_is_tag, self._reader.list_names(self._layout.tags(repository))):
            for digest in _iter_digests(self._reader, f"{self._layout.tag(repository, tag)}/index"):
                if str(digest) in digests and self.tag(repository, tag) != digest:
                    self._staging.remove_tree(os.path.dirname(self._layout.tag_index(repository, tag, digest)))
                yield None

    def prune(self, repository: str) -> Iterator[None]:
        """Remove the empty directories of the repository, and its own directory if nothing is left.

        Each step blocks briefly. A concurrent writer recreates the directories it needs (`Staging.move`).
        """
        directory = self._layout.repository(repository)
        revisions, tags = self._layout.revisions(repository), self._layout.tags(repository)
        layers, referrers = self._layout.layers(repository), f"{directory}/_referrers"
        for parent in (revisions, tags, layers):
            yield from _remove_empty_children(self._reader, parent)
        if any(self._reader.list_names(parent) for parent in (revisions, tags, layers)):
            return
        for algorithm in self._reader.list_names(referrers):
            yield from _remove_empty_children(self._reader, f"{referrers}/{algorithm}")
            _rmdir_if_empty(f"{referrers}/{algorithm}")
        for candidate in (
            revisions,
            tags,
            f"{directory}/_manifests",
            layers,
            referrers,
            self._layout.foreign_uploads(repository),
        ):
            _rmdir_if_empty(candidate)
        if self._reader.list_names(revisions):
            self._staging.makedirs(layers)
        remove_empty_directories(self._layout, directory)

    def repositories(self) -> Iterator[str]:
        """Yield the repositories that have, or had, a blob or manifest, in no order. Blocks."""
        listed = self._reader.list_repositories()
        return iter_repositories(self._layout, *_CONTENT_DIRECTORIES, reader=self._reader) if listed is None else listed

    def has_repository(self, repository: str) -> bool:
        """Return whether the repository has, or had, a blob or manifest."""
        return _has_any(self._reader, self._layout, repository, _CONTENT_DIRECTORIES)

    def repositories_after(self, after: str | None) -> Iterator[str]:
        """Yield the repositories behind `after` (None: all), like `repositories`, but in order. Blocks.

        The order compares component by component. Directories that are entirely before `after` are not read.
        """
        # Each entry has the components of `after` that are still to be passed below it, and whether it is behind it.
        pending: list[tuple[str, list[str], bool]] = [("", [] if after is None else after.split("/"), False)]
        while pending:
            parent, passing, is_behind = pending.pop()
            if is_behind and self.has_repository(parent):
                yield parent
            for name in sorted(self._reader.list_names(f"{self._layout.repositories}/{parent}"), reverse=True):
                repository = f"{parent}/{name}" if parent else name
                if (not passing or name >= passing[0]) and _is_repository(self._layout, repository):
                    on_path = bool(passing) and name == passing[0]
                    pending.append((repository, passing[1:] if on_path else [], not on_path))

    def _use_link(self, path: str, digest: Digest) -> Visibility | None:
        """Return the visibility of the link, None if it does not exist, and record its use."""
        try:
            status = self._reader.stat(path)
        except (*Missing, UnsafeFile):
            return None
        if not stat.S_ISREG(status.st_mode):
            return None
        if self._clock is not None:
            now = self._clock()
            if not 0 <= now - status.st_mtime < _USE_INTERVAL:
                with suppress(OSError):
                    os.utime(path, (now, now))
        if status.st_size == len(str(digest)):
            return Visibility.PUBLIC
        return Visibility.PRIVATE if status.st_size else None

    def _link(self, path: str, digest: Digest, visibility: Visibility = Visibility.PUBLIC) -> None:
        content = self._reader.read_small(path, _LINK_LIMIT) or b""
        public_content = str(digest).encode()
        if content == public_content or (visibility is Visibility.PRIVATE and _parse_link(content) == digest):
            return
        self._staging.write(public_content + (b"\n" if visibility is Visibility.PRIVATE else b""), path)


def iter_repositories(layout: Layout, *subdirectories: str, reader: TreeReader | None = None) -> Iterator[str]:
    """Yield the repositories that contain one of these directories, in no order. Blocks."""
    reader = reader or TreeReader()
    pending = [""]
    while pending:
        parent = pending.pop()
        for name in reader.list_names(f"{layout.repositories}/{parent}"):
            # `_uploads` and other foreign names are not valid repository names.
            repository = f"{parent}/{name}" if parent else name
            if _is_repository(layout, repository):
                pending.append(repository)
                if _has_any(reader, layout, repository, subdirectories):
                    yield repository


def _is_repository(layout: Layout, name: str) -> bool:
    try:
        layout.repository(name)
    except NameInvalid:
        return False
    return True


def _has_any(reader: TreeReader, layout: Layout, repository: str, subdirectories: Iterable[str]) -> bool:
    directory = layout.repository(repository)
    return any(reader.is_directory(f"{directory}/{subdirectory}") for subdirectory in subdirectories)


def remove_empty_directories(layout: Layout, directory: str) -> None:
    """Remove `directory` if it is empty, and then its empty parents, up to the repositories' directory. Blocks."""
    while directory != layout.repositories and _rmdir_if_empty(directory):
        directory = os.path.dirname(directory)


def _link_exists(reader: TreeReader, path: str) -> bool:
    # The path determines the content, so one stat tells a good link from one that a power cut left empty.
    try:
        return reader.stat(path).st_size > 0
    except (*Missing, UnsafeFile):
        return False


def _read_link(reader: TreeReader, path: str) -> Digest | None:
    return _parse_link(reader.read_small(path, _LINK_LIMIT) or b"")


def _parse_link(content: bytes) -> Digest | None:
    try:
        return Digest.parse(content.decode("ascii").strip())
    except (DigestInvalid, UnicodeDecodeError):
        return None


def _is_tag(name: str) -> bool:
    try:
        parse_tag(name)
    except NameInvalid:
        return False
    return True


def _iter_digests(reader: TreeReader, directory: str) -> Iterator[Digest]:
    """Yield the digests that the entries ``ALG/HEX`` below a directory stand for."""
    for algorithm in reader.list_names(directory):
        for encoded in reader.list_names(f"{directory}/{algorithm}"):
            digest = digest_from_names(algorithm, encoded)
            if digest is not None:
                yield digest


def _iter_entries(reader: TreeReader, directory: str) -> Iterator[LinkEntry]:
    for digest in _iter_digests(reader, directory):
        path = f"{directory}/{digest.algorithm}/{digest.hex}"
        yield LinkEntry(path, digest, _mtime(reader, f"{path}/link", path))


def _mtime(reader: TreeReader, *paths: str) -> float:
    """Return the mtime of the first path that exists; 0 if none does."""
    for path in paths:
        with suppress(*Missing, UnsafeFile):
            return reader.stat(path).st_mtime
    return 0.0


def _remove_empty_children(reader: TreeReader, directory: str) -> Iterator[None]:
    for name in reader.list_names(directory):
        _rmdir_if_empty(f"{directory}/{name}")
        yield None


def _rmdir_if_empty(directory: str) -> bool:
    try:
        os.rmdir(directory)
    except OSError:
        return False
    return True
