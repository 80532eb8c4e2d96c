"""Small JSON documents by key that survive a restart: tag lookups, pings and access decisions."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from attrs import define, field, frozen

from dockerproxy.bounded_dict import BoundedDict
from dockerproxy.store.files import Staging
from dockerproxy.store.tree_reader import Missing, UnsafeFile, list_names, open_regular

_MAX_CACHED = 10_000
_MAX_SIZE = 64 * 1024
"""Bytes of a document. A larger file is not ours, and would take long to parse."""
_MAX_KEPT = 8 * 1024  # bytes of a document that stays in memory; 10,000 of the longest would take hundreds of MiB
_MAX_COMPONENT = 120
_SUFFIX, _STAGING = "~.json", "~staging"

_Signature = tuple[int, int, int, int]


@frozen(slots=True)
class _CachedRecord:
    """The content of a file when it had this signature, which is None if the file did not exist."""

    path: str
    signature: _Signature | None
    value: Mapping[str, Any] | None


@define(eq=False)
class Records:
    """Documents below `root`, each in a file that only the daemon's user can read. Thread-safe.

    A document cached in memory is valid while `stat` shows that its file is unchanged. In this way several processes
    see each other's writes. At most `max_cached` short documents stay in memory. `on_create` is called after each new
    file or directory. A document has at most `max_size` bytes. If `durable`, a power cut loses none.
    """

    root: Path
    max_cached: int = _MAX_CACHED
    on_create: Callable[[], object] | None = None
    max_size: int = _MAX_SIZE
    durable: bool = False
    _staging: Staging = field(init=False)
    _cache: BoundedDict[tuple[str, ...], _CachedRecord] = field(init=False)
    _lock: threading.Lock = field(factory=threading.Lock, init=False)

    @_cache.default
    def _make_cache(self) -> BoundedDict[tuple[str, ...], _CachedRecord]:
        return BoundedDict(self.max_cached)

    @_staging.default
    def _make_staging(self) -> Staging:
        # Most need no sync, because a record that a power cut loses or tears is requested from upstream again.
        directory = f"{self.root}/{_STAGING}"
        return Staging(directory, self.durable, self.durable, private=True, on_create=self.on_create)

    def clear_staging(self) -> None:
        """Delete files left by a crash. One process calls this at start-up, before others use the directory."""
        self._staging.clear()

    def get(self, *key: str) -> Mapping[str, Any] | None:
        """Return the document, or None if it does not exist or is torn. It is shared, so do not modify it."""
        with self._lock:
            record = self._cache.get(key)
        path = self._path(key) if record is None else record.path
        signature = _signature(path)
        if record is None or record.signature != signature:
            record = _CachedRecord(path, None, None) if signature is None else _load(path, key, self.max_size)
        with self._lock:
            if record.signature is None or record.signature[2] <= _MAX_KEPT:
                self._cache[key] = record
            else:
                self._cache.pop(key)
        return record.value

    def peek(self, *key: str) -> Mapping[str, Any] | None:
        """Return the document like `get`, without keeping it in memory. Blocks."""
        return _load(self._path(key), key, self.max_size).value

    def put(self, value: Mapping[str, Any], *key: str) -> None:
        """Store `value`, which must be serializable as JSON, replacing the old document. Blocks.

        A value that takes more than `max_size` bytes is not stored, because `get` would not read it.
        """
        content = json.dumps({"key": key, "value": value}, separators=(",", ":")).encode()
        if len(content) > self.max_size:
            self.remove(*key)
        else:
            self._staging.write(content, self._path(key))

    def remove(self, *key: str) -> None:
        """Delete the document, if it exists. Blocks."""
        with suppress(*Missing):
            os.unlink(self._path(key))

    def exists(self, *key: str) -> bool:
        """Return whether the document exists, even a torn one."""
        return _signature(self._path(key)) is not None

    def kinds(self) -> list[str]:
        """Return the first components of all keys, sorted. Blocks."""
        return sorted(_unescape(name) or name for name in list_names(str(self.root)) if name != _STAGING)

    def changes(self, kind: str) -> dict[str, int]:
        """Return when a document of the kind was last written, by the second component of its key. Blocks.

        The component is a `file_name`, the time in nanoseconds. The keys have three components.
        """
        times = {}
        with suppress(OSError), os.scandir(f"{self.root}/{_escape(kind)}") as entries:
            for entry in entries:
                with suppress(OSError):  # removed meanwhile
                    times[entry.name] = entry.stat(follow_symlinks=False).st_mtime_ns
        return times

    @staticmethod
    def file_name(component: str) -> str:
        """Return the name of the directory for the component of a key."""
        return _escape(component)

    def walk(self, *prefix: str) -> Iterator[RecordEntry]:
        """Yield the documents with longer keys that begin with `prefix`, such as the kind, grouped by directory.

        Remove empty directories. Blocks.
        """
        pending: list[tuple[str, ...]] = [tuple(map(_escape, prefix))]
        while pending:
            names = pending.pop()
            directory = "/".join((str(self.root), *names))
            for name in list_names(directory):
                path = f"{directory}/{name}"
                if name.endswith(_SUFFIX):
                    entry = _record_entry(path, (*names, name.removesuffix(_SUFFIX)), self.max_size)
                    if entry is not None:
                        yield entry
                else:
                    pending.append((*names, name))
            with suppress(OSError):  # not empty, or not a directory
                os.rmdir(directory)

    def read(self, entry: RecordEntry) -> Mapping[str, Any] | None:
        """Return the document without keeping it in memory. None if it does not exist or is torn. Blocks."""
        return _load(entry.path, entry.key, self.max_size).value

    def discard(self, entry: RecordEntry) -> bool:
        """Delete the document, unless it was written again since. Return whether it is deleted. Blocks."""
        signature = _signature(entry.path)
        if signature is None or signature[0] != entry.mtime_ns:
            return False
        with suppress(FileNotFoundError):
            os.unlink(entry.path)
        return True

    def _path(self, key: tuple[str, ...]) -> str:
        if not key:
            raise ValueError("the key of a record must not be empty")
        # Escaped text never contains `~`, so documents, directories of longer keys and temporary files do not collide.
        return f"{self.root}/{'/'.join(map(_escape, key))}{_SUFFIX}"


@frozen(slots=True)
class RecordEntry:
    """A document on disk. `mtime_ns` is the time of its last write (POSIX time)."""

    key: tuple[str, ...]
    path: str
    mtime_ns: int


def _escape(component: str) -> str:
    """Return a unique file name for any text. It is readable if the text is short."""
    text = quote(component, safe=":@", errors="surrogatepass").replace("~", "%7E")
    if len(text) > _MAX_COMPONENT:
        return "~" + hashlib.sha256(component.encode("utf-8", "surrogatepass")).hexdigest()
    return "%2E" + text[1:] if text.startswith(".") else text or "~"


def _unescape(name: str) -> str | None:
    """Return the text that `_escape` turned into `name`, or None if that is a hash, or `name` is none of ours."""
    if name.startswith("~"):
        return "" if name == "~" else None
    try:
        return unquote(name, errors="surrogatepass")
    except UnicodeDecodeError:
        return None


def _record_entry(path: str, names: tuple[str, ...], max_size: int) -> RecordEntry | None:
    signature = _signature(path)
    if signature is None:
        return None
    key = tuple(map(_unescape, names))
    if None in key:
        key = tuple(_read_key(path, max_size)) or names  # torn
    return RecordEntry(tuple(component or "" for component in key), path, signature[0])


def _read_key(path: str, max_size: int) -> list[str]:
    try:
        document = json.loads(_read(path, max_size)[1])
    except (OSError, ValueError, RecursionError):
        return []
    key = document.get("key") if isinstance(document, dict) else None
    return key if isinstance(key, list) and all(isinstance(component, str) for component in key) else []


def _signature(path: str) -> _Signature | None:
    try:
        status = os.lstat(path)
    except Missing:
        return None
    return _signature_of(status) if stat.S_ISREG(status.st_mode) else None


def _signature_of(status: os.stat_result) -> _Signature:
    # The inode is included because two writes may get the same mtime and ctime.
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino


def _load(path: str, key: tuple[str, ...], max_size: int) -> _CachedRecord:
    try:
        signature, content = _read(path, max_size)
    except (*Missing, UnsafeFile):
        return _CachedRecord(path, None, None)
    return _CachedRecord(path, signature, _parse(content, key))


def _read(path: str, max_size: int) -> tuple[_Signature, bytes]:
    """Return the signature and the content of a file; the content is empty if it is too large. Raises `OSError`."""
    fd = open_regular(path)
    try:
        status = os.fstat(fd)
        content = os.read(fd, status.st_size) if status.st_size <= max_size else b""
    finally:
        os.close(fd)
    return _signature_of(status), content


def _parse(content: bytes, key: tuple[str, ...]) -> Mapping[str, Any] | None:
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return None
    # The file contains the key, so that a case-insensitive file system does not mix up two tags.
    if not isinstance(document, dict) or document.get("key") != list(key):
        return None
    value = document.get("value")
    return value if isinstance(value, dict) else None
