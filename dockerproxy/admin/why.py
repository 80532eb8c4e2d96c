"""Why an image is served as it is: the result of a pull now, and the results of earlier requests for it."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from typing import Any

from attrs import asdict, frozen

from dockerproxy.admin.explanations import explain
from dockerproxy.admin.resolver import CACHED, ImageRef, ImageResolver, InvalidArgument, NotFound, StoreView, parse_name
from dockerproxy.cache.access import GRANT, Access, AccessState
from dockerproxy.cache.freshness import Freshness
from dockerproxy.cache.identity import PUBLIC
from dockerproxy.cache.manifests import TagEntry, tag_entries
from dockerproxy.cache.rate_limits import RateLimits
from dockerproxy.errors import DigestInvalid, NameInvalid, RegistryError
from dockerproxy.oci.docker_hub import stored_name
from dockerproxy.oci.manifests import MAX_MANIFEST
from dockerproxy.oci.names import Digest, Host, Registry, parse_repository, parse_tag
from dockerproxy.oci.platforms import platform_name
from dockerproxy.oci.untrusted_json import JSONInvalid, parse_json
from dockerproxy.store.ingest import ingests_of
from dockerproxy.store.links import Visibility
from dockerproxy.store.pull_history import PullHistory
from dockerproxy.store.records import Records
from dockerproxy.store.tombstones import Tombstones, format_idle
from dockerproxy.store.tree_reader import UnsafeFile

_MAX_TAGS = 50
_MAX_CONTENTS = 500  # beside the manifest itself, of an image with all its platforms
_MAX_ROWS = 50  # of the history

Document = dict[str, Any]


@frozen
class Explainer:
    """Answers `dockerproxy why`. `registries` are those that are served, by host. `clock` returns POSIX time."""

    resolver: ImageResolver
    cache: StoreView
    registries: Mapping[Host, Registry]
    records: Records
    access: Access
    limits: RateLimits
    freshness: Freshness
    tombstones: Tombstones
    history: PullHistory
    clock: Callable[[], float] = time.time

    def explain(self, text: str, platform: str | None = None) -> Document:
        """Return the result that a pull of the image `text` would have now, and earlier results. Blocks.

        Raise `NotFound` if neither store and no served registry can have it, `InvalidArgument`, or the error of a
        hosted registry that does not answer.
        """
        path, tag, digest = parse_name(text)
        try:
            if tag is not None:
                parse_tag(tag)
            ref = self._find(path, tag, digest)
        except NameInvalid as error:
            raise InvalidArgument(error.message) from None
        name = ref.name
        counted = f"hosted/{name}" if ref.store.kind != CACHED else name
        registry = name.partition("/")[0] if ref.store.kind == CACHED else "the hosted registry"
        document = {
            "name": name,
            "where": ref.store.kind,
            "known": ref.store.has_repository(ref.repository),
            "tag": tag,
            "digest": None if digest is None else str(digest),
            "platform": platform,
            "pulls": {"days": 30, **asdict(self.history.counts.of(counted))},
            "happened": list(islice(self.rows(name, ref.store.kind, tag, digest), _MAX_ROWS)),
        }
        if ref.store.kind != CACHED:
            return {**document, **self._explain_hosted(ref, platform)}
        return {**document, **self._explain_cached(ref, registry, platform)}

    def rows(
        self, name: str, where: str, tag: str | None = None, digest: Digest | None = None, since: float = 0.0
    ) -> Iterator[Document]:
        """Yield the rows of the history about a repository, the newest first, each with an ``explanation``. Blocks.

        With `tag` or `digest`, those about other manifests are left out.
        """
        wanted = {str(digest)} if digest is not None else {tag} if tag is not None else None
        registry = name.partition("/")[0] if where == CACHED else "the hosted registry"
        for row in self.history.read(since, json.dumps(name)[1:-1]):
            if (row.get("repository"), row.get("where")) != (name, where):
                continue
            if wanted and row.get("kind") == "manifest" and row.get("reference") not in wanted:
                continue
            yield with_explanation(row, registry)

    def _find(self, path: str, tag: str | None, digest: Digest | None) -> ImageRef:
        try:
            found = self._resolve(path)
            return ImageRef(found.store, found.repository, tag, digest)
        except NotFound:
            key = stored_name(path)
            host = None if key is None else _parse_host(key.partition("/")[0])
            if key is None or host is None or host not in self.registries:
                raise
            parse_repository(key.partition("/")[2])
        return ImageRef(self.cache, key, tag, digest)

    def _resolve(self, path: str) -> ImageRef:
        """Return the repository `path`. The cache is searched also if the hosted registry does not answer."""
        resolver = self.resolver.snapshot()
        try:
            return resolver.resolve(path)
        except RegistryError as error:
            with suppress(NotFound):
                return resolver.resolve(path, CACHED)
            raise error

    # what would happen now

    def _explain_hosted(self, ref: ImageRef, platform: str | None) -> Document:
        digest = ref.digest
        if digest is None and ref.tag is not None:
            digest = ref.store.links.tag(ref.repository, ref.tag)
        state = None if ref.tag is None else {"tag": ref.tag, "digest": _text(digest), "sentence": "it is hosted here"}
        if state is not None and digest is None:
            state["sentence"] = "there is no such tag"
        tags = [state] if state is not None else []
        contents = [] if digest is None else list(self._contents(ref, digest, platform))
        return {"tags": tags, "refused_until": None, "readers": None, "contents": contents}

    def _explain_cached(self, ref: ImageRef, registry: str, platform: str | None) -> Document:
        now = self.clock()
        names = [ref.tag] if ref.tag is not None else [] if ref.digest else ref.store.links.tags(ref.repository)
        tags = [self._explain_tag(ref, name, registry, now) for name in names[:_MAX_TAGS]]
        digest = ref.digest
        if ref.tag is not None and tags[0]["digest"] is not None:
            digest = Digest.parse(tags[0]["digest"])
        contents = [] if digest is None else list(self._contents(ref, digest, platform))
        refused_until = self._refused_until(ref.repository, now)
        return {
            "tags": tags,
            "refused_until": refused_until,
            "readers": self._explain_readers(ref.repository, registry, digest, now),
            "contents": contents,
        }

    def _explain_tag(self, ref: ImageRef, tag: str, registry: str, now: float) -> Document:
        entries = [entry for entry in tag_entries(self.records, ref.repository, tag) if not entry.claimed]
        entry: TagEntry | None = entries[0] if entries else None
        document = {
            "tag": tag, "digest": None, "asked": None, "fresh_until": None,
            "sentence": f"nothing is known of it here: {registry} is asked by GET, which counts as a pull",
        }  # fmt: skip
        if entry is None:
            return document
        lifetime = self.freshness.lifetime(tag)
        is_fresh = self.freshness.is_fresh(tag, now - entry.checked_at)
        sentence = f"{registry} is asked by HEAD whether it has moved, which counts as no pull"
        if is_fresh:
            sentence = f"it is fresh, so {registry} is not asked"
        return {
            "tag": tag,
            "digest": str(entry.digest),
            "asked": entry.checked_at,
            "fresh_until": entry.checked_at + lifetime if is_fresh else None,
            "sentence": sentence,
        }

    def _refused_until(self, repository: str, now: float) -> float | None:
        try:
            until = self.limits.get(Registry.parse(repository.partition("/")[0])).refused_until
        except NameInvalid:
            return None
        return until if until > now else None

    def _explain_readers(self, repository: str, registry: str, digest: Digest | None, now: float) -> Document:
        """Return for whom the content is: everybody, or those whose login the registry accepts."""
        is_public, is_private = True, False
        if digest is not None:
            visibility = self.cache.links.manifest_visibility(repository, digest)
            is_public, is_private = visibility is Visibility.PUBLIC, visibility is Visibility.PRIVATE
        state = self.access.state(repository, PUBLIC, public=is_public)
        at = (self.records.get(GRANT, repository, PUBLIC) or {}).get("at")
        granted_at = at if is_public and state is not AccessState.UNKNOWN and isinstance(at, int | float) else None
        if granted_at is None and is_private:
            sentence = f"logins: {registry} is asked about each of them"
        elif granted_at is None:
            sentence = f"clients that {registry} admits: it is asked about each of them"
        elif state is AccessState.GRANTED:
            sentence = f"everybody: {registry} said so to a request without a login"
        else:
            sentence = f"everybody, if {registry} says so again, or if it cannot be asked"
        return {"public": granted_at is not None, "at": granted_at, "sentence": sentence}

    def _contents(self, ref: ImageRef, root: Digest, platform: str | None) -> Iterator[Document]:
        """Yield the manifest `root`, and at most `_MAX_CONTENTS` that it leads to, with whether each is here."""
        pending: deque[tuple[str, Digest, int | None, str | None]] = deque([("manifest", root, None, None)])
        known = {root}
        while pending:
            kind, digest, size, of_platform = pending.popleft()
            stored_size = ref.store.contents.size(digest)
            # A registry may send thousands of manifests with thousands of layers each, none of which would be shown.
            is_read = kind == "manifest" and stored_size is not None and len(known) <= _MAX_CONTENTS
            children = _children(self._read(ref, digest)) if is_read else []
            if platform is not None:
                children = [child for child in children if child[3] in (None, platform)]
            yield {
                "kind": "index" if any(child[0] == "manifest" for child in children) else kind,
                "digest": str(digest),
                "platform": of_platform,
                "size": size if stored_size is None else stored_size,
                **self._state(ref, digest, stored_size is not None),
            }
            for child_kind, child, child_size, own in children:
                if child not in known and len(known) <= _MAX_CONTENTS:
                    known.add(child)
                    pending.append((child_kind, child, child_size, own or of_platform))

    def _state(self, ref: ImageRef, digest: Digest, is_here: bool) -> Document:
        document: Document = {"state": "here" if is_here else "absent", "evicted": None, "idle": None}
        if is_here or ref.store.kind != CACHED:
            sentence = "here" if is_here else "absent: it is damaged, or was never pushed"
        elif ingests_of(ref.store.layout, digest):
            document["state"], sentence = "partial", "partly here: a pull downloads the rest"
        elif (tombstone := self.tombstones.find(digest)) is not None:
            date = time.strftime("%Y-%m-%d", time.gmtime(tombstone.evicted_at))
            document |= {"state": "evicted", "evicted": tombstone.evicted_at, "idle": tombstone.idle}
            sentence = f"evicted on {date} after {format_idle(tombstone.idle)} without a use: a pull downloads it"
        else:
            sentence = "absent: a pull downloads it"
        return {**document, "sentence": sentence}

    def _read(self, ref: ImageRef, digest: Digest) -> bytes:
        try:
            return ref.store.reader.read_small(ref.store.layout.blob(digest), MAX_MANIFEST) or b""
        except UnsafeFile:
            return b""


def with_explanation(row: Document, registry: str) -> Document:
    """Return a row of the history with its cause in words."""
    return {**row, "explanation": explain(str(row.get("verdict")), str(row.get("because")), registry)}


def registry_of(row: Document) -> str:
    """Return the registry of a row of the history, as people write it."""
    return "the hosted registry" if row.get("where") != CACHED else str(row.get("repository")).partition("/")[0]


def _children(content: bytes) -> list[tuple[str, Digest, int | None, str | None]]:
    """Return the descriptors in a manifest: kind, digest, size, and platform. All that is malformed is left out."""
    try:
        document = parse_json(content)
    except JSONInvalid:
        return []
    if not isinstance(document, dict):
        return []
    lists = (("manifest", document.get("manifests")), ("config", [document.get("config")]))
    found = []
    for kind, entries in (*lists, ("layer", document.get("layers"))):
        for entry in entries if isinstance(entries, list) else ():
            if isinstance(entry, dict):
                try:
                    digest = Digest.parse(str(entry.get("digest")))
                except DigestInvalid:
                    continue
                size = entry.get("size")
                own = platform_name(entry.get("platform"))
                found.append((kind, digest, size if isinstance(size, int) else None, own))
    return found


def _parse_host(text: str) -> Host | None:
    try:
        return Host.parse(text)
    except NameInvalid:
        return None


def _text(digest: Digest | None) -> str | None:
    return None if digest is None else str(digest)
