"""Small JSON documents by key that survive a restart: tag lookups, pings and access decisions."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from attrs import define, field, frozen

from dockerproxy.bounded_dict import BoundedDict
from dockerproxy.store.files import Staging

_MAX_CACHED = 10_000
_MAX_COMPONENT = 120

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
    see each other's writes. At most `max_cached` documents stay in memory.
    """

    root: Path
    max_cached: int = _MAX_CACHED
    _staging: Staging = field(init=False)
    _cache: BoundedDict[tuple[str, ...], _CachedRecord] = field(init=False)
    _lock: threading.Lock = field(factory=threading.Lock, init=False)

    @_cache.default
    def _make_cache(self) -> BoundedDict[tuple[str, ...], _CachedRecord]:
        return BoundedDict(self.max_cached)

    @_staging.default
    def _make_staging(self) -> Staging:
        # Do not sync, because a record that a power cut loses or tears is requested from upstream again.
        return Staging(f"{self.root}/~staging", private=True)

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
            record = _CachedRecord(path, None, None) if signature is None else _load(path, key)
        with self._lock:
            self._cache[key] = record
        return record.value

    def put(self, value: Mapping[str, Any], *key: str) -> None:
        """Store `value`, which must be serializable as JSON, replacing the old document. Blocks."""
        content = json.dumps({"key": key, "value": value}, separators=(",", ":")).encode()
        self._staging.write(content, self._path(key))

    def remove(self, *key: str) -> None:
        """Delete the document, if it exists. Blocks."""
        try:
            os.unlink(self._path(key))
        except (FileNotFoundError, NotADirectoryError):
            pass

    def _path(self, key: tuple[str, ...]) -> str:
        if not key:
            raise ValueError("the key of a record must not be empty")
        # Escaped text never contains `~`, so documents, directories of longer keys and temporary files do not collide.
        return f"{self.root}/{'/'.join(map(_escape, key))}~.json"


def _escape(component: str) -> str:
    """Return a unique file name for any text. It is readable if the text is short."""
    text = quote(component, safe=":@", errors="surrogatepass").replace("~", "%7E")
    if len(text) > _MAX_COMPONENT:
        return "~" + hashlib.sha256(component.encode("utf-8", "surrogatepass")).hexdigest()
    return "%2E" + text[1:] if text.startswith(".") else text or "~"


def _signature(path: str) -> _Signature | None:
    try:
        return _signature_of(os.stat(path))
    except (FileNotFoundError, NotADirectoryError):
        return None


def _signature_of(status: os.stat_result) -> _Signature:
    # The inode is included because two writes may get the same mtime and ctime.
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino


def _load(path: str, key: tuple[str, ...]) -> _CachedRecord:
    try:
        with open(path, "rb") as file:
            signature = _signature_of(os.fstat(file.fileno()))
            content = file.read()
    except (FileNotFoundError, NotADirectoryError):
        return _CachedRecord(path, None, None)
    return _CachedRecord(path, signature, _parse(content, key))


def _parse(content: bytes, key: tuple[str, ...]) -> Mapping[str, Any] | None:
    try:
        document = json.loads(content)
    except ValueError:
        return None
    # The file contains the key, so that a case-insensitive file system does not mix up two tags.
    if not isinstance(document, dict) or document.get("key") != list(key):
        return None
    value = document.get("value")
    return value if isinstance(value, dict) else None
