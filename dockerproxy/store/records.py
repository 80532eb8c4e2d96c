"""Small JSON documents by key, remembered across restarts: tag answers, pings, access decisions."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from attrs import define, field, frozen

from dockerproxy.store.files import Staging

_MAX_CACHED = 10_000
_MAX_COMPONENT = 120

_Signature = tuple[int, int, int, int]


@frozen(slots=True)
class _CachedRecord:
    """What a file held when it had this signature; no signature: there was no file."""

    path: str
    signature: _Signature | None
    value: Mapping[str, Any] | None


@define(eq=False)
class Records:
    """Documents below `root`, each a file that only the daemon's user can read. May be used from several threads.

    A document in memory is believed while its file is the same one by `stat`, which is how several processes see each
    other's writes. `remembered` bounds how many stay in memory.
    """

    root: Path
    max_cached: int = _MAX_CACHED
    _staging: Staging = field(init=False)
    _cache: OrderedDict[tuple[str, ...], _CachedRecord] = field(factory=OrderedDict, init=False)
    _lock: threading.Lock = field(factory=threading.Lock, init=False)

    @_staging.default
    def _make_staging(self) -> Staging:
        # No sync: what a power cut loses or tears is asked for again.
        return Staging(f"{self.root}/~staging", private=True)

    def clear_staging(self) -> None:
        """Drop what a crash left. For one process at start, before any other uses the directory."""
        self._staging.clear()

    def get(self, *key: str) -> Mapping[str, Any] | None:
        """Return the document, None where there is none that can be read. It is shared: nobody changes it."""
        with self._lock:
            record = self._cache.get(key)
        path = self._path(key) if record is None else record.path
        signature = _signature(path)
        if record is None or record.signature != signature:
            record = _CachedRecord(path, None, None) if signature is None else _load(path, key)
        with self._lock:
            self._cache[key] = record
            self._cache.move_to_end(key)
            if len(self._cache) > self.max_cached:
                self._cache.popitem(last=False)
        return record.value

    def put(self, value: Mapping[str, Any], *key: str) -> None:
        """Keep `value`, which JSON can hold, in place of what was kept. Blocks."""
        content = json.dumps({"key": key, "value": value}, separators=(",", ":")).encode()
        self._staging.write(content, self._path(key))

    def remove(self, *key: str) -> None:
        """Forget the document, if there is one. Blocks."""
        try:
            os.unlink(self._path(key))
        except (FileNotFoundError, NotADirectoryError):
            pass

    def _path(self, key: tuple[str, ...]) -> str:
        if not key:
            raise ValueError("a record has a key")
        # `~` is in no escaped text, so a document, the directory of longer keys and the temp files never meet.
        return f"{self.root}/{'/'.join(map(_escape, key))}~.json"


def _escape(component: str) -> str:
    """Return a file name for any text, a different one for each, readable where the text is short."""
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
    # The inode: two writes may fall into one tick of the clock that dates them.
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
    # The key is in the file: a file system that takes upper and lower case for the same must not mix two tags up.
    if not isinstance(document, dict) or document.get("key") != list(key):
        return None
    value = document.get("value")
    return value if isinstance(value, dict) else None
