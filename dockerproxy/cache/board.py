"""The board: downloads under way in all processes, in shared memory that any process can read.

A download writes its own entry, at most once a second, so that neither a hit nor a message to another process pays for
it. Each process writes to its own part only, which needs no lock.
"""

from __future__ import annotations

import mmap
import time

from attrs import define, frozen

from dockerproxy.errors import DigestInvalid
from dockerproxy.oci.names import Digest

ENTRIES = 256
"""Downloads of one process that the board has room for. Further ones are not shown."""

POST_INTERVAL = 1.0
"""Seconds between two updates of an entry."""

_ID, _SIZE, _DONE, _READERS, _STARTED, _FLAGS, _TEXT_SIZE, _TEXT = range(8)  # words of an entry; the last begins a text
_WORD = 8  # bytes; an aligned 64-bit word is read and written atomically
_ENTRY_WORDS = 192  # a text of 1,480 bytes; a repository's name has at most 1,024, and a digest 135
_MAX_TEXT = (_ENTRY_WORDS - _TEXT) * _WORD
_LAST_ID, _VIEWERS, _USED, _COMPLETED = range(4)  # words of a process's part: the third counts entries in use
_RING, _FIRST_ENTRY = 8, 72  # the identifiers of downloads that were completed last, and the entries
_PART_WORDS = _FIRST_ENTRY + ENTRIES * _ENTRY_WORDS
_UNKNOWN = 2**64 - 1  # the size of a blob that upstream has not announced
_PRIVATE = 1  # a flag


@frozen
class BoardRow:
    """A download as its process has last described it.

    `repository` is the key of its repository in the cache's store, with the host of the registry before it. `size` is
    None if it is not known; `done` bytes are in the file. `readers` clients read along. It began at `started` (POSIX
    time). It is private if the client for which it began has a credential.
    """

    id: str
    repository: str
    digest: Digest
    size: int | None
    done: int
    readers: int
    started: float
    private: bool


@frozen(eq=False)
class Board:
    """The shared memory, which forked processes inherit. `for_process` returns the part of one process."""

    _words: memoryview
    _processes: int

    @classmethod
    def make(cls, processes: int) -> Board:
        """Return an empty board. The kernel provides a page of it when that is first written to."""
        return cls(memoryview(mmap.mmap(-1, _WORD * _PART_WORDS * processes)).cast("Q"), processes)

    def for_process(self, number: int) -> BoardPart:
        """Return the part of process `number`, which replaces one that has exited: its entries are removed."""
        part = BoardPart(self._words, number * _PART_WORDS)
        part.clear()
        return part

    def rows(self) -> list[BoardRow]:
        """Return the downloads of all processes, in no order. It takes microseconds if there are none."""
        rows = []
        for number in range(self._processes):
            first = number * _PART_WORDS + _FIRST_ENTRY
            used = self._words[number * _PART_WORDS + _USED]
            ids = self._words[first : first + used * _ENTRY_WORDS : _ENTRY_WORDS].tolist()
            for index, identifier in enumerate(ids):
                if identifier:
                    row = self._read(number, first + index * _ENTRY_WORDS, identifier)
                    if row is not None:
                        rows.append(row)
        return rows

    @property
    def viewers(self) -> int:
        """The number of views of the board in all processes; see `BoardPart.set_viewers`."""
        return sum(self._words[number * _PART_WORDS + _VIEWERS] for number in range(self._processes))

    def is_complete(self, identifier: str) -> bool:
        """Return whether the download with this `BoardRow.id`, which is on the board no more, has all of its blob.

        Only the last of each process are known.
        """
        number, _, own = identifier.partition("-")
        first = int(number) * _PART_WORDS
        return int(own) in self._words[first + _RING : first + _FIRST_ENTRY].tolist()

    def _read(self, number: int, start: int, identifier: int) -> BoardRow | None:
        words = self._words[start : start + _TEXT].tolist()
        content = bytes(self._words[start + _TEXT : start + _ENTRY_WORDS])[: words[_TEXT_SIZE]]
        if self._words[start + _ID] != identifier:
            return None  # the process has begun to write another download meanwhile
        digest, _, repository = content.decode(errors="replace").partition("\n")
        try:
            parsed = Digest.parse(digest)
        except DigestInvalid:
            return None
        return BoardRow(
            f"{number}-{identifier}",
            repository,
            parsed,
            None if words[_SIZE] == _UNKNOWN else words[_SIZE],
            words[_DONE],
            words[_READERS],
            words[_STARTED] / 1e6,
            bool(words[_FLAGS] & _PRIVATE),
        )


@define(eq=False)
class BoardPart:
    """The part of the board that this process writes to."""

    _words: memoryview
    _start: int

    def clear(self) -> None:
        """Remove all entries, and say that nobody looks at them here."""
        self.set_viewers(0)
        for start in self._entries():
            self._words[start + _ID] = 0
        for start in range(self._start + _RING, self._start + _FIRST_ENTRY):
            self._words[start] = 0

    def set_viewers(self, count: int) -> None:
        """Set the number of people to which this process shows the board."""
        self._words[self._start + _VIEWERS] = count

    def add(self, repository: str, digest: Digest, size: int | None, *, private: bool) -> BoardEntry | None:
        """Add a download that begins now. Return None if there is no room for it."""
        text = f"{digest}\n{repository}".encode()
        words = self._words
        start = next((start for start in self._entries() if not words[start + _ID]), None)
        if len(text) > _MAX_TEXT:
            return None
        if start is None:
            used = words[self._start + _USED]
            if used == ENTRIES:
                return None
            words[self._start + _USED] = used + 1
            start = self._entries()[-1]
        words[start + _TEXT_SIZE], words[start + _FLAGS] = len(text), _PRIVATE if private else 0
        words[start + _STARTED] = max(0, int(time.time() * 1e6))
        padded = text.ljust(-(-len(text) // _WORD) * _WORD, b"\0")
        words[start + _TEXT : start + _TEXT + len(padded) // _WORD] = memoryview(padded).cast("Q")
        entry = BoardEntry(words, start, self._start)
        entry.update(0, size, 0)
        # Last, because readers take an entry with an identifier for a whole one.
        identifier = words[self._start + _LAST_ID] = words[self._start + _LAST_ID] + 1
        words[start + _ID] = identifier
        return entry

    def _entries(self) -> range:
        """Return the first words of the entries that were ever used. The others take no memory."""
        first = self._start + _FIRST_ENTRY
        return range(first, first + self._words[self._start + _USED] * _ENTRY_WORDS, _ENTRY_WORDS)


@define(eq=False)
class BoardEntry:
    """The entry of one download, which that download writes."""

    _words: memoryview
    _start: int
    _part: int

    def update(self, done: int, size: int | None, readers: int) -> None:
        """Say that `done` bytes of `size` (None if unknown) are in the file, and that `readers` clients read it."""
        self._words[self._start + _DONE] = done
        self._words[self._start + _SIZE] = _UNKNOWN if size is None else size
        self._words[self._start + _READERS] = readers

    def remove(self, *, is_complete: bool = False) -> None:
        """Remove the entry, because the download has ended. Do not use it again.

        It `is_complete` if all of the blob is in the store.
        """
        if is_complete:
            count = self._words[self._part + _COMPLETED]
            self._words[self._part + _RING + count % (_FIRST_ENTRY - _RING)] = self._words[self._start + _ID]
            self._words[self._part + _COMPLETED] = count + 1
        self._words[self._start + _ID] = 0
