"""Import of another registry's directory: one of `registry:2`, or one of this daemon.

The directory may be a stranger's: no symbolic link below it is followed, and only regular files are read (see
`tree_reader`). Blobs are verified by their digests. Links follow, and tags come last, so that a tag always points to a
complete image. Existing objects stay, so an import can be repeated, and a repeated one continues an interrupted one.

The target is a directory (`LocalTarget`) or a bucket (`bucket.bucket_import`).
"""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Protocol

from attrs import define, field, frozen

from dockerproxy.errors import ManifestInvalid, NameInvalid
from dockerproxy.oci.manifests import MAX_MANIFEST, media_type_of
from dockerproxy.oci.names import Digest, parse_repository
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.disk_reserve import DiskReserve
from dockerproxy.store.files import write_all
from dockerproxy.store.layout import Layout
from dockerproxy.store.links import Links, LinkState
from dockerproxy.store.progress import Progress, RepositoryLock, locked_slices, no_lock
from dockerproxy.store.tree_reader import Missing, StrictReader, UnsafeFile, read_small

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
        layout, unsafe = Layout(root), list[UnsafeFile]()
        reader = StrictReader((str(root),), unsafe.append)
        try:
            if reader.list_names(layout.repositories) and reader.list_names(layout.blobs):
                return layout
        except OSError as error:
            raise NotARegistry(f"{error.filename} cannot be read: {error.strerror}") from None
        for link in unsafe:
            raise NotARegistry(f"{link}; import the directory that it leads to")
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
    return import_tree(source, LocalTarget(layout), force=force, progress=progress or Progress(), lock=lock)


def import_tree(
    source: Layout, target: ImportTarget, *, force: bool, progress: Progress[Skipped], lock: RepositoryLock
) -> ImportResult:
    """Import the registry in `source` into `target`. Blocks. Raise what the target raises, and `Stopped`."""
    run = _ImportRun(source, target, force, progress)
    run.scan()
    run.import_blobs()
    target.flush()
    for repository in run.repositories:
        run.link_layers(repository)
        target.flush()
        for steps in (run.link_manifests(repository), run.set_tags(repository)):
            for skipped_items in locked_slices(partial(lock, repository), steps):
                for item in skipped_items:
                    run.record(item)
                run.report_manifests()
            target.flush()
    target.finish()
    return ImportResult(repositories=len(run.repositories), **run.counts)


@define
class SourceBlob:
    """An open file of the imported directory, which should be the content with `digest`."""

    digest: Digest
    fd: int
    status: os.stat_result
    _on_read: Callable[[int], object]

    @property
    def is_only_ours(self) -> bool:
        """Whether nobody else can change the file, by its mode, by another name, or because it is open."""
        # We could not set the mtime of another user's file (see `SafeDelete`).
        is_ours = self.status.st_uid == os.geteuid() and self.status.st_nlink == 1 and not self.status.st_mode & 0o022
        return is_ours and not _is_open_for_writing(self.fd)

    def verify(self, copy_fd: int = -1) -> bool:
        """Return whether the file matches the digest. Copy it, unless `copy_fd` is -1. Raise `SourceError`."""
        hasher, offset, size = self.digest.hasher(), 0, self.status.st_size
        while chunk := _read_source(self.fd, min(_CHUNK_SIZE, size - offset), offset):
            hasher.update(chunk)
            if copy_fd >= 0:
                write_all(copy_fd, [chunk], offset)
            offset += len(chunk)
            self._on_read(offset)
        return hasher.hexdigest() == self.digest.hex

    def verify_and_copy(self, copy_fd: int, reserve: DiskReserve) -> bool:
        """Return whether the file matches the digest. Copy it if the disk has room. Raise `SourceError`."""
        size = self.status.st_size
        try:
            reserve.check(size)
        except OSError as error:
            raise SourceError(f"a copy needs {size} bytes, but {error.strerror}") from None
        # A sparse file is only as large as its owner says. Do not fill the disk with its zeros.
        is_sparse = self.status.st_blocks * 512 < size
        return (not is_sparse or self.verify()) and self.verify(copy_fd)


