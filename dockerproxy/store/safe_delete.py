"""Deletion of unused blobs and links while other threads and processes may begin to use them.

Code that relies on a blob (HEAD 200, mount, manifest reference) first sets its mtime to now (`Blobs.touch`), and treats
the blob as present only if that succeeds. `SafeDelete` checks the mtime, moves the file aside, and checks again. If the
blob was used in between, the second check sees the new mtime and moves the file back. A later use finds no file. No
lock between threads or processes is needed.

A blob's mtime protects the links to it in the same way. A file that is aside during a crash is lost (`Staging.clear`).
That is safe, because no client has been told yet that the blob exists.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from enum import Enum

from attrs import define, field

from dockerproxy.oci.names import Digest
from dockerproxy.store.files import Staging, fsync_directory, try_remove
from dockerproxy.store.layout import Layout
from dockerproxy.store.tree_reader import Missing, UnsafeFile, list_names


class DeleteOutcome(Enum):
    """The outcome of a deletion."""

    DELETED = "deleted, or it did not exist"
    IN_USE = "kept, because its blob was used recently"
    NOT_OWNED = "kept, because its blob belongs to another user, and only that user can set its mtime"


@define
class SafeDelete:
    """Deletes blobs, and links to blobs, that were last used before `cutoff` (POSIX time). Blocks. Thread-safe.

    With `dry_run`, return the outcomes, but delete nothing. Raise `UnsafeFile` if the directory to delete is a
    symbolic link. Only deleted links are synced, by `sync`. A blob that
    reappears after a power cut is found by the next collection.
    """

    _layout: Layout
    cutoff: float
    dry_run: bool = False
    _staging: Staging = field(init=False)
    _unsynced_directories: set[str] = field(factory=set, init=False)

    @_staging.default
    def _make_staging(self) -> Staging:
        return Staging(self._layout.staging)

    def delete_blob(self, digest: Digest) -> tuple[DeleteOutcome, int]:
        """Delete a blob. Return the outcome and the blob's size in bytes."""
        path = self._layout.blob(digest)
        outcome, size = self._check([path])
        if outcome is not DeleteOutcome.DELETED or self.dry_run:
            return outcome, size
        _refuse_link(os.path.dirname(path))
        staged_path = self._staging.move_aside(path)
        if staged_path is not None:
            outcome, size = self._check([staged_path])
            if outcome is not DeleteOutcome.DELETED:
                _restore(staged_path, path)
                return outcome, size
            try_remove(staged_path)
        # Another process may be committing the blob again at this moment.
        with suppress(OSError):
            os.rmdir(os.path.dirname(path))
        return outcome, size

    def unlink_layer(self, repository: str, digest: Digest) -> DeleteOutcome:
        """Unlink a blob from a repository."""
        return self._unlink([self._layout.layer(repository, digest)], [digest])

    def unlink_manifests(self, repository: str, digests: Sequence[Digest]) -> DeleteOutcome:
        """Unlink manifests from a repository: all of them, or none if one was used recently."""
        return self._unlink([self._layout.manifest(repository, digest) for digest in digests], digests)

    def sync(self) -> Iterator[None]:
        """Sync the deleted links, so that none reappears after a power cut. Each step syncs one directory."""
        while self._unsynced_directories:
            fsync_directory(self._unsynced_directories.pop())
            yield None

    def _unlink(self, links: Sequence[str], digests: Sequence[Digest]) -> DeleteOutcome:
        blob_paths = [self._layout.blob(digest) for digest in digests]
        outcome, _ = self._check(blob_paths)
        if outcome is not DeleteOutcome.DELETED or self.dry_run:
            return outcome
        moves = []
        for link in links:
            directory = os.path.dirname(link)  # it also contains a manifest's media type
            _refuse_link(directory)
            staged_path = self._staging.move_aside(directory)
            if staged_path is not None:
                moves.append((staged_path, directory))
        outcome, _ = self._check(blob_paths)
        for staged_path, directory in moves:
            if outcome is DeleteOutcome.DELETED:
                _remove_link(staged_path)
                self._unsynced_directories.add(os.path.dirname(directory))
            else:
                _restore(staged_path, directory)
        return outcome

    def _check(self, blob_paths: Iterable[str]) -> tuple[DeleteOutcome, int]:
        """Return whether these blobs, and links to them, may be deleted, and the size of the blobs in bytes."""
        euid, size = os.geteuid(), 0
        for path in blob_paths:
            try:
                status = os.lstat(path)
            except Missing:
                continue
            size += status.st_size
            if status.st_mtime > self.cutoff:
                return DeleteOutcome.IN_USE, size
            if euid not in (0, status.st_uid):
                return DeleteOutcome.NOT_OWNED, size
        return DeleteOutcome.DELETED, size


def _refuse_link(directory: str) -> None:
    """Raise `UnsafeFile` if the directory is a symbolic link, because what it leads to is not the store's."""
    with suppress(*Missing):
        mode = os.lstat(directory).st_mode
        if stat.S_ISLNK(mode):
            raise UnsafeFile.of(directory, mode)


def _remove_link(staged_path: str) -> None:
    # The directory of a blob link contains nothing else. `try_remove` takes twice as long.
    try:
        os.unlink(f"{staged_path}/link")
        os.rmdir(staged_path)
    except OSError:
        try_remove(staged_path)


def _restore(staged_path: str, path: str) -> None:
    try:
        os.rename(staged_path, path)
    except OSError:
        # A concurrent push found no link and wrote a new one. Move back the files that it did not write.
        for name in list_names(staged_path):
            if not os.path.exists(f"{path}/{name}"):
                with suppress(OSError):
                    os.rename(f"{staged_path}/{name}", f"{path}/{name}")
        try_remove(staged_path)
