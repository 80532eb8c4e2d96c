"""Verification of a store on a disk: checks every blob against its digest, and every link against its target.

Move a blob that does not match its digest to ROOT/damaged, so that clients do not receive it and a push can restore it.
`repository_check` does the rest.
"""

from __future__ import annotations

import os

from attrs import define, field

from dockerproxy.oci.names import Digest
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.contents import Contents
from dockerproxy.store.layout import Layout
from dockerproxy.store.links import Links
from dockerproxy.store.progress import Progress, RepositoryLock, no_lock
from dockerproxy.store.repository_check import Finding, RepositoryCheck, ScrubResult, describe_damage
from dockerproxy.store.tree_reader import Missing, StrictReader, UnsafeFile

_CHUNK_SIZE = 1024 * 1024

_FileID = tuple[int, int, int]


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
    progress = progress or Progress()
    run = _ScrubRun(layout, progress, lock, sparse)
    run.scrub_blobs(check_links=check_links)
    if check_links:
        run.check.check_repositories()
    return ScrubResult(**run.check.counts)


@define
class _ScrubRun:
    _layout: Layout
    _progress: Progress[Finding]
    _lock: RepositoryLock
    _sparse: bool
    _total_bytes: int | None = field(default=None, init=False)  # None until they are known
    _reader: StrictReader = field(init=False)
    _blobs: Blobs = field(init=False)
    check: RepositoryCheck = field(init=False)

    @_reader.default
    def _make_reader(self) -> StrictReader:
        return StrictReader(self._layout.anchors, self._record_unsafe)

    @_blobs.default
    def _make_blobs(self) -> Blobs:
        return Blobs(self._layout, durable=False, reader=self._reader)

    @check.default
    def _make_check(self) -> RepositoryCheck:
        links, contents = Links(self._layout, durable=True, reader=self._reader), Contents(self._layout, self._reader)
        return RepositoryCheck(links, contents, links, self._progress, self._lock, self._sparse)

    def _record_unsafe(self, error: UnsafeFile) -> None:
        self.check.record("unreadable", str(error))

    def scrub_blobs(self, *, check_links: bool) -> None:
        """Check every blob. If `check_links`, note it as one that no repository has."""
        total = 0
        for entry in self._blobs.walk():
            total += entry.size
            self._report_bytes()
        self._total_bytes = total
        # Walk again, because a list of all entries could be large.
        for digest in self._blobs.digests():
            try:
                is_right = self._scrub_blob(digest)
            except Missing:
                continue  # the blob was deleted meanwhile
            except OSError as error:
                reason = str(error) if isinstance(error, UnsafeFile) else error.strerror
                self.check.record("unreadable", f"{digest} cannot be read: {reason}", digest=digest)
            else:
                if check_links and is_right:
                    self.check.unlinked.add(digest)
            self.check.counts.update(blobs=1)

    def _scrub_blob(self, digest: Digest) -> bool:
        """Check a blob. Return whether it stays."""
        hasher, path = digest.hasher(), self._layout.blob(digest)
        with open(self._reader.open(path), "rb", buffering=0) as file:
            file_id = _file_id(os.fstat(file.fileno()))
            remaining = file_id[2]
            while chunk := file.read(min(_CHUNK_SIZE, remaining)):
                remaining -= len(chunk)
                hasher.update(chunk)
                self.check.counts.update(bytes=len(chunk))
                self._report_bytes()
        if hasher.hexdigest() == digest.hex or not self._quarantine(digest, file_id):
            return True
        self.check.record("damaged", describe_damage(digest, self._layout.damaged), digest=digest)
        return False

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
        self._progress.report("contents", self.check.counts["bytes"], self._total_bytes)


def _file_id(status: os.stat_result) -> _FileID:
    # Neither mtime nor ctime can be included, because reading a blob changes both (`Blobs.open`).
    return status.st_dev, status.st_ino, status.st_size
