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
from collections import deque
from collections.abc import Iterable, Sequence
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
    """Takes away contents, and links to contents, that were last used before `cutoff` (POSIX time).

    With `dry_run` only the verdicts are made.
    """

    _layout: Layout
    cutoff: float
    dry_run: bool = False
    _staging: Staging = field(init=False)
    _aside: deque[tuple[str, str]] = field(factory=deque, init=False)
    _changed: set[str] = field(factory=set, init=False)

    @_staging.default
    def _make_staging(self) -> Staging:
        return Staging(self._layout.staging)

    def blob(self, digest: Digest) -> Verdict:
        """Take a content away."""
        path = self._layout.blob(digest)
        verdict = self._judge(path)
        if verdict is not Verdict.GONE or self.dry_run:
            return verdict
        staged = self._staging.set_aside(path)
        return Verdict.GONE if staged is None else self._decide([(staged, path)], [staged])

    def layer(self, repository: str, digest: Digest) -> Verdict:
        """Take a blob from a repository."""
        return self._links([self._layout.layer(repository, digest)], [digest])

    def manifests(self, repository: str, digests: Sequence[Digest]) -> Verdict:
        """Take manifests from a repository: all of them or, where one was used lately, none."""
        return self._links([self._layout.manifest(repository, digest) for digest in digests], digests)

    def drop(self) -> None:
        """Free what the contents and links that went had on the disk. Blocks; in any thread."""
        while self._aside:
            staged, path = self._aside.popleft()
            drop(staged)
            if path.endswith("/data"):
                # Another may be publishing there at this moment.
                with suppress(OSError):
                    os.rmdir(os.path.dirname(path))

    def sync(self) -> None:
        """Make sure that no power cut brings a link back that went. Blocks; in any thread."""
        while self._changed:
            sync_directory(self._changed.pop())

    def _links(self, links: Sequence[str], digests: Sequence[Digest]) -> Verdict:
        contents = [self._layout.blob(digest) for digest in digests]
        verdict = self._judge(*contents)
        if verdict is not Verdict.GONE or self.dry_run:
            return verdict
        moved = []
        for link in links:
            directory = os.path.dirname(link)  # a manifest's media type is beside the link
            staged = self._staging.set_aside(directory)
            if staged is not None:
                moved.append((staged, directory))
        verdict = self._decide(moved, contents)
        if verdict is Verdict.GONE:
            self._changed.update(os.path.dirname(directory) for _, directory in moved)
        return verdict

    def _decide(self, moved: list[tuple[str, str]], contents: Iterable[str]) -> Verdict:
        """Say whether what was moved aside can go, by the data files at `contents`; put it back where it cannot."""
        verdict = self._judge(*contents)
        if verdict is Verdict.GONE:
            self._aside.extend(moved)
            return verdict
        for staged, path in moved:
            _put_back(staged, path)
        return verdict

    def _judge(self, *contents: str) -> Verdict:
        """Say whether the data files at `contents` let themselves go, and the links to them."""
        owner = os.geteuid()
        for path in contents:
            try:
                status = os.stat(path)
            except (FileNotFoundError, NotADirectoryError):
                continue
            if status.st_mtime > self.cutoff:
                return Verdict.RECENT
            if owner not in (0, status.st_uid):
                return Verdict.FOREIGN
        return Verdict.GONE


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
