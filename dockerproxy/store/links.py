"""Which repository has which blobs and manifests, and what its tags mean: small files that hold a digest.

A link that a power cut left empty or torn counts as absent.
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterator

from attrs import define, field

from dockerproxy.errors import DigestInvalid, NameInvalid
from dockerproxy.oci.names import Digest, parse_tag
from dockerproxy.store.files import Staging, list_names, read_small
from dockerproxy.store.layout import Layout, digest_from_names

# The longest link is that of a sha512; what is longer than a media type can be (RFC 6838, section 4.2: 127 + 1 + 127)
# is none.
_LINK_LIMIT = 256
_MEDIA_TYPE_LIMIT = 255


@define
class Links:
    """The repositories below a root. `durable`: what is written outlives a power cut. Writing blocks.

    Callers build `repository` from validated parts; every method raises `NameInvalid` for one that is not.
    """

    _layout: Layout
    _durable: bool
    _staging: Staging = field(init=False)

    @_staging.default
    def _make_staging(self) -> Staging:
        return Staging(self._layout.staging, sync_data=self._durable, sync_names=self._durable)

    def has_layer(self, repository: str, digest: Digest) -> bool:
        """Say whether the repository has this blob."""
        return _link_exists(self._layout.layer(repository, digest))

    def link_layer(self, repository: str, digest: Digest) -> None:
        """Let the repository have this blob."""
        self._link(self._layout.layer(repository, digest), digest)

    def unlink_layer(self, repository: str, digest: Digest) -> bool:
        """Take this blob from the repository, and say whether it had it."""
        return self._staging.remove_tree(os.path.dirname(self._layout.layer(repository, digest)))

    def has_manifest(self, repository: str, digest: Digest) -> bool:
        """Say whether the repository has this manifest."""
        return _link_exists(self._layout.manifest(repository, digest))

    def link_manifest(self, repository: str, digest: Digest, media_type: str) -> None:
        """Let the repository have this manifest, of the type that upstream or the pushing client said."""
        # The type first: where the link is, the type is.
        if self.manifest_media_type(repository, digest) != media_type:
            self._staging.write(media_type.encode(), self._layout.media_type(repository, digest))
        self._link(self._layout.manifest(repository, digest), digest)
        # distribution's catalogue, and with it its garbage collector's mark phase, knows a repository by its `_layers`
        # (catalog.go, handleRepository): it would sweep the manifests of one that has none.
        self._staging.makedirs(self._layout.layers(repository))

    def unlink_manifest(self, repository: str, digest: Digest) -> bool:
        """Take this manifest from the repository, and say whether it had it. Its tags are the caller's to remove."""
        return self._staging.remove_tree(os.path.dirname(self._layout.manifest(repository, digest)))

    def manifest_media_type(self, repository: str, digest: Digest) -> str | None:
        """Return the manifest's media type; None where it is not known (a tree that another registry wrote)."""
        content = read_small(self._layout.media_type(repository, digest), _MEDIA_TYPE_LIMIT + 1)
        # It goes into a header: nothing but a torn or foreign file has other characters.
        if not content or len(content) > _MEDIA_TYPE_LIMIT or not content.isascii():
            return None
        text = content.decode("ascii")
        return text if text.isprintable() else None

    def tag(self, repository: str, tag: str) -> Digest | None:
        """Return the digest of the manifest that a tag means, None where there is no such tag."""
        return _read_link(self._layout.tag_current(repository, tag))

    def set_tag(self, repository: str, tag: str, digest: Digest) -> None:
        """Let a tag mean `digest`."""
        # In distribution's order (tagstore.go, Tag): what is current is always in the index.
        self._link(self._layout.tag_index(repository, tag, digest), digest)
        self._link(self._layout.tag_current(repository, tag), digest)

    def remove_tag(self, repository: str, tag: str) -> bool:
        """Remove a tag, not what it means, and say whether it was there."""
        existed = self.tag(repository, tag) is not None
        return self._staging.remove_tree(self._layout.tag(repository, tag)) and existed

    def tags(self, repository: str) -> list[str]:
        """Return the repository's tags in order. Blocks."""
        names = list_names(self._layout.tags(repository))
        return sorted(tag for tag in names if _is_tag(tag) and _link_exists(self._layout.tag_current(repository, tag)))

    def iter_tags(self, repository: str) -> Iterator[tuple[str, Digest | None]]:
        """Yield the repository's tags, in no order, with what each means: None where that cannot be read. Blocks."""
        for tag in filter(_is_tag, list_names(self._layout.tags(repository))):
            content = read_small(self._layout.tag_current(repository, tag), _LINK_LIMIT)
            if content:
                yield tag, _parse_link(content)

    def layers(self, repository: str) -> Iterator[Digest]:
        """Yield the blobs that the repository has a link to, a torn one too, in no order. Blocks."""
        yield from _iter_digests(self._layout.layers(repository))

    def manifests(self, repository: str) -> Iterator[Digest]:
        """Yield the manifests that the repository has a link to, a torn one too, in no order. Blocks."""
        yield from _iter_digests(self._layout.revisions(repository))

    def prune_tag_index(self, repository: str, digests: Container[str]) -> Iterator[None]:
        """Take from the memory of what tags meant once what is in `digests` (as text). Blocks, a moment a step."""
        for tag in filter(_is_tag, list_names(self._layout.tags(repository))):
            for digest in _iter_digests(f"{self._layout.tag(repository, tag)}/index"):
                if str(digest) in digests and self.tag(repository, tag) != digest:
                    self._staging.remove_tree(os.path.dirname(self._layout.tag_index(repository, tag, digest)))
                yield None

    def prune(self, repository: str) -> Iterator[None]:
        """Remove the directories of a repository that has nothing any more. Blocks, a moment a step.

        Whoever writes there at this moment makes them anew (`Staging.move`).
        """
        directory = self._layout.repository(repository)
        revisions, tags = self._layout.revisions(repository), self._layout.tags(repository)
        layers, referrers = self._layout.layers(repository), f"{directory}/_referrers"
        for parent in (revisions, tags, layers):
            yield from _remove_empty_children(parent)
        if any(list_names(top) for top in (revisions, tags, layers)):
            return
        for algorithm in list_names(referrers):
            yield from _remove_empty_children(f"{referrers}/{algorithm}")
            _rmdir_if_empty(f"{referrers}/{algorithm}")
        for candidate in (
            revisions,
            tags,
            f"{directory}/_manifests",
            layers,
            referrers,
            self._layout.uploads(repository),
        ):
            _rmdir_if_empty(candidate)
        if list_names(revisions):
            self._staging.makedirs(layers)
        remove_empty_directories(self._layout, directory)

    def repositories(self) -> Iterator[str]:
        """Yield the repositories that have, or had, a blob or manifest, in no order. Blocks."""
        return iter_repositories(self._layout, "_layers", "_manifests")

    def _link(self, path: str, digest: Digest) -> None:
        if _read_link(path) != digest:
            self._staging.write(str(digest).encode(), path)


