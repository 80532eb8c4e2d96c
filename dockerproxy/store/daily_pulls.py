"""How often each repository was pulled, and by how many clients: one small file for each of the last 90 days."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

from attrs import define, field, frozen
from twisted.logger import Logger

from dockerproxy.store.files import history_staging
from dockerproxy.store.tree_reader import list_names, read_small

_DAYS = 90  # that are kept
_MAX_REPOSITORIES = 5000  # of a day; more are not counted
_MAX_CLIENTS = 20_000  # of a day, each counted for every repository that it has pulled
_MAX_CLIENTS_OF_ONE = 2000  # of a repository on one day
_MAX_SIZE = 8 * 1024 * 1024  # bytes of a file
_VERSION = 1
_NAME = re.compile(r"pulls-(\d{4}-\d\d-\d\d)\.json")
_ASIDE = re.compile(r"pulls.*\.aside")
_DAY = 86400.0

log = Logger()


@frozen
class Popularity:
    """The pulls of a repository, and the clients (addresses) that made them."""

    pulls: int
    hosts: int


@frozen
class PullSums:
    """The pulls of each repository: in `total`, and of these the `public` ones, of content that everybody may read."""

    total: Mapping[str, int] = field(factory=dict)
    public: Mapping[str, int] = field(factory=dict)


@frozen
class CountedPull:
    """Some pulls of a repository by one client."""

    repository: str
    client: str
    pulls: int
    is_public: bool


@define
class _Count:
    """The pulls of one repository on one day, and the clients that made them."""

    total: int = 0
    public: int = 0
    clients: set[str] = field(factory=set)


@define(eq=False)
class DailyPulls:
    """The counts in `directory`. One process adds to them, every process reads them. Thread-safe; all methods block.

    `clock` returns POSIX time. Repositories have the names that people write: ``docker.io/library/nginx``, and
    ``hosted/NAME``.
    """

    directory: str
    _clock: Callable[[], float] = time.time
    _lock: threading.Lock = field(factory=threading.Lock, init=False)
    _day: str = field(default="", init=False)
    _today: dict[str, _Count] = field(factory=dict, init=False)
    _sums: tuple[str, Counter[str], Counter[str]] = field(factory=lambda: ("", Counter(), Counter()), init=False)
    # of the finished days: their name, and the values of `PullSums`

    def add(self, pulls: Iterable[CountedPull]) -> None:
        """Count pulls. Raise OSError if they cannot be written."""
        with self._lock:
            self._begin_day()
            clients = sum(len(count.clients) for count in self._today.values())
            for pull in pulls:
                count = self._today.get(pull.repository)
                if count is None:
                    if len(self._today) >= _MAX_REPOSITORIES:
                        continue
                    count = self._today[pull.repository] = _Count()
                names = count.clients
                if pull.client not in names and clients < _MAX_CLIENTS and len(names) < _MAX_CLIENTS_OF_ONE:
                    names.add(pull.client)
                    clients += 1
                count.total += pull.pulls
                count.public += pull.pulls if pull.is_public else 0
            document = {
                "version": _VERSION,
                "repositories": {
                    name: [count.total, sorted(count.clients), count.public] for name, count in self._today.items()
                },
            }
            content = json.dumps(document, separators=(",", ":")).encode()
            history_staging(self.directory).write(content, self._path(self._day))

    def drop_old(self) -> None:
        """Delete the files of days that are too old. Raise OSError."""
        for day in self._days():
            if day < self._date(_DAYS):
                os.unlink(self._path(day))

    def remove(self) -> None:
        """Delete all counts, and what was set aside."""
        for path in (*map(self._path, self._days()), *aside_files(self.directory)):
            with suppress(FileNotFoundError):
                os.unlink(path)

    def pulls(self, days: int = 30) -> Mapping[str, int]:
        """Return the pulls of each repository in the last `days` days."""
        return self.sums(days).total

    def sums(self, days: int = 30) -> PullSums:
        """Return the pulls of each repository in the last `days` days, and the public ones of them."""
        today, key = self._date(0), f"{self._date(days)} {days}"
        with self._lock:
            if self._sums[0] != key:
                finished = Counter[str](), Counter[str]()
                for day in self._days():
                    if self._date(days) < day < today:
                        _add(*finished, self._read(day))
                self._sums = key, *finished
            total, public = self._sums[1].copy(), self._sums[2].copy()
        _add(total, public, self._read(today))
        return PullSums(total, public)

    def of(self, repository: str, days: int = 30) -> Popularity:
        """Return the pulls of one repository in the last `days` days, and by how many clients."""
        total, hosts = 0, set[str]()
        for day in self._days():
            if day > self._date(days):
                count = self._read(day).get(repository, _Count())
                total += count.total
                hosts |= count.clients
        return Popularity(total, len(hosts))

    def _begin_day(self) -> None:
        today = self._date(0)
        if self._day != today:
            self._day, self._today = today, self._read(today)

    def _read(self, day: str) -> dict[str, _Count]:
        path = self._path(day)
        try:
            content = read_small(path, _MAX_SIZE)
            return {} if content is None else _parse(content)
        except OSError as error:
            log.warn("{path} cannot be read: {reason}", path=path, reason=error.strerror)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError):
            log.warn("{path} is damaged or of another version; it is set aside as {path}.aside", path=path)
            with suppress(OSError):
                os.replace(path, f"{path}.aside")
        return {}

    def _days(self) -> list[str]:
        return sorted(match[1] for name in list_names(self.directory) if (match := _NAME.fullmatch(name)))

    def _date(self, days_ago: int) -> str:
        return time.strftime("%Y-%m-%d", time.gmtime(self._clock() - days_ago * _DAY))

    def _path(self, day: str) -> str:
        return f"{self.directory}/pulls-{day}.json"


def aside_files(directory: str) -> list[str]:
    """Return the paths of the files that were set aside: those of this module, and of the journal beside them."""
    return [f"{directory}/{name}" for name in list_names(directory) if _ASIDE.fullmatch(name)]


def _parse(content: bytes) -> dict[str, _Count]:
    document: Any = json.loads(content)
    if document["version"] != _VERSION:
        raise ValueError("another version")
    return {name: _parse_count(*values) for name, values in document["repositories"].items()}


def _parse_count(total: Any, clients: Any, public: Any = 0) -> _Count:
    # Earlier versions did not count which pulls were public.
    return _Count(int(total), int(public), {str(client) for client in clients})


def _add(total: Counter[str], public: Counter[str], counts: Mapping[str, _Count]) -> None:
    total.update({name: count.total for name, count in counts.items()})
    public.update({name: count.public for name, count in counts.items()})
