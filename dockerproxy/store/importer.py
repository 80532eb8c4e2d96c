"""Import of another registry's directory: one of `registry:2`, or one of this daemon.

The directory may be a stranger's: no symbolic link below it is followed, and only regular files are read (see
`tree_reader`). Blobs are verified by their digests. They are hard-linked if they are on our file system and nobody else
can still write to them, and copied otherwise. Links follow, and tags come last, so that a tag always points to a
complete image. Existing objects stay, so an import can be repeated, and a repeated one continues an interrupted one.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import time
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
    _source_reader: StrictReader = field(init=False)
    _source_links: Links = field(init=False)
    _target_blobs: Blobs = field(init=False)
    _target_links: Links = field(init=False)
    _reserve: DiskReserve = field(init=False)

    @_source_reader.default
    def _make_source_reader(self) -> StrictReader:
        return StrictReader((str(self._source.root),), self._record_unsafe)

    @_source_links.default
    def _make_source_links(self) -> Links:
        return Links(self._source, durable=False, reader=self._source_reader)

    # Not durable, because `import_registry` syncs everything at the end.

    @_target_blobs.default
    def _make_target_blobs(self) -> Blobs:
        return Blobs(self._target, durable=False)

    @_target_links.default
    def _make_target_links(self) -> Links:
        return Links(self._target, durable=False)

    @_reserve.default
    def _make_reserve(self) -> DiskReserve:
        return DiskReserve(str(self._target.root))

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
        """Return the size of a blob in the source; 0 if it cannot be read, which `_import_blob` reports."""
        try:
            return self._source_reader.stat(self._source.blob(digest)).st_size
        except UnsafeFile:
            return 0

    def import_blobs(self) -> None:
        """Import the blobs."""
        os.makedirs(self._target.staging, exist_ok=True)
        for digest, size in self._blob_sizes.items():
            if self._target_blobs.touch(digest) == size:
                self.counts.update(present=1)
                self._processed_bytes += size
                self._report_bytes()
                continue
            try:
                self._import_blob(digest)
            except UnsafeFile as error:
                self._source_reader.report(error)
            except _SourceError as error:
                self.record(Skipped("unreadable", f"{digest} cannot be read: {error}"))

    def link_layers(self, repository: str) -> None:
        """Link the blobs of the repository."""
        for digest in self._source_links.layers(repository):
            state = self._source_links.layer_state(repository, digest)
            if state is not LinkState.ABSENT:
                is_here = self._target_blobs.exists(digest)
                if is_here:
                    self._reserve.check()
                    self._target_links.link_layer(repository, digest)
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
                self._reserve.check()
                self._target_links.link_manifest(repository, digest, media_type)
                # Referrers are listed by this time. A future one would make a manifest the newest one for long.
                linked_at = self._source_links.manifest_time(repository, digest)
                if linked_at is not None:
                    self._target_links.set_manifest_time(repository, digest, min(linked_at, time.time_ns()))
                self.counts.update(manifests=1)
            is_torn = state is LinkState.TORN
            yield _torn(repository, f"the link to the manifest {digest}", True) if is_torn else None

    def set_tags(self, repository: str) -> Iterator[Skipped | None]:
        """Set the tags of the repository, one per step."""
        for tag, digest in self._source_links.iter_tags(repository):
            current = self._target_links.tag(repository, tag)
            if digest is None:
                digest = self._only_target(repository, tag)
                yield _torn(repository, f"the tag {tag}", digest is not None)
            if digest is None:
                continue
            if not self._target_links.has_manifest(repository, digest):
                yield Skipped("missing", f"{repository}:{tag}: the manifest of the tag is missing")
            elif current is not None and current != digest and not self._force:
                yield Skipped("conflict", f"{repository}:{tag} points to {current} here, but to {digest} in the import")
            elif current != digest:
                self._reserve.check()
                self._target_links.set_tag(repository, tag, digest)
                self.counts.update(tags=1)
            yield None

    def _only_target(self, repository: str, tag: str) -> Digest | None:
        """Return the manifest of a torn tag, if it has had no other one and it was imported."""
        targets = self._source_links.former_targets(repository, tag)
        return targets[0] if len(targets) == 1 and self._target_links.has_manifest(repository, targets[0]) else None

    def _import_blob(self, digest: Digest) -> None:
        staged_path = f"{self._target.staging}/{secrets.token_hex(8)}"
        source_fd = self._open_source(digest)
        copy_fd = -1
        try:
            status = os.fstat(source_fd)
            is_hardlink = _hardlink(source_fd, status, staged_path)
            is_right = True
            if not is_hardlink:
                copy_fd = os.open(staged_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                self._check_room(status.st_size)
                if status.st_blocks * 512 < status.st_size:
                    # A sparse file is only as large as its owner says. Do not fill the disk with its zeros.
                    is_right = self._read_blob(source_fd, digest, status.st_size, -1)
            if not is_right or not self._read_blob(source_fd, digest, status.st_size, copy_fd):
                self.record(Skipped("damaged", f"{digest} is damaged"))
                return
            self._processed_bytes += status.st_size
            if is_hardlink and os.fstat(source_fd).st_size != status.st_size:
                raise _SourceError("its size changed while it was read")
            self._target_blobs.commit(staged_path, digest)
            self.counts.update(hardlinked=int(is_hardlink), copied=int(not is_hardlink), bytes=status.st_size)
        finally:
            os.close(source_fd)
            if copy_fd >= 0:
                os.close(copy_fd)
            with suppress(FileNotFoundError):
                os.unlink(staged_path)

    def _open_source(self, digest: Digest) -> int:
        try:
            return self._source_reader.open(self._source.blob(digest))
        except UnsafeFile:
            raise
        except OSError as error:
            raise _SourceError(error.strerror) from None

    def _check_room(self, size: int) -> None:
        """Raise `_SourceError` if the disk has no room for a copy of `size` bytes."""
        try:
            self._reserve.check(size)
        except OSError as error:
            raise _SourceError(f"a copy needs {size} bytes, but {error.strerror}") from None

    def _read_blob(self, fd: int, digest: Digest, size: int, copy_fd: int) -> bool:
        """Return whether the first `size` bytes of the file have the digest. Copy them, unless `copy_fd` is -1."""
        hasher, offset = digest.hasher(), 0
        while chunk := _read_source(fd, min(_CHUNK_SIZE, size - offset), offset):
            hasher.update(chunk)
            if copy_fd >= 0:
                write_all(copy_fd, [chunk], offset)
            offset += len(chunk)
            self._progress.report("contents", self._processed_bytes + offset, self._total_bytes)
        return hasher.hexdigest() == digest.hex

    def _report_bytes(self) -> None:
        self._progress.report("contents", self._processed_bytes, self._total_bytes)


def _torn(repository: str, name: str, is_mended: bool) -> Skipped:
    outcome = "it was mended, because its content is here" if is_mended else "it was not imported"
    return Skipped("torn", f"{repository}: {name} is torn; {outcome}")


class _SourceError(Exception):
    """A file of the imported directory cannot be read."""


def _read_source(fd: int, size: int, offset: int) -> bytes:
    try:
        return os.pread(fd, size, offset)
    except OSError as error:
        raise _SourceError(error.strerror) from None


def _hardlink(fd: int, status: os.stat_result, staged_path: str) -> bool:
    """Hard-link the open file `fd` to `staged_path`. Return whether that succeeded.

    Nobody else may be able to change the file afterwards, by its mode, by another name, or because it is open.
    """
    # We could not set the mtime of another user's file (see `SafeDelete`).
    is_ours = status.st_uid == os.geteuid() and status.st_nlink == 1 and not status.st_mode & 0o022
    if not is_ours or _is_open_for_writing(fd):
        return False
    try:
        # By descriptor, because `path` may lead to another file by now. With `src_dir_fd`, Python uses linkat(2), which
        # follows the link in /proc; link(2) does not.
        directory_fd = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.link(str(fd), staged_path, src_dir_fd=directory_fd, follow_symlinks=True)
        finally:
            os.close(directory_fd)
    except OSError:  # another file system; too many links; none allowed
        return False
    if os.path.samestat(status, os.lstat(staged_path)):
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
