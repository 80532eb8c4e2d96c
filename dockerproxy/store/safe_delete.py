"""Taking away what nobody counts on, while others may come to count on it at any moment.

Whoever counts on a content - answers that it is here, mounts it, lets a manifest refer to it - first sets the date of
its data file to now (`Blobs.touch`), and takes it for there only where that worked. Whoever takes it away looks at the
date, renames the file aside, and looks again: a date set in between is seen then and the file goes back; one that
comes later finds no file. So no lock is needed, be it between threads or processes.
The same date guards the links to a content. What is aside at a crash is gone (`Staging.empty`), and then nobody was
told yet that it is here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from enum import Enum

from attrs import define, field

from dockerproxy.oci.names import Digest
from dockerproxy.store.files import Staging, fsync_directory, list_names, try_remove
from dockerproxy.store.layout import Layout


class DeleteOutcome(Enum):
    """What became of something that was to go."""

    DELETED = "it went, or was not there any more"
    IN_USE = "its content was used lately, and it stays"
    NOT_OWNED = "its content is another user's file, on which nobody can set a date, and it stays"


@define
class SafeDelete:
    """Takes away contents, and links to contents, that were last used before `cutoff` (POSIX time). Blocks; in threads.

    With `dry_run` only the verdicts are made. Nothing is synced but, by `sync`, the links that went: a content that a
    power cut brings back is found by the next collection.
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
        """Take a content away; return how many bytes it has, too."""
        path = self._layout.blob(digest)
        outcome, size = self._check([path])
        if outcome is not DeleteOutcome.DELETED or self.dry_run:
            return outcome, size
        staged_path = self._staging.move_aside(path)
        if staged_path is not None:
            outcome, size = self._check([staged_path])
            if outcome is not DeleteOutcome.DELETED:
                _restore(staged_path, path)
                return outcome, size
            try_remove(staged_path)
        # Another may be publishing there at this moment.
        with suppress(OSError):
            os.rmdir(os.path.dirname(path))
        return outcome, size

    def unlink_layer(self, repository: str, digest: Digest) -> DeleteOutcome:
        """Take a blob from a repository."""
        return self._unlink([self._layout.layer(repository, digest)], [digest])

    def unlink_manifests(self, repository: str, digests: Sequence[Digest]) -> DeleteOutcome:
        """Take manifests from a repository: all of them or, where one was used lately, none."""
        return self._unlink([self._layout.manifest(repository, digest) for digest in digests], digests)

    def sync(self) -> Iterator[None]:
        """Make sure that no power cut brings a link back that went, a directory a step."""
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
            directory = os.path.dirname(link)  # a manifest's media type is beside the link
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
        """Say whether these data files let themselves go, and the links to them; and how many bytes they have."""
        euid, size = os.geteuid(), 0
        for path in blob_paths:
            try:
                status = os.stat(path)
            except (FileNotFoundError, NotADirectoryError):
                continue
            size += status.st_size
            if status.st_mtime > self.cutoff:
                return DeleteOutcome.IN_USE, size
            if euid not in (0, status.st_uid):
                return DeleteOutcome.NOT_OWNED, size
        return DeleteOutcome.DELETED, size


def _remove_link(staged_path: str) -> None:
    # A blob's has nothing else in it, and `drop` takes as long to find that out as to remove it.
    try:
        os.unlink(f"{staged_path}/link")
        os.rmdir(staged_path)
    except OSError:
        try_remove(staged_path)


def _restore(staged_path: str, path: str) -> None:
    try:
        os.rename(staged_path, path)
    except OSError:
        # Another wrote there, and found nothing: what it had no need to write is still in what was moved aside.
        for name in list_names(staged_path):
            if not os.path.exists(f"{path}/{name}"):
                with suppress(OSError):
                    os.rename(f"{staged_path}/{name}", f"{path}/{name}")
        try_remove(staged_path)
