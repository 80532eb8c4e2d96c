"""Import of another registry's directory: one of `registry:2`, or one of this daemon.

Blobs are verified by their digests. They are hard-linked if they are on our file system and belong to our user, and
copied otherwise. Links follow, and tags come last, so that a tag always points to a complete image. Existing objects
stay, so an import can be repeated, and a repeated one continues an interrupted one.
"""

from __future__ import annotations

import os
import secrets
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from attrs import define, field, frozen

from dockerproxy.errors import ManifestInvalid, NameInvalid
from dockerproxy.oci.manifests import MAX_MANIFEST, media_type_of
from dockerproxy.oci.names import Digest, parse_repository
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.files import read_small, write_all
from dockerproxy.store.layout import Layout
from dockerproxy.store.links import Links
from dockerproxy.store.progress import Progress, RepositoryLock, locked_slices, no_lock

_CHUNK_SIZE = 1024 * 1024


class NotARegistry(Exception):
    """The directory cannot be imported; the message is for the user."""


@frozen
class Skipped:
    """An item that was not imported, and a message for the user.

    `kind` is ``damaged`` or ``missing`` (a blob or manifest), ``invalid`` (a name or a manifest), ``unreadable`` (an
    I/O error), or ``conflict`` (a tag that points to another manifest here).
    """

    kind: str
    message: str


@frozen
class ImportResult:
    """Numbers of imported objects. Blobs were `hardlinked` or `copied` (`bytes` counts both), or already `present`.

    `untaken` counts the skipped items, including the `conflicts`.
    """

    repositories: int = 0
    hardlinked: int = 0
    copied: int = 0
    present: int = 0
    bytes: int = 0
    manifests: int = 0
    tags: int = 0
    conflicts: int = 0
    untaken: int = 0


def find_source_layout(directory: Path) -> Layout:
    """Return the layout of `directory`, which is a registry's root or its ``docker/registry/v2`` directory.

    Blocks. Raises `NotARegistry`.
    """
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
            raise NotARegistry(f"{error.filename} cannot be read: {error.strerror}") from None
    reason = "it has no docker/registry/v2 with blobs and repositories"
    raise NotARegistry(f"{directory} is not a registry's directory: {reason}")


def import_registry(
    layout: Layout,
    directory: Path,
    *,
    force: bool = False,
    progress: Progress[Skipped] | None = None,
    lock: RepositoryLock = no_lock,
) -> ImportResult:
    """Import `directory` into the store in `layout`. Blocks.

    Leave tags alone that point to another manifest here, unless `force` is true. `progress` reports bytes, and then
    manifests. A stopped import may be repeated. Raises `NotARegistry`, `OSError` and `Stopped`.
    """
    source = find_source_layout(directory)
    if _is_same_directory(source.root, layout.root):
        raise NotARegistry(f"{directory} is this registry's own directory")
    run = _ImportRun(source, layout, force, progress or Progress())
    run.scan()
    run.import_blobs()
    for repository in run.repositories:
        run.link_layers(repository)
        for steps in (run.link_manifests(repository), run.set_tags(repository)):
            for skipped_items in locked_slices(partial(lock, repository), steps):
                for item in skipped_items:
                    run.record(item)
                run.report_manifests()
    # Sync once at the end: two or three fsyncs per link would take longer than all the rest.
    os.sync()
    return ImportResult(repositories=len(run.repositories), **run.counts)


