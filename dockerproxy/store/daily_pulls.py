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
    _today: dict[str, tuple[int, set[str]]] = field(factory=dict, init=False)
    _sums: tuple[str, Counter[str]] = field(factory=lambda: ("", Counter()), init=False)  # of the finished days

    def add(self, pulls: Iterable[tuple[str, str, int]]) -> None:
        """Count pulls: a repository, a client, and a number. Raise OSError if they cannot be written."""
        with self._lock:
            self._begin_day()
            clients = sum(len(names) for _, names in self._today.values())
            for repository, client, number in pulls:
                if repository not in self._today and len(self._today) >= _MAX_REPOSITORIES:
                    continue
                total, names = self._today.get(repository, (0, set()))
                if client not in names and clients < _MAX_CLIENTS and len(names) < _MAX_CLIENTS_OF_ONE:
                    names.add(client)
                    clients += 1
                self._today[repository] = total + number, names
            document = {
                "version": _VERSION,
                "repositories": {name: [total, sorted(names)] for name, (total, names) in self._today.items()},
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
        today, key = self._date(0), f"{self._date(days)} {days}"
        with self._lock:
            if self._sums[0] != key:
                finished: Counter[str] = Counter()
                for day in self._days():
                    if self._date(days) < day < today:
                        finished.update({name: total for name, (total, _) in self._read(day).items()})
                self._sums = key, finished
            sums = self._sums[1].copy()
        sums.update({name: total for name, (total, _) in self._read(today).items()})
        return sums

    def of(self, repository: str, days: int = 30) -> Popularity:
        """Return the pulls of one repository in the last `days` days, and by how many clients."""
        total, hosts = 0, set[str]()
        for day in self._days():
            if day > self._date(days):
                number, names = self._read(day).get(repository, (0, set()))
                total += number
                hosts |= names
        return Popularity(total, len(hosts))

    def _begin_day(self) -> None:
        today = self._date(0)
        if self._day != today:
            self._day, self._today = today, self._read(today)

    def _read(self, day: str) -> dict[str, tuple[int, set[str]]]:
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


def _parse(content: bytes) -> dict[str, tuple[int, set[str]]]:
    document: Any = json.loads(content)
    if document["version"] != _VERSION:
        raise ValueError("another version")
    return {
        name: (int(total), {str(client) for client in clients})
        for name, (total, clients) in document["repositories"].items()
    }
