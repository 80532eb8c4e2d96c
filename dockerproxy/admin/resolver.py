"""Resolution of the names that users give to repositories and images."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from attrs import evolve, field, frozen

from dockerproxy.errors import DigestInvalid, NameInvalid
from dockerproxy.oci.docker_hub import names_host, short_name, shown_name, stored_name
from dockerproxy.oci.names import Digest
from dockerproxy.store.contents import Contents
from dockerproxy.store.layout import Layout
from dockerproxy.store.links import Links
from dockerproxy.store.platforms import KnownPlatforms, PlatformReader
from dockerproxy.store.tree_reader import TreeReader

HOSTED, CACHED = "hosted", "cached"

_MAX_SUGGESTIONS = 3
_MAX_NAMES = 200  # that a shell gets to propose
_SHOWN = 200  # characters of an unknown name in an error


class InvalidArgument(Exception):
    """A malformed or ambiguous name. The message is for the user."""


class NotFound(Exception):
    """An unknown name. The message is for the user; `suggestions` are similar names."""

    def __init__(self, message: str, suggestions: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.suggestions = tuple(suggestions)


@frozen
class StoreView:
    """One of the two stores. `kind` is ``hosted`` or ``cached``; cached repositories begin with the registry's host.

    `open_reader` returns what reads the store: its directory, or a bucket.
    """

    kind: str
    layout: Layout
    _open_reader: Callable[[], TreeReader] = TreeReader
    _known_platforms: KnownPlatforms = field(factory=dict)
    reader: TreeReader = field(init=False)
    contents: Contents = field(init=False)
    links: Links = field(init=False)
    platforms: PlatformReader = field(init=False)

    @reader.default
    def _make_reader(self) -> TreeReader:
        return self._open_reader()

    @contents.default
    def _make_contents(self) -> Contents:
        return Contents(self.layout, self.reader)

    @links.default
    def _make_links(self) -> Links:
        return Links(self.layout, durable=False, reader=self.reader)

    def snapshot(self) -> StoreView:
        """Return a view for one answer: of what others have read, it knows the platforms only."""
        return evolve(self)

    @platforms.default
    def _platforms(self) -> PlatformReader:
        return PlatformReader(self.contents, self._known_platforms)

    def shown(self, repository: str) -> str:
        """Return the name of `repository` as people write it."""
        return repository if self.kind == HOSTED else shown_name(repository)

    def has_repository(self, repository: str) -> bool:
        """Return whether the repository has a tag, even a torn one, a manifest or a layer. Blocks."""
        try:
            self.layout.repository(repository)
        except NameInvalid:
            return False
        return self.has_images(repository) or next(self.links.layers(repository), None) is not None

    def has_images(self, repository: str) -> bool:
        """Return whether the repository has a tag, even a torn one, or a manifest. Blocks."""
        listings: tuple[Iterator[object], ...] = (self.links.iter_tags(repository), self.links.manifests(repository))
        return any(next(entries, None) is not None for entries in listings)


@frozen
class ImageRef:
    """A repository in a store; with `tag` or `digest`, one image or blob of it."""

    store: StoreView
    repository: str
    tag: str | None = None
    digest: Digest | None = None

    @property
    def name(self) -> str:
        """The name of the repository as people write it."""
        return self.store.shown(self.repository)

    def __str__(self) -> str:
        if self.digest is not None:
            return f"{self.name}@{self.digest}"
        return self.name if self.tag is None else f"{self.name}:{self.tag}"


@frozen
class ImageResolver:
    """Resolves ``REPO``, ``REPO:TAG`` and ``REPO@DIGEST`` in the hosted store, and ``HOST/REPO…`` in the cache.

    `registry_hostnames` are the host names that may precede a hosted repository. A name without a host is the hosted
    repository, if there is one, and otherwise that of Docker Hub: ``nginx`` is ``docker.io/library/nginx``.
    """

    stores: Sequence[StoreView]
    registry_hostnames: frozenset[str]

    def snapshot(self) -> ImageResolver:
        """Return a resolver for one answer; see `StoreView.snapshot`."""
        return evolve(self, stores=[store.snapshot() for store in self.stores])

    def resolve(self, text: str, kind: str | None = None) -> ImageRef:
        """Return the image or repository that `text` names, in the store `kind` if given. Blocks.

        Raise `NotFound`, or `InvalidArgument` if `text` is malformed or ambiguous.
        """
        path, tag, digest = parse_name(text)
        matches = [
            (store, repository)
            for store in self.stores
            if kind in (None, store.kind)
            for repository in self._candidates(store, path)
            if store.has_repository(repository)
        ]
        if not matches:
            raise NotFound(f"no such repository: {_shortened(path)}", self._suggestions(path, tag, kind))
        # Until gc, a repository without images has links to layers; it hides none of Docker Hub.
        matches.sort(key=lambda match: not match[0].has_images(match[1]))
        store, repository = matches[0]
        if any(other is not store for other, _ in matches) and names_host(path):
            raise InvalidArgument(f"{path} is both hosted and cached; choose one with --hosted or --cached")
        if tag is not None:
            _check_tag(store, repository, tag)
        if digest is not None:
            linked = store.links.has_manifest(repository, digest)
            if not linked and not (store.kind == CACHED and store.links.has_layer(repository, digest)):
                raise NotFound(f"{store.shown(repository)} has no manifest {digest}")
        return ImageRef(store, repository, tag, digest)

    def complete(self, prefix: str, kind: str | None = None) -> list[str]:
        """Return names that begin with `prefix`, in the store `kind` if given, for a shell to propose. Blocks.

        They are repositories, or images if `prefix` names a repository and begins a tag: at most 200 of them.
        """
        repository, colon, tag = prefix.rpartition(":")
        if colon and repository and "/" not in tag:
            return [f"{repository}:{name}" for name in self._tags(repository, kind) if name.startswith(tag)][
                :_MAX_NAMES
            ]
        found = (
            name for store in self.stores if kind in (None, store.kind) for name in _complete_repository(store, prefix)
        )
        return list(islice(dict.fromkeys(found), _MAX_NAMES))

    def _tags(self, path: str, kind: str | None) -> list[str]:
        try:
            ref = self.resolve(path, kind)
        except (NotFound, InvalidArgument):
            return []
        return ref.store.links.tags(ref.repository)

    def _candidates(self, store: StoreView, path: str) -> Iterator[str]:
        yield path
        first, slash, rest = path.partition("/")
        if store.kind == HOSTED:
            if slash and first.partition(":")[0].lower() in self.registry_hostnames:
                yield rest
        elif (stored := stored_name(path)) is not None and stored != path:
            yield stored

    def _suggestions(self, path: str, tag: str | None, kind: str | None) -> list[str]:
        known = {
            store.shown(repository): (store, repository)
            for store in self.stores
            if kind in (None, store.kind)
            for repository in store.links.repositories()
        }
        # Names that differ only by a prefix: a registry's host, or the address by which ours was reached.
        longer_or_shorter = [name for name in known if name.endswith(f"/{path}") or path.endswith(f"/{name}")]
        by_form = {form: name for name in known for form in (name, short_name(name))}
        similar = (by_form[form] for form in _close_matches(path, list(by_form)))
        suggestions = (
            name if tag is None else f"{name}:{tag}"
            for name in dict.fromkeys((*longer_or_shorter, *similar))
            if known[name][0].has_repository(known[name][1])
        )
        return list(islice(suggestions, _MAX_SUGGESTIONS))


def _complete_repository(store: StoreView, prefix: str) -> Iterator[str]:
    """Yield the names of repositories with images that begin with `prefix`, sorted, the shorter of two of them too."""
    names = [
        (repository, name)
        for repository in sorted(store.links.repositories())
        for name in dict.fromkeys((store.shown(repository), *([short_name(store.shown(repository))] if prefix else [])))
        if name.startswith(prefix)
    ]
    has_images = store.reader.map(store.has_images, (repository for repository, _ in names))
    return (name for (_, name), is_shown in zip(names, has_images, strict=True) if is_shown)


def _close_matches(text: str, names: Sequence[str]) -> list[str]:
    """Return the `names` that resemble `text` or begin with it, ignoring case."""
    by_lowercase = {name.lower(): name for name in names}
    prefix_matches = [name for name in by_lowercase if text and name.startswith(text.lower())]
    matches = dict.fromkeys(
        (*difflib.get_close_matches(text.lower(), by_lowercase, _MAX_SUGGESTIONS), *prefix_matches[:_MAX_SUGGESTIONS])
    )
    return [by_lowercase[name] for name in matches][:_MAX_SUGGESTIONS]


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({len(text)} characters)"


def parse_name(text: str) -> tuple[str, str | None, Digest | None]:
    """Return the repository, the tag and the digest in `text`. Raise `InvalidArgument`."""
    name, at, encoded = text.partition("@")
    digest = None
    if at:
        try:
            digest = Digest.parse(encoded)
        except DigestInvalid as error:
            raise InvalidArgument(error.message) from None
    # A colon before a slash belongs to a port.
    repository, colon, tag = name.rpartition(":")
    if not colon or "/" in tag:
        repository, tag = name, ""
    if not repository or (colon and not tag and name.endswith(":")):
        raise InvalidArgument(f"{_shortened(text)!r} is not of the form REPO, REPO:TAG or REPO@DIGEST")
    # Docker's rule: a tag beside a digest is ignored.
    return repository, tag if tag and digest is None else None, digest


def _check_tag(store: StoreView, repository: str, tag: str) -> None:
    if not store.links.has_tag(repository, tag):
        tags = store.links.tags(repository)
        name = store.shown(repository)
        similar = [f"{name}:{other}" for other in _close_matches(tag, tags)]
        raise NotFound(f"{name} has no tag {_shortened(tag)}", similar)