class ImportTarget(Protocol):
    """The store that an import fills. Writes are complete at the latest after `flush`. All methods block."""

    def sizes(self, digests: Iterable[Digest]) -> Iterator[int | None]:
        """Yield the size of each content, None if it is not there. Those that are there stay."""

    def add(self, blob: SourceBlob) -> str | None:
        """Store a content if it matches its digest. Return whether it was ``hardlinked`` or ``copied``, else None.

        Raise `SourceError`.
        """

    def exists(self, digest: Digest) -> bool:
        """Return whether a content is there."""

    def read(self, digest: Digest) -> bytes | None:
        """Return the content of a manifest, or None if it is not there."""

    def link_layer(self, repository: str, digest: Digest) -> None:
        """Link a content that is there to the repository."""

    def has_manifest(self, repository: str, digest: Digest) -> bool:
        """Return whether the repository has the manifest."""

    def link_manifest(
        self, repository: str, digest: Digest, content: bytes, media_type: str, linked_at: int | None
    ) -> None:
        """Make a content that is there a manifest of the repository, linked at a POSIX time in nanoseconds."""

    def tag(self, repository: str, tag: str) -> Digest | None:
        """Return the manifest of a tag."""

    def set_tag(self, repository: str, tag: str, digest: Digest) -> None:
        """Point a tag to a manifest of the repository."""

    def flush(self) -> None:
        """Return when everything is written, or raise the error of a write."""

    def finish(self) -> None:
        """Make everything durable, at the end of the import."""