def iter_repositories(layout: Layout, *subdirectories: str) -> Iterator[str]:
    """Yield the repositories that hold one of these directories, in no order. Blocks."""
    pending = [""]
    while pending:
        parent = pending.pop()
        for name in list_names(f"{layout.repositories}/{parent}"):
            # `_uploads` and whatever else is no repository is no name of one either.
            repository = f"{parent}/{name}" if parent else name
            try:
                directory = layout.repository(repository)
            except NameInvalid:
                continue
            pending.append(repository)
            if any(os.path.isdir(f"{directory}/{subdirectory}") for subdirectory in subdirectories):
                yield repository


def remove_empty_directories(layout: Layout, directory: str) -> None:
    """Remove `directory` if it is empty, and then those above it that are, as far as the repositories go. Blocks."""
    while directory != layout.repositories and _rmdir_if_empty(directory):
        directory = os.path.dirname(directory)


def _link_exists(path: str) -> bool:
    # The path says what it holds; one look suffices to tell a whole one from one that a power cut left empty.
    try:
        return os.stat(path).st_size > 0
    except (FileNotFoundError, NotADirectoryError):
        return False


def _read_link(path: str) -> Digest | None:
    return _parse_link(read_small(path, _LINK_LIMIT) or b"")


def _parse_link(content: bytes) -> Digest | None:
    try:
        return Digest.parse(content.decode("ascii").strip())
    except (DigestInvalid, UnicodeDecodeError):
        return None


def _is_tag(name: str) -> bool:
    try:
        parse_tag(name)
    except NameInvalid:
        return False
    return True


def _iter_digests(directory: str) -> Iterator[Digest]:
    """Yield the digests that the names below a directory, ``ALG/HEX``, make."""
    for algorithm in list_names(directory):
        for encoded in list_names(f"{directory}/{algorithm}"):
            digest = digest_from_names(algorithm, encoded)
            if digest is not None:
                yield digest


def _remove_empty_children(directory: str) -> Iterator[None]:
    for name in list_names(directory):
        _rmdir_if_empty(f"{directory}/{name}")
        yield None


def _rmdir_if_empty(directory: str) -> bool:
    try:
        os.rmdir(directory)
    except OSError:
        return False
    return True
