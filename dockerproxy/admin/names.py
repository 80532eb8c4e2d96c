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

_SUGGESTED = 3


class NotUnderstood(Exception):
    """A name that is none, or that two things have: a sentence."""


class NotFound(Exception):
    """A name that nothing has: a sentence, and names that are near it."""

    def __init__(self, message: str, suggestions: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.suggestions = tuple(suggestions)


@frozen
class Shelf:
    """One of the two stores. `where` is ``hosted`` or ``cached``; in the latter, repositories begin with a host."""

    where: str
    layout: Layout
    blobs: Blobs = field(init=False)
    links: Links = field(init=False)

    @blobs.default
    def _blobs(self) -> Blobs:
        return Blobs(self.layout, durable=False)

    @links.default
    def _links(self) -> Links:
        return Links(self.layout, durable=False)

    def has(self, repository: str) -> bool:
        """Say whether the repository has anything. Blocks."""
        try:
            things: tuple[Iterator[object], ...] = (
                iter(self.links.tags(repository)), self.links.manifests(repository), self.links.layers(repository)
            )  # fmt: skip
        except NameInvalid:
            return False
        return any(next(found, None) is not None for found in things)


@frozen
class Named:
    """A repository on a shelf or, where there is a tag or a digest, that of it."""

    shelf: Shelf
    repository: str
    tag: str | None = None
    digest: Digest | None = None

    def __str__(self) -> str:
        if self.digest is not None:
            return f"{self.repository}@{self.digest}"
        return self.repository if self.tag is None else f"{self.repository}:{self.tag}"


@frozen
class Names:
    """Finds what is meant by ``REPO``, ``REPO:TAG`` and ``REPO@DIGEST``, of what is hosted, and ``HOST/REPO…`` of what
    is cached.

    `own_names`: hosts that may stand before a hosted repository. `aliases`: other names of hosts of cached ones.
    """

    shelves: Sequence[Shelf]
    own_names: frozenset[str]
    aliases: Mapping[str, str]

    def find(self, text: str, where: str | None = None) -> Named:
        """Return what `text` means, on the shelf `where` if given. Blocks. Raise `NotFound`, `NotUnderstood`."""
        path, tag, digest = _split(text)
        found = [
            (shelf, repository)
            for shelf in self.shelves
            if where in (None, shelf.where)
            for repository in self._spellings(shelf, path)
            if shelf.has(repository)
        ]
        if not found:
            raise NotFound(f"there is no repository {path}", self._near(path, tag, where))
        shelf, repository = found[0]
        if any(other is not shelf for other, _ in found):
            raise NotUnderstood(f"{path} is both hosted and cached: say which with --hosted or --cached")
        if tag is not None:
            _check_tag(shelf, repository, tag)
        if digest is not None:
            linked = shelf.links.has_manifest(repository, digest)
            if not linked and not (shelf.where == CACHED and shelf.links.has_layer(repository, digest)):
                raise NotFound(f"{repository} has no manifest {digest}")
        return Named(shelf, repository, tag, digest)

    def _spellings(self, shelf: Shelf, path: str) -> Iterator[str]:
        yield path
        first, slash, rest = path.partition("/")
        if shelf.where == HOSTED:
            if slash and first.partition(":")[0].lower() in self.own_names:
                yield rest
        elif first in self.aliases:
            # As docker does: ubuntu is library/ubuntu.
            yield f"{self.aliases[first]}/{rest if '/' in rest else f'library/{rest}'}"

    def _near(self, path: str, tag: str | None, where: str | None) -> list[str]:
        names = [
            repository
            for shelf in self.shelves
            if where in (None, shelf.where)
            for repository in shelf.links.repositories()
            if shelf.has(repository)
        ]
        # With what stands before it elsewhere: a registry's host, or the address that ours was reached by.
        longer_or_shorter = [name for name in names if name.endswith(f"/{path}") or path.endswith(f"/{name}")]
        near = dict.fromkeys((*longer_or_shorter, *_close(path, names)))
        return [name if tag is None else f"{name}:{tag}" for name in near][:_SUGGESTED]


def _close(text: str, names: Sequence[str]) -> list[str]:
    """Return the `names` that are spelled like `text`, or begin so; in upper case or lower."""
    folded = {name.lower(): name for name in names}
    begun = [name for name in folded if text and name.startswith(text.lower())]
    found = dict.fromkeys((*difflib.get_close_matches(text.lower(), folded, _SUGGESTED), *begun[:_SUGGESTED]))
    return [folded[name] for name in found][:_SUGGESTED]


def _split(text: str) -> tuple[str, str | None, Digest | None]:
    name, at, encoded = text.partition("@")
    digest = None
    if at:
        try:
            digest = Digest.parse(encoded)
        except DigestInvalid as error:
            raise NotUnderstood(error.message) from None
    # The colon of a port has a slash behind it.
    before, colon, tag = name.rpartition(":")
    if not colon or "/" in tag:
        before, tag = name, ""
    if not before or (colon and not tag and name.endswith(":")):
        raise NotUnderstood(f"{text!r} is not REPO, REPO:TAG or REPO@DIGEST")
    # As docker has it: beside a digest a tag means nothing.
    return before, tag if tag and digest is None else None, digest


def _check_tag(shelf: Shelf, repository: str, tag: str) -> None:
    tags = shelf.links.tags(repository)
    if tag not in tags:
        raise NotFound(f"{repository} has no tag {tag}", [f"{repository}:{name}" for name in _close(tag, tags)])