@define
class LocalTarget:
    """An `ImportTarget` in the directory `layout`.

    Blobs are hard-linked if they are on our file system and nobody else can still write to them, and copied otherwise.
    """

    _layout: Layout
    _blobs: Blobs = field(init=False)
    _links: Links = field(init=False)
    _reserve: DiskReserve = field(init=False)

    # Not durable, because `finish` syncs everything: two or three fsyncs per link would take longer than all the rest.

    @_blobs.default
    def _make_blobs(self) -> Blobs:
        return Blobs(self._layout, durable=False)

    @_links.default
    def _make_links(self) -> Links:
        return Links(self._layout, durable=False)

    @_reserve.default
    def _make_reserve(self) -> DiskReserve:
        return DiskReserve(str(self._layout.root))

    def sizes(self, digests: Iterable[Digest]) -> Iterator[int | None]:
        os.makedirs(self._layout.staging, exist_ok=True)
        return map(self._blobs.touch, digests)

    def add(self, blob: SourceBlob) -> str | None:
        staged_path = f"{self._layout.staging}/{secrets.token_hex(8)}"
        copy_fd = -1
        try:
            is_hardlink = _hardlink(blob, staged_path)
            if is_hardlink:
                is_right = blob.verify()
                if is_right and os.fstat(blob.fd).st_size != blob.status.st_size:
                    raise SourceError("its size changed while it was read")
            else:
                copy_fd = os.open(staged_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                is_right = blob.verify_and_copy(copy_fd, self._reserve)
            if not is_right:
                return None
            self._blobs.commit(staged_path, blob.digest)
            return "hardlinked" if is_hardlink else "copied"
        finally:
            if copy_fd >= 0:
                os.close(copy_fd)
            with suppress(FileNotFoundError):
                os.unlink(staged_path)

    def exists(self, digest: Digest) -> bool:
        return self._blobs.exists(digest)

    def read(self, digest: Digest) -> bytes | None:
        return read_small(self._layout.blob(digest), MAX_MANIFEST + 1)

    def link_layer(self, repository: str, digest: Digest) -> None:
        self._reserve.check()
        self._links.link_layer(repository, digest)

    def has_manifest(self, repository: str, digest: Digest) -> bool:
        return self._links.has_manifest(repository, digest)

    def link_manifest(
        self, repository: str, digest: Digest, content: bytes, media_type: str, linked_at: int | None
    ) -> None:
        self._reserve.check()
        self._links.link_manifest(repository, digest, media_type)
        # Referrers are listed by this time. A future one would make a manifest the newest one for long.
        if linked_at is not None:
            self._links.set_manifest_time(repository, digest, min(linked_at, time.time_ns()))

    def tag(self, repository: str, tag: str) -> Digest | None:
        return self._links.tag(repository, tag)

    def set_tag(self, repository: str, tag: str, digest: Digest) -> None:
        self._reserve.check()
        self._links.set_tag(repository, tag, digest)

    def flush(self) -> None:
        pass

    def finish(self) -> None:
        os.sync()


@define
class _ImportRun:
    _source: Layout
    _target: ImportTarget
    _force: bool
    _progress: Progress[Skipped]
    repositories: list[str] = field(factory=list, init=False)
    counts: Counter[str] = field(factory=Counter, init=False)
    _blob_sizes: dict[Digest, int] = field(factory=dict, init=False)
    _total_bytes: int | None = field(default=None, init=False)  # None until `scan` has finished
    _processed_bytes: int = field(default=0, init=False)
    _source_reader: StrictReader = field(init=False)
    _source_links: Links = field(init=False)

    @_source_reader.default
    def _make_source_reader(self) -> StrictReader:
        return StrictReader((str(self._source.root),), self._record_unsafe)

    @_source_links.default
    def _make_source_links(self) -> Links:
        return Links(self._source, durable=False, reader=self._source_reader)

    def record(self, item: Skipped) -> None:
        """Count and report a skipped item."""
        self.counts.update(untaken=1, conflicts=int(item.kind == "conflict"))
        self._progress.emit(item)

    def _record_unsafe(self, error: UnsafeFile) -> None:
        self.record(Skipped("unreadable", str(error)))

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
                        with suppress(*Missing):
                            size = self._blob_sizes[digest] = self._size(digest)
                            total += size
                    self._report_bytes()
        self._total_bytes = total

    def _size(self, digest: Digest) -> int:
        """Return the size of a blob in the source; 0 if it cannot be read, which `import_blobs` reports."""
        try:
            return self._source_reader.stat(self._source.blob(digest)).st_size
        except UnsafeFile:
            return 0

    def import_blobs(self) -> None:
        """Import the blobs."""
        there = self._target.sizes(self._blob_sizes)
        for (digest, size), size_there in zip(self._blob_sizes.items(), there, strict=True):
            if size_there == size:
                self.counts.update(present=1)
                self._processed_bytes += size
                self._report_bytes()
                continue
            try:
                self._import_blob(digest)
            except UnsafeFile as error:
                self._source_reader.report(error)
            except SourceError as error:
                self.record(Skipped("unreadable", f"{digest} cannot be read: {error}"))

    def link_layers(self, repository: str) -> None:
        """Link the blobs of the repository."""
        for digest in self._source_links.layers(repository):
            state = self._source_links.layer_state(repository, digest)
            if state is not LinkState.ABSENT:
                is_here = self._target.exists(digest)
                if is_here:
                    self._target.link_layer(repository, digest)
                if state is LinkState.TORN:
                    self.record(_torn(repository, f"the link to the blob {digest}", is_here))
                elif not is_here:
                    self.record(Skipped("missing", f"{repository}: the blob {digest} is missing"))
            self.report_manifests()

    def report_manifests(self) -> None:
        """Report the number of imported manifests."""
        self._progress.report("manifests", self.counts["manifests"], None)

    # Steps that need the repository's lock.

    def link_manifests(self, repository: str) -> Iterator[Skipped | None]:
        """Link the manifests of the repository, one per step."""
        for digest in self._source_links.manifests(repository):
            state = self._source_links.manifest_state(repository, digest)
            if state is LinkState.ABSENT:
                yield None
                continue
            torn = _torn(repository, f"the link to the manifest {digest}", True) if state is LinkState.TORN else None
            if self._target.has_manifest(repository, digest) and self._target.exists(digest):
                yield torn
                continue
            content = self._target.read(digest)
            if content is None:
                yield Skipped("missing", f"{repository}: the manifest {digest} is missing")
                continue
            try:
                media_type = self._source_links.manifest_media_type(repository, digest) or media_type_of(content)
            except ManifestInvalid as error:
                yield Skipped("invalid", f"{repository}: {digest} is not a manifest ({error.message})")
                continue
            linked_at = self._source_links.manifest_time(repository, digest)
            self._target.link_manifest(repository, digest, content, media_type, linked_at)
            self.counts.update(manifests=1)
            yield torn

    def set_tags(self, repository: str) -> Iterator[Skipped | None]:
        """Set the tags of the repository, one per step."""
        for tag, digest in self._source_links.iter_tags(repository):
            current = self._target.tag(repository, tag)
            if digest is None:
                digest = self._only_target(repository, tag)
                yield _torn(repository, f"the tag {tag}", digest is not None)
            if digest is None:
                continue
            if not self._target.has_manifest(repository, digest):
                yield Skipped("missing", f"{repository}:{tag}: the manifest of the tag is missing")
            elif current is not None and current != digest and not self._force:
                yield Skipped("conflict", f"{repository}:{tag} points to {current} here, but to {digest} in the import")
            elif current != digest:
                self._target.set_tag(repository, tag, digest)
                self.counts.update(tags=1)
            yield None

    def _only_target(self, repository: str, tag: str) -> Digest | None:
        """Return the manifest of a torn tag, if it has had no other one and it was imported."""
        targets = self._source_links.former_targets(repository, tag)
        return targets[0] if len(targets) == 1 and self._target.has_manifest(repository, targets[0]) else None

    def _import_blob(self, digest: Digest) -> None:
        fd = self._open_source(digest)
        try:
            blob = SourceBlob(digest, fd, os.fstat(fd), self._report_read)
            outcome = self._target.add(blob)
            if outcome is None:
                self.record(Skipped("damaged", f"{digest} is damaged"))
                return
            self._processed_bytes += blob.status.st_size
            self.counts.update({outcome: 1, "bytes": blob.status.st_size})
        finally:
            os.close(fd)

    def _open_source(self, digest: Digest) -> int:
        try:
            return self._source_reader.open(self._source.blob(digest))
        except UnsafeFile:
            raise
        except OSError as error:
            raise SourceError(error.strerror) from None

    def _report_read(self, offset: int) -> None:
        self._progress.report("contents", self._processed_bytes + offset, self._total_bytes)

    def _report_bytes(self) -> None:
        self._progress.report("contents", self._processed_bytes, self._total_bytes)


def _torn(repository: str, name: str, is_mended: bool) -> Skipped:
    outcome = "it was mended, because its content is here" if is_mended else "it was not imported"
    return Skipped("torn", f"{repository}: {name} is torn; {outcome}")


class SourceError(Exception):
    """A file of the imported directory cannot be read."""


def _read_source(fd: int, size: int, offset: int) -> bytes:
    try:
        return os.pread(fd, size, offset)
    except OSError as error:
        raise SourceError(error.strerror) from None


def _hardlink(blob: SourceBlob, staged_path: str) -> bool:
    """Hard-link the open file to `staged_path`. Return whether that succeeded, and nobody else can change it then."""
    if not blob.is_only_ours:
        return False
    try:
        # By descriptor, because `path` may lead to another file by now. With `src_dir_fd`, Python uses linkat(2), which
        # follows the link in /proc; link(2) does not.
        directory_fd = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.link(str(blob.fd), staged_path, src_dir_fd=directory_fd, follow_symlinks=True)
        finally:
            os.close(directory_fd)
    except OSError:  # another file system; too many links; none allowed
        return False
    if os.path.samestat(blob.status, os.lstat(staged_path)):
        return True
    os.unlink(staged_path)
    return False


def _is_open_for_writing(fd: int) -> bool:
    """Return whether a process has the file open for writing, or maps it so. True if the file system cannot tell."""
    try:
        # The kernel refuses a read lease on such a file (fcntl(2), F_SETLEASE).
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError:
        return True
    return False


def _is_same_directory(one: Path, other: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samefile(one, other)
    return False