@define
class _ImportRun:
    _source: Layout
    _target: Layout
    _force: bool
    _progress: Progress[Skipped]
    repositories: list[str] = field(factory=list, init=False)
    counts: Counter[str] = field(factory=Counter, init=False)
    _blob_sizes: dict[Digest, int] = field(factory=dict, init=False)
    _total_bytes: int | None = field(default=None, init=False)  # None until `scan` has finished
    _processed_bytes: int = field(default=0, init=False)
    _source_links: Links = field(init=False)
    _target_blobs: Blobs = field(init=False)
    _target_links: Links = field(init=False)

    @_source_links.default
    def _make_source_links(self) -> Links:
        return Links(self._source, durable=False)

    # Not durable, because `import_registry` syncs everything at the end.

    @_target_blobs.default
    def _make_target_blobs(self) -> Blobs:
        return Blobs(self._target, durable=False)

    @_target_links.default
    def _make_target_links(self) -> Links:
        return Links(self._target, durable=False)

    def record(self, item: Skipped) -> None:
        """Count and report a skipped item."""
        self.counts.update(untaken=1, conflicts=item.kind == "conflict")
        self._progress.emit(item)

    def scan(self) -> None:
        """Find the repositories, and the sizes of their blobs."""
        total = 0
        for repository in self._source_links.repositories():
            try:
                parse_repository(repository)
            except NameInvalid as error:
                self.record(Skipped("invalid", error.message))
                continue
            self.repositories.append(repository)
            for links in (self._source_links.layers, self._source_links.manifests):
                for digest in links(repository):
                    if digest not in self._blob_sizes:
                        with suppress(FileNotFoundError, NotADirectoryError):
                            size = self._blob_sizes[digest] = os.stat(self._source.blob(digest)).st_size
                            total += size
                    self._report_bytes()
        self._total_bytes = total

    def import_blobs(self) -> None:
        """Import the blobs."""
        for digest, size in self._blob_sizes.items():
            if self._target_blobs.touch(digest) == size:
                self.counts.update(present=1)
                self._processed_bytes += size
                self._report_bytes()
                continue
            try:
                self._import_blob(digest)
            except _SourceError as error:
                self.record(Skipped("unreadable", f"{digest} cannot be read: {error}"))

    def link_layers(self, repository: str) -> None:
        """Link the blobs of the repository."""
        for digest in self._source_links.layers(repository):
            if self._source_links.has_layer(repository, digest):
                if self._target_blobs.exists(digest):
                    self._target_links.link_layer(repository, digest)
                else:
                    self.record(Skipped("missing", f"{repository}: the blob {digest} is missing"))
            self.report_manifests()

    def report_manifests(self) -> None:
        """Report the number of imported manifests."""
        self._progress.report("manifests", self.counts["manifests"], None)

    # Steps that need the repository's lock.

    def link_manifests(self, repository: str) -> Iterator[Skipped | None]:
        """Link the manifests of the repository, one per step."""
        for digest in self._source_links.manifests(repository):
            if not self._source_links.has_manifest(repository, digest):
                yield None
                continue
            content = read_small(self._target.blob(digest), MAX_MANIFEST + 1)
            if content is None:
                yield Skipped("missing", f"{repository}: the manifest {digest} is missing")
                continue
            try:
                media_type = self._source_links.manifest_media_type(repository, digest) or media_type_of(content)
            except ManifestInvalid as error:
                yield Skipped("invalid", f"{repository}: {digest} is not a manifest ({error.message})")
                continue
            if not self._target_links.has_manifest(repository, digest):
                self._target_links.link_manifest(repository, digest, media_type)
                self.counts.update(manifests=1)
            yield None

    def set_tags(self, repository: str) -> Iterator[Skipped | None]:
        """Set the tags of the repository, one per step."""
        for tag, digest in self._source_links.iter_tags(repository):
            current = self._target_links.tag(repository, tag)
            if digest is None or not self._target_links.has_manifest(repository, digest):
                yield Skipped("missing", f"{repository}:{tag}: the manifest of the tag is missing")
            elif current is not None and current != digest and not self._force:
                yield Skipped("conflict", f"{repository}:{tag} points to {current} here, but to {digest} in the import")
            elif current != digest:
                self._target_links.set_tag(repository, tag, digest)
                self.counts.update(tags=1)
            yield None

    def _import_blob(self, digest: Digest) -> None:
        os.makedirs(self._target.staging, exist_ok=True)
        staged_path = f"{self._target.staging}/{secrets.token_hex(8)}"
        source_fd = _open_source(self._source.blob(digest))
        copy_fd = -1
        try:
            if not (is_hardlink := _hardlink(source_fd, self._source.blob(digest), staged_path)):
                copy_fd = os.open(staged_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            hasher, size = digest.hasher(), 0
            while chunk := _read_source(source_fd):
                hasher.update(chunk)
                if not is_hardlink:
                    write_all(copy_fd, [chunk], size)
                size += len(chunk)
                self._processed_bytes += len(chunk)
                self._report_bytes()
            if hasher.hexdigest() != digest.hex:
                self.record(Skipped("damaged", f"{digest} is damaged"))
                return
            self._target_blobs.commit(staged_path, digest)
            self.counts.update(hardlinked=is_hardlink, copied=not is_hardlink, bytes=size)
        finally:
            os.close(source_fd)
            if copy_fd >= 0:
                os.close(copy_fd)
            with suppress(FileNotFoundError):
                os.unlink(staged_path)

    def _report_bytes(self) -> None:
        self._progress.report("contents", self._processed_bytes, self._total_bytes)


class _SourceError(Exception):
    """A file of the imported directory cannot be read."""


def _open_source(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise _SourceError(error.strerror) from None


def _read_source(fd: int) -> bytes:
    try:
        return os.read(fd, _CHUNK_SIZE)
    except OSError as error:
        raise _SourceError(error.strerror) from None


def _hardlink(fd: int, path: str, staged_path: str) -> bool:
    """Hard-link the open file to `staged_path`. Return whether that succeeded."""
    status = os.fstat(fd)
    # Another user could write to a file of theirs, and we could not set its mtime (see `SafeDelete`).
    if status.st_uid != os.geteuid():
        return False
    try:
        os.link(path, staged_path)
    except OSError:  # another file system; too many links; none allowed
        return False
    if os.path.samestat(status, os.stat(staged_path)):
        return True
    os.unlink(staged_path)
    return False


def _is_same_directory(one: Path, other: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samefile(one, other)
    return False
