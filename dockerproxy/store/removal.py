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
from dockerproxy.store.files import Staging, drop, sync_directory
from dockerproxy.store.layout import Layout


class Verdict(Enum):
    """What became of something that was to go."""

    GONE = "it went, or was not there any more"
    RECENT = "its content was used lately, and it stays"
    FOREIGN = "its content is another user's file, on which nobody can set a date, and it stays"


@define
class Removal:
    """Takes away contents, and links to contents, that were last used before `cutoff` (POSIX time). Blocks; in threads.

    With `dry_run` only the verdicts are made. Nothing is synced but, by `sync`, the links that went: a content that a
    power cut brings back is found by the next collection.
    """

    _layout: Layout
    cutoff: float
    dry_run: bool = False
    _staging: Staging = field(init=False)
    _changed: set[str] = field(factory=set, init=False)

    @_staging.default
    def _make_staging(self) -> Staging:
        return Staging(self._layout.staging)

    def blob(self, digest: Digest) -> tuple[Verdict, int]:
        """Take a content away; return how many bytes it has, too."""
        path = self._layout.blob(digest)
        verdict, size = self._judge([path])
        if verdict is not Verdict.GONE or self.dry_run:
            return verdict, size
        staged = self._staging.set_aside(path)
        if staged is not None:
            verdict, size = self._judge([staged])
            if verdict is not Verdict.GONE:
                _put_back(staged, path)
                return verdict, size
            drop(staged)
        # Another may be publishing there at this moment.
        with suppress(OSError):
            os.rmdir(os.path.dirname(path))
        return verdict, size

    def layer(self, repository: str, digest: Digest) -> Verdict:
        """Take a blob from a repository."""
        return self._links([self._layout.layer(repository, digest)], [digest])

    def manifests(self, repository: str, digests: Sequence[Digest]) -> Verdict:
        """Take manifests from a repository: all of them or, where one was used lately, none."""
        return self._links([self._layout.manifest(repository, digest) for digest in digests], digests)

    def sync(self) -> Iterator[None]:
        """Make sure that no power cut brings a link back that went, a directory a step."""
        while self._changed:
            sync_directory(self._changed.pop())
            yield None

    def _links(self, links: Sequence[str], digests: Sequence[Digest]) -> Verdict:
        contents = [self._layout.blob(digest) for digest in digests]
        verdict, _ = self._judge(contents)
        if verdict is not Verdict.GONE or self.dry_run:
            return verdict
        moved = []
        for link in links:
            directory = os.path.dirname(link)  # a manifest's media type is beside the link
            staged = self._staging.set_aside(directory)
            if staged is not None:
                moved.append((staged, directory))
        verdict, _ = self._judge(contents)
        for staged, directory in moved:
            if verdict is Verdict.GONE:
                _drop_link(staged)
                self._changed.add(os.path.dirname(directory))
            else:
                _put_back(staged, directory)
        return verdict

    def _judge(self, contents: Iterable[str]) -> tuple[Verdict, int]:
        """Say whether these data files let themselves go, and the links to them; and how many bytes they have."""
        owner, size = os.geteuid(), 0
        for path in contents:
            try:
                status = os.stat(path)
            except (FileNotFoundError, NotADirectoryError):
                continue
            size += status.st_size
            if status.st_mtime > self.cutoff:
                return Verdict.RECENT, size
            if owner not in (0, status.st_uid):
                return Verdict.FOREIGN, size
        return Verdict.GONE, size


def _drop_link(staged: str) -> None:
    # A blob's has nothing else in it, and `drop` takes as long to find that out as to remove it.
    try:
        os.unlink(f"{staged}/link")
        os.rmdir(staged)
    except OSError:
        drop(staged)


def _put_back(staged: str, path: str) -> None:
    try:
        os.rename(staged, path)
    except OSError:
        # Another wrote there, and found nothing: what it had no need to write is still in what was moved aside.
        for name in _names(staged):
            if not os.path.exists(f"{path}/{name}"):
                with suppress(OSError):
                    os.rename(f"{staged}/{name}", f"{path}/{name}")
        drop(staged)


def _names(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
