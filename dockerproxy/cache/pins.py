"""Pinned images: they stay in the cache, whatever else comes, and also if upstream deletes their tag.

Each pin is a document in CACHE_DIR/pins, which all processes can read. It has the digests of all that the image
consists of, so that nothing of it is evicted, not even in the first minute after a start.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from attrs import evolve, field, frozen
from twisted.internet.defer import DeferredLock
from twisted.logger import Logger

from dockerproxy.cache.pin_file import MAX_PINS
from dockerproxy.concurrency import in_thread
from dockerproxy.errors import Denied, DigestInvalid, NameInvalid
from dockerproxy.oci.docker_hub import canonical_registry
from dockerproxy.oci.image_names import ImageName
from dockerproxy.oci.names import Digest, Reference, Registry
from dockerproxy.store.disk_errors import disk_error
from dockerproxy.store.layout import Layout
from dockerproxy.store.records import RecordEntry, Records

PIN = "pin"
"""The kind of the records. Their keys are the key of the repository in the cache, and the tag or digest."""

DEFAULT_REFRESH = 6 * 3600.0
"""Seconds after which the registry is asked whether a pinned tag has moved."""

MAX_CONTENTS = 5000
"""Manifests and blobs of one pinned image."""

_MAX_RECORD = 1024 * 1024  # bytes; a digest and its size take 90
_QUOTA = (4, 5)  # pins may take so many parts of the cache

log = Logger()


def pin_records(layout: Layout) -> Records:
    """Return the records of the pins in the cache."""
    return Records(layout.root / "pins", max_cached=MAX_PINS, max_size=_MAX_RECORD, durable=True)


def repository_key(image: ImageName) -> str:
    """Return the name in the cache of the repository of `image`."""
    return f"{canonical_registry(Registry(image.host)).host}/{image.repository}"


@frozen
class Pin:
    """A pinned image: `contents` has the digests and sizes of the manifests and blobs that it consists of.

    Empty `platforms` mean the default ones. The registry is asked again `refresh` seconds after `refreshed`, the time
    of the last success; times are POSIX times. `error` is a sentence about the last attempt if that failed. A pin may
    come from PIN_FILE, from the command, or from both.
    """

    image: ImageName
    platforms: tuple[str, ...] = ()
    refresh: float = DEFAULT_REFRESH
    referrers: bool = True
    by_command: bool = False
    in_file: bool = False
    since: float = 0.0
    refreshed: float | None = None
    digest: Digest | None = None
    contents: Mapping[Digest, int] = field(factory=dict)
    error: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """The key of the record."""
        return PIN, repository_key(self.image), str(self.image.reference)

    def is_due(self, now: float) -> bool:
        """Return whether the registry is to be asked now."""
        return self.refreshed is None or bool(self.error) or not 0 <= now - self.refreshed < self.refresh

    def to_record(self) -> dict[str, Any]:
        """Return the pin as JSON."""
        return {
            "image": str(self.image),
            "platforms": list(self.platforms),
            "refresh": self.refresh,
            "referrers": self.referrers,
            "by_command": self.by_command,
            "in_file": self.in_file,
            "since": self.since,
            "refreshed": self.refreshed,
            "digest": None if self.digest is None else str(self.digest),
            "contents": {str(digest): size for digest, size in self.contents.items()},
            "error": self.error,
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Pin:
        """Return the pin that `to_record` turned into `record`. Raise ValueError if it is another document."""
        try:
            digest, refreshed = record["digest"], record["refreshed"]
            return cls(
                image=ImageName.parse(record["image"]),
                platforms=tuple(map(str, record["platforms"])),
                refresh=float(record["refresh"]),
                referrers=bool(record["referrers"]),
                by_command=bool(record["by_command"]),
                in_file=bool(record["in_file"]),
                since=float(record["since"]),
                refreshed=None if refreshed is None else float(refreshed),
                digest=None if digest is None else Digest.parse(digest),
                contents={Digest.parse(text): int(size) for text, size in record["contents"].items()},
                error=str(record["error"]),
            )
        except (KeyError, TypeError, AttributeError, NameInvalid, DigestInvalid, OverflowError) as error:
            raise ValueError("not a pin") from error


@frozen
class PinnedContent:
    """The view of the pins that every process has. It reads the records, and is asked on rare errors only."""

    _records: Records

    def has_tag(self, key: str, reference: Reference) -> bool:
        """Return whether the image `reference` of the repository `key` is pinned."""
        return self._records.exists(PIN, key, str(reference))

    def has(self, key: str, digest: Digest) -> bool:
        """Return whether a pinned image of the repository `key` consists of `digest` and other things. Blocks."""
        text = str(digest)
        for entry in self._records.walk(PIN, key):
            contents = (self._records.read(entry) or {}).get("contents")
            if isinstance(contents, dict) and text in contents:
                return True
        return False


class Pins:
    """All pins, in the main process. `clock` returns POSIX time.

    Pins may take four fifths of `limit` bytes; each of their contents counts `cost` more than its size.
    """

    def __init__(
        self,
        reactor: Any,
        records: Records,
        clock: Callable[[], float],
        *,
        limit: int,
        cost: int,
    ) -> None:
        self._reactor = reactor
        self._records = records
        self._clock = clock
        self._keep: Callable[[Iterable[Digest]], None] = _ignore
        self._stop_keeping: Callable[[Iterable[Digest]], None] = _ignore
        self._cost = cost
        self._lock = DeferredLock()
        self._pins: dict[ImageName, Pin] = {}
        self._uses: Counter[Digest] = Counter()  # in how many pins it is
        self._sizes: dict[Digest, int] = {}  # with `cost`, the largest that a pin gave
        self._names: Counter[tuple[str, str]] = Counter()  # repositories with digests and tags that stay
        self._references: dict[str, tuple[str, ...]] = {}  # the tags and digests of pins, by repository
        self.bytes = 0
        """The bytes of all contents."""
        self.limit = limit * _QUOTA[0] // _QUOTA[1]

    def subscribe(
        self, keep: Callable[[Iterable[Digest]], None], stop_keeping: Callable[[Iterable[Digest]], None]
    ) -> None:
        """Call these with contents that are pinned from now on, and with those that no longer are."""
        self._keep, self._stop_keeping = keep, stop_keeping

    def load(self) -> None:
        """Read the pins from disk, before anything is evicted, and delete what a crash left beside them. Blocks."""
        self._records.clear_staging()
        try:
            entries = list(self._records.walk(PIN))
        except OSError as error:
            log.error("the pins cannot be read: {path}: {reason}", path=error.filename, reason=error.strerror)
            return
        for entry in entries:
            try:
                pin: Pin | None = Pin.from_record(self._records.read(entry) or {})
            except (ValueError, OSError):
                pin = self._damaged(entry)
            if pin is not None:
                self._replace(self._pins.get(pin.image), pin)

    def _damaged(self, entry: RecordEntry) -> Pin | None:
        """Return a pin without contents for a record that cannot be read; None if not even its name is known."""
        try:
            _, key, reference = entry.key
            image = ImageName.parse(f"{key}{'@' if ':' in reference else ':'}{reference}")
        except (ValueError, NameInvalid):
            log.error("a pin is lost, because {path} cannot be read; delete it", path=entry.path)
            return None
        log.error("the pin of {image} is damaged, and is fetched again: {path}", image=str(image), path=entry.path)
        error = "its record was damaged"
        return Pin(image, by_command=True, since=self._clock(), error=error)

    def __iter__(self) -> Any:
        return iter(list(self._pins.values()))

    def __len__(self) -> int:
        return len(self._pins)

    def get(self, image: ImageName) -> Pin | None:
        """Return the pin of `image`, if there is one."""
        return self._pins.get(image)

    def is_pinned(self, key: str, name: str | None = None) -> bool:
        """Return whether the tag or digest `name` of the repository `key`, or anything of it, is pinned."""
        return (key, name or "") in self._names

    def references(self, key: str) -> Sequence[str]:
        """Return the tags and digests of the repository `key` that are pinned. May be called in any thread."""
        return self._references.get(key, ())

    async def set(self, image: ImageName, **changes: Any) -> Pin:
        """Change or add the pin of `image`, on disk first. Return it.

        Raise `InsufficientStorage` or `StorageFailed` because of the disk, or `Denied` without room.
        """
        async with self._lock:
            old = self._pins.get(image)
            return await self._change(old, old or Pin(image, since=self._clock()), changes)

    async def update(self, image: ImageName, **changes: Any) -> None:
        """Change what is known of a pin, unless it is gone. Raise as `set` does."""
        async with self._lock:
            pin = self._pins.get(image)
            if pin is not None:
                await self._change(pin, pin, changes)

    async def _change(self, old: Pin | None, pin: Pin, changes: Mapping[str, Any]) -> Pin:
        new = evolve(pin, **changes)
        if new != old:
            await self._write(old, new)
        return new

    async def _write(self, old: Pin | None, new: Pin) -> None:
        if old is None and len(self._pins) >= MAX_PINS:
            raise Denied(f"{MAX_PINS} images are pinned already; unpin some of them")
        if len(new.contents) > MAX_CONTENTS:
            raise Denied(f"{new.image} consists of {len(new.contents)} parts; a pin may have {MAX_CONTENTS}")
        self._check_room(old, new)
        await self._on_disk(self._records.put, new.to_record(), *new.key)
        self._replace(old, new)

    async def remove(self, image: ImageName) -> None:
        """Remove a pin. Raise as `set` does."""
        async with self._lock:
            pin = self._pins.get(image)
            if pin is not None:
                await self._on_disk(self._records.remove, *pin.key)
                self._replace(pin, None)

    async def _on_disk(self, function: Callable[..., object], *arguments: Any) -> None:
        try:
            await in_thread(self._reactor, function, *arguments)
        except OSError as error:
            raise disk_error("CACHE_DIR", error) from error

    def _check_room(self, old: Pin | None, new: Pin) -> None:
        before = {} if old is None else old.contents
        added = sum(self._growth(digest, size) for digest, size in new.contents.items())
        freed = sum(self._sizes[digest] for digest in before if self._uses[digest] == 1 and digest not in new.contents)
        if added > freed and self.bytes + added - freed > self.limit:
            raise Denied(
                f"{new.image} needs {added} more bytes, and the pinned images have {self.bytes} of the {self.limit}"
                " that they may have, 80 % of CACHE_MAX_SIZE; unpin others or raise it"
            )

    def _replace(self, old: Pin | None, new: Pin | None) -> None:
        """Replace a pin in memory, and tell the cache what to keep."""
        if new is not None:
            if new.image not in self._pins:
                key = repository_key(new.image)
                self._references[key] = (*self.references(key), str(new.image.reference))
            self._pins[new.image] = new
            self._names.update(_names_of(new))
            self._add_contents(new)
        elif old is not None:
            del self._pins[old.image]
            key, reference = repository_key(old.image), str(old.image.reference)
            self._references[key] = tuple(other for other in self.references(key) if other != reference)
            if not self._references[key]:
                del self._references[key]
        if old is not None:
            for name in _names_of(old):
                self._names[name] -= 1
                if not self._names[name]:
                    del self._names[name]
            self._remove_contents(old)

    def _add_contents(self, pin: Pin) -> None:
        added = [digest for digest in pin.contents if digest not in self._sizes]
        self._uses.update(pin.contents.keys())
        for digest, size in pin.contents.items():
            growth = self._growth(digest, size)
            self._sizes[digest] = self._sizes.get(digest, 0) + growth
            self.bytes += growth
        if added:
            self._keep(added)

    def _growth(self, digest: Digest, size: int) -> int:
        """Return how many bytes more `digest` counts if it has `size`: registries that share it may say otherwise."""
        return max(0, size + self._cost - self._sizes.get(digest, 0))

    def _remove_contents(self, pin: Pin) -> None:
        removed = []
        for digest in pin.contents:
            self._uses[digest] -= 1
            if not self._uses[digest]:
                del self._uses[digest]
                self.bytes -= self._sizes.pop(digest)
                removed.append(digest)
        if removed:
            self._stop_keeping(removed)


def _ignore(digests: Iterable[Digest]) -> None:
    """Do nothing about what is pinned."""


def _names_of(pin: Pin) -> Iterable[tuple[str, str]]:
    key = repository_key(pin.image)
    return (key, ""), (key, str(pin.image.reference)), *((key, str(digest)) for digest in pin.contents)
