"""What people call repositories and images, and which of ours they mean."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence

from attrs import field, frozen

from dockerproxy.errors import DigestInvalid, NameInvalid
from dockerproxy.oci.names import Digest
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.layout import Layout
from dockerproxy.store.links import Links

HOSTED, CACHED = "hosted", "cached"

_MAX_SUGGESTIONS = 3


class InvalidArgument(Exception):
    """A name that is none, or that two things have: a sentence."""


class NotFound(Exception):
    """A name that nothing has: a sentence, and names that are near it."""

    def __init__(self, message: str, suggestions: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.suggestions = tuple(suggestions)


@frozen
class StoreView:
    """One of the two stores. `where` is ``hosted`` or ``cached``; in the latter, repositories begin with a host."""

    kind: str
    layout: Layout
    blobs: Blobs = field(init=False)
    links: Links = field(init=False)

    @blobs.default
    def _blobs(self) -> Blobs:
        return Blobs(self.layout, durable=False)

    @links.default
    def _links(self) -> Links:
        return Links(self.layout, durable=False)

    def has_repository(self, repository: str) -> bool:
        """Say whether the repository has anything. Blocks."""
        try:
            listings: tuple[Iterator[object], ...] = (
                iter(self.links.tags(repository)), self.links.manifests(repository), self.links.layers(repository)
            )  # fmt: skip
        except NameInvalid:
            return False
        return any(next(entries, None) is not None for entries in listings)


@frozen
class ImageRef:
    """A repository on a shelf or, where there is a tag or a digest, that of it."""

    store: StoreView
    repository: str
    tag: str | None = None
    digest: Digest | None = None

    def __str__(self) -> str:
        if self.digest is not None:
            return f"{self.repository}@{self.digest}"
        return self.repository if self.tag is None else f"{self.repository}:{self.tag}"


@frozen
class ImageResolver:
    """Finds what is meant by ``REPO``, ``REPO:TAG`` and ``REPO@DIGEST``, of what is hosted, and ``HOST/REPO…`` of what
    is cached.

    `own_names`: hosts that may stand before a hosted repository. `aliases`: other names of hosts of cached ones.
    """

    stores: Sequence[StoreView]
    registry_hostnames: frozenset[str]
    host_aliases: Mapping[str, str]

    def resolve(self, text: str, kind: str | None = None) -> ImageRef:
        """Return what `text` means, on the shelf `where` if given. Blocks. Raise `NotFound`, `NotUnderstood`."""
        path, tag, digest = _parse_name(text)
        matches = [
            (store, repository)
            for store in self.stores
            if kind in (None, store.kind)
            for repository in self._candidates(store, path)
            if store.has_repository(repository)
        ]
        if not matches:
            raise NotFound(f"there is no repository {path}", self._suggestions(path, tag, kind))
        store, repository = matches[0]
        if any(other is not store for other, _ in matches):
            raise InvalidArgument(f"{path} is both hosted and cached: say which with --hosted or --cached")
        if tag is not None:
            _check_tag(store, repository, tag)
        if digest is not None:
            linked = store.links.has_manifest(repository, digest)
            if not linked and not (store.kind == CACHED and store.links.has_layer(repository, digest)):
                raise NotFound(f"{repository} has no manifest {digest}")
        return ImageRef(store, repository, tag, digest)

    def _candidates(self, store: StoreView, path: str) -> Iterator[str]:
        yield path
        first, slash, rest = path.partition("/")
        if store.kind == HOSTED:
            if slash and first.partition(":")[0].lower() in self.registry_hostnames:
                yield rest
        elif first in self.host_aliases:
            # As docker does: ubuntu is library/ubuntu.
            yield f"{self.host_aliases[first]}/{rest if '/' in rest else f'library/{rest}'}"

    def _suggestions(self, path: str, tag: str | None, kind: str | None) -> list[str]:
        names = [
            repository
            for store in self.stores
            if kind in (None, store.kind)
            for repository in store.links.repositories()
            if store.has_repository(repository)
        ]
        # With what stands before it elsewhere: a registry's host, or the address that ours was reached by.
        longer_or_shorter = [name for name in names if name.endswith(f"/{path}") or path.endswith(f"/{name}")]
        suggestions = dict.fromkeys((*longer_or_shorter, *_close_matches(path, names)))
        return [name if tag is None else f"{name}:{tag}" for name in suggestions][:_MAX_SUGGESTIONS]


def _close_matches(text: str, names: Sequence[str]) -> list[str]:
    """Return the `names` that are spelled like `text`, or begin so; in upper case or lower."""
    by_lowercase = {name.lower(): name for name in names}
    prefix_matches = [name for name in by_lowercase if text and name.startswith(text.lower())]
    matches = dict.fromkeys(
        (*difflib.get_close_matches(text.lower(), by_lowercase, _MAX_SUGGESTIONS), *prefix_matches[:_MAX_SUGGESTIONS])
    )
    return [by_lowercase[name] for name in matches][:_MAX_SUGGESTIONS]


def _parse_name(text: str) -> tuple[str, str | None, Digest | None]:
    name, at, encoded = text.partition("@")
    digest = None
    if at:
        try:
            digest = Digest.parse(encoded)
        except DigestInvalid as error:
            raise InvalidArgument(error.message) from None
    # The colon of a port has a slash behind it.
    repository, colon, tag = name.rpartition(":")
    if not colon or "/" in tag:
        repository, tag = name, ""
    if not repository or (colon and not tag and name.endswith(":")):
        raise InvalidArgument(f"{text!r} is not REPO, REPO:TAG or REPO@DIGEST")
    # As docker has it: beside a digest a tag means nothing.
    return repository, tag if tag and digest is None else None, digest


def _check_tag(store: StoreView, repository: str, tag: str) -> None:
    tags = store.links.tags(repository)
    if tag not in tags:
        raise NotFound(f"{repository} has no tag {tag}", [f"{repository}:{name}" for name in _close_matches(tag, tags)])
