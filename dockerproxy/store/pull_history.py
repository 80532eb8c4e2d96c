"""The history of pulls: its rows, which PULL_HISTORY keeps for some days, and the counts of each day."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from attrs import define, field
from twisted.application.internet import TimerService
from twisted.internet.defer import Deferred
from twisted.logger import Logger

from dockerproxy.concurrency import in_thread, spawn
from dockerproxy.store.daily_pulls import CountedPull, DailyPulls, aside_files
from dockerproxy.store.files import Staging, history_staging
from dockerproxy.store.journal import Entry, Journal

_MAX_BYTES = 16 * 1024 * 1024  # of each of two generations; about 45,000 rows
_CLEAN_INTERVAL = 3600.0  # seconds
_MAX_STRAYS = 1000  # old rows among newer ones: those of a time at which the clock was wrong

# The fields of a row that readers rely on. Anything else on a line of the file is none.
_TEXTS = ("time", "client", "where", "repository", "kind", "reference", "verdict", "because")
_TEXTS_OR_NONE = ("user", "user_agent")
_NUMBERS = ("status", "bytes", "requests", "pulls")

log = Logger()


@define(eq=False)
class PullHistory:
    """The history in `directory`. Its methods block. `lifetime` are the seconds for which rows are kept; 0 is off.

    `is_public` returns whether everybody may know of the tag or digest of a cached repository that a row is about.
    """

    directory: str
    lifetime: float
    _clock: Callable[[], float] = time.time
    _is_public: Callable[[str, str], bool] = lambda repository, reference: False
    counts: DailyPulls = field(init=False)
    _journal: Journal = field(init=False)

    @counts.default
    def _make_counts(self) -> DailyPulls:
        return DailyPulls(self.directory, self._clock)

    @_journal.default
    def _make_journal(self) -> Journal:
        return Journal(f"{self.directory}/pulls.jsonl", "pulls", _MAX_BYTES)

    @property
    def path(self) -> str:
        """The path of the file with the rows."""
        return self._journal.path

    def append(self, entries: Sequence[Entry]) -> None:
        """Add rows. Raise OSError."""
        self._journal.append(entries)
        self.counts.add(self._counted(row) for row in entries if row["pulls"])

    def _counted(self, row: Entry) -> CountedPull:
        name, client, pulls = row["repository"], row["client"], row["pulls"]
        if row["where"] == "hosted":  # the names of hosted and cached repositories may be the same
            return CountedPull(f"hosted/{name}", client, pulls, is_public=False)
        return CountedPull(name, client, pulls, self._is_public(name, row["reference"]))

    def read(self, since: float = 0.0, needle: str = "") -> Iterator[dict[str, Any]]:
        """Yield the rows since a POSIX time that contain the text `needle`, the newest first."""
        oldest, wanted = _format(max(since, self._clock() - self.lifetime)), needle.encode("ascii", "replace")
        old = 0
        for row in self._journal.read_backwards(lambda line: wanted in line):
            if not _is_row(row):
                continue
            if row["time"] >= oldest:
                old = 0
                yield row
            elif (old := old + 1) > _MAX_STRAYS:
                return

    def clean(self) -> None:
        """Remove what is too old; or everything, if the history is off."""
        try:
            if not self.lifetime:
                if self._journal.remove():
                    log.info("{path} is deleted, because PULL_HISTORY is off", path=self.path)
                self.counts.remove()
                with suppress(OSError):
                    os.rmdir(self._staging.directory)
                return
            oldest = _format(self._clock() - self.lifetime)
            self._journal.drop(lambda row: str(row.get("time")) < oldest)
            self.counts.drop_old()
            self._remove_aside()
        except OSError as error:
            log.error("old rows of {path} cannot be removed: {reason}", path=self.path, reason=error.strerror)

    def clear_staging(self) -> None:
        """Delete files that a crash left. One process calls this at start-up, before others use the directory."""
        self._staging.clear()

    @property
    def _staging(self) -> Staging:
        return history_staging(self.directory)

    def _remove_aside(self) -> None:
        """Delete files that were set aside and are too old, because they have addresses of clients, too."""
        for path in aside_files(self.directory):
            with suppress(FileNotFoundError):
                if os.stat(path).st_mtime < self._clock() - self.lifetime:
                    os.unlink(path)


class PullHistoryService(TimerService):
    """Cleans the history at the start, and each hour."""

    def __init__(self, reactor: Any, history: PullHistory) -> None:
        def clean() -> Deferred[None]:
            return spawn(in_thread(reactor, history.clean), "cleaning the history of pulls")

        super().__init__(_CLEAN_INTERVAL, clean)  # type: ignore[no-untyped-call]
        self.clock = reactor


def _is_row(row: Mapping[str, Any]) -> bool:
    if row.get("kind") == "blob" and not isinstance(row.get("blobs"), int):
        return False
    return (
        all(isinstance(row.get(name), str) for name in _TEXTS)
        and all(isinstance(row.get(name, 0), str | None) for name in _TEXTS_OR_NONE)
        and all(isinstance(row.get(name), int) for name in _NUMBERS)
    )


def _format(timestamp: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(max(timestamp, 0)))
