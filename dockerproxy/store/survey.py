"""The mark phase of garbage collection: what a registry needs of what it holds, found by reading its manifests."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Container, Generator, Iterable, Iterator, Mapping
from contextlib import suppress

from attrs import define, field, frozen

from dockerproxy.errors import ManifestInvalid
from dockerproxy.oci.manifests import KNOWN_TYPES, MAX_MANIFEST, Manifest, media_type_of, parse_manifest
from dockerproxy.oci.names import Digest
from dockerproxy.store.layout import Layout
from dockerproxy.store.links import Links

_DIGEST = re.compile(rb"(?:sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})(?![0-9a-f])")

_PART = 32
"""So many manifests go in one step at most. An image for all platforms, with its signatures, has fewer."""

_SOME = 200  # names looked at in one step of reading


@frozen
class References:
    """What one manifest refers to: `contents` are all but the subject, `manifests` those of them that may be manifests.

    They may be blobs too: BuildKit's cache is an index of blobs.
    """

    contents: frozenset[Digest] = frozenset()
    manifests: tuple[Digest, ...] = ()
    subject: Digest | None = None


_NOTHING = References()


@frozen(eq=False)
class Group:
    """Manifests of a repository that nothing needs but others of the group: an index, its images, their signatures.

    They stay or go together, in one step; a large one in `parts`, those first that refer to others.
    """

    repository: str
    parts: tuple[tuple[Digest, ...], ...]
    references: Mapping[Digest, References] = field(repr=False)


@frozen
class Problem:
    """Something in a repository that could not be understood."""

    repository: str
    what: str

    def __str__(self) -> str:
        return f"{self.repository}: {self.what}"


class Unreadable(Exception):
    """A sentence's end about a manifest that cannot be read."""


@define
class Survey:
    """What is `needed` by any repository, and what each has that it does not need.

    A tag needs its manifest; a manifest needs what it refers to, its subject too, and all that refers to it as their
    subject. `delete_untagged`: else every manifest is needed. One whose content was used after `cutoff` (POSIX time)
    is needed in any case. Of a repository with a manifest that cannot be read, everything is: there is no telling.
    """

    _layout: Layout
    _links: Links
    cutoff: float
    delete_untagged: bool
    needed: set[Digest] = field(factory=set, init=False)
    idle_manifests: list[Group] = field(factory=list, init=False)
    idle_layers: dict[str, set[Digest]] = field(factory=dict, init=False)
    problems: list[Problem] = field(factory=list, init=False)
    repositories: list[str] = field(factory=list, init=False)
    manifests: int = field(default=0, init=False)
    recent: int = field(default=0, init=False)  # manifests that are needed for having been used only

    def steps(self) -> Iterator[None]:
        """Make the survey, a moment's work a step. Blocks."""
        for repository in self._links.repositories():
            yield from self._survey(repository)
            self.repositories.append(repository)

    def keep(self, group: Group, members: Iterable[Digest]) -> None:
        """Need `members` of a group after all."""
        idle = self.idle_layers.get(group.repository, set())
        for member in members:
            contents = group.references[member].contents
            self.needed.add(member)
            self.needed |= contents
            idle -= contents

    def _survey(self, repository: str) -> Iterator[None]:
        graph = _Graph(self._layout, self._links, repository)
        kept: set[Digest] = set()
        try:
            tagged, recent = yield from self._read(repository, graph)
            yield from graph.spread(tagged, kept)
            if not self.delete_untagged:
                recent = set(graph.references)
            else:
                recent -= kept
                self.recent += len(recent)
            yield from graph.spread(recent, kept)
        except Unreadable as error:
            self.problems.append(Problem(repository, f"{error}; nothing is removed from this repository"))
            yield from self._need_all(repository)
            return
        yield from self._note_groups(repository, graph, kept)
        needed = set(kept)
        for digest in kept:
            needed |= graph.references.get(digest, _NOTHING).contents
            yield None
        self.needed |= needed
        idle = set()
        for count, layer in enumerate(self._links.layers(repository)):
            if layer not in needed:
                idle.add(layer)
            if count % _SOME == 0:
                yield None
        if idle:
            self.idle_layers[repository] = idle

    def _read(self, repository: str, graph: _Graph) -> Generator[None, None, tuple[set[Digest], set[Digest]]]:
        """Read the repository's manifests; return those that have a tag, and those that were used after `cutoff`."""
        tagged: dict[str, Digest] = {}
        for tag in self._links.tags(repository):
            digest = self._links.tag(repository, tag)
            if digest is not None:
                tagged[tag] = digest
            elif os.path.exists(self._layout.tag_current(repository, tag)):
                raise Unreadable(f"the link of the tag {tag} cannot be read")
            yield None
        recent: set[Digest] = set()
        for digest in self._links.manifests(repository):
            graph.read(digest)
            self.manifests += 1
            if graph.dates[digest] > self.cutoff:
                recent.add(digest)
            yield None
        for tag, digest in tagged.items():
            if digest not in graph.references and not self._links.has_manifest(repository, digest):
                if self._links.tag(repository, tag) == digest:
                    raise Unreadable(f"the tag {tag} means {digest}, which is no manifest of it")
        return set(tagged.values()), recent

    def _need_all(self, repository: str) -> Iterator[None]:
        for tag in self._links.tags(repository):
            digest = self._links.tag(repository, tag)
            if digest is not None:
                self.needed.add(digest)
        for digest in self._links.manifests(repository):
            self.needed.add(digest)
            with suppress(Unreadable):
                self.needed |= _Graph(self._layout, self._links, repository).read(digest).contents
            yield None
        for count, layer in enumerate(self._links.layers(repository)):
            self.needed.add(layer)
            if count % _SOME == 0:
                yield None

    def _note_groups(self, repository: str, graph: _Graph, kept: set[Digest]) -> Iterator[None]:
        left = graph.references.keys() - kept
        while left:
            members: set[Digest] = set()
            yield from graph.spread({next(iter(left))}, members, within=left, upwards=True)
            left -= members
            ordered = sorted(members, key=lambda member: (not graph.references[member].manifests, str(member)))
            parts = tuple(tuple(ordered[start : start + _PART]) for start in range(0, len(ordered), _PART))
            references = {member: graph.references[member] for member in ordered}
            self.idle_manifests.append(Group(repository, parts, references))


@define
class _Graph:
    """The manifests of one repository, and how they hang together."""

    _layout: Layout
    _links: Links
    _repository: str
    references: dict[Digest, References] = field(factory=dict, init=False)
    dates: dict[Digest, float] = field(factory=dict, init=False)
    _indexes: dict[Digest, list[Digest]] = field(factory=lambda: defaultdict(list), init=False)
    _referrers: dict[Digest, list[Digest]] = field(factory=lambda: defaultdict(list), init=False)

    def read(self, digest: Digest) -> References:
        """Take a manifest in, and return what it refers to; raise `Unreadable`."""
        references, self.dates[digest] = self._load(digest)
        self.references[digest] = references
        for child in references.manifests:
            self._indexes[child].append(digest)
        if references.subject is not None:
            self._referrers[references.subject].append(digest)
        return references

    def spread(
        self,
        roots: Iterable[Digest],
        reached: set[Digest],
        *,
        within: Container[Digest] | None = None,
        upwards: bool = False,
    ) -> Iterator[None]:
        """Put into `reached` what `roots` need, with `upwards` also what needs them; nothing that is not `within`."""
        waiting = [*roots]
        while waiting:
            digest = waiting.pop()
            if digest in reached or (within is not None and digest not in within):
                continue
            reached.add(digest)
            references = self.references.get(digest, _NOTHING)
            waiting.extend(references.manifests)
            waiting.extend(self._referrers.get(digest, ()))
            if references.subject in self.references:
                waiting.append(references.subject)
            if upwards:
                waiting.extend(self._indexes.get(digest, ()))
            yield None

    def _load(self, digest: Digest) -> tuple[References, float]:
        # Not by way of `Blobs`: that would date every manifest as used now.
        try:
            with open(self._layout.blob(digest), "rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                if status.st_size > MAX_MANIFEST:
                    raise Unreadable(f"the manifest {digest} has more than {MAX_MANIFEST} bytes")
                content = file.read(status.st_size) or b""
        except (FileNotFoundError, NotADirectoryError):
            raise Unreadable(f"the content of the manifest {digest} is missing") from None
        except OSError as error:
            raise Unreadable(f"the manifest {digest} cannot be read ({error.strerror})") from None
        if Digest.of(content, digest.algorithm) != digest:
            raise Unreadable(f"the content of the manifest {digest} is damaged")
        media_type = self._links.manifest_media_type(self._repository, digest)
        try:
            return references_in(content, media_type), status.st_mtime
        except ManifestInvalid as error:
            raise Unreadable(f"the manifest {digest} is not understood ({error.message})") from None


def references_in(content: bytes, media_type: str | None) -> References:
    """Return what a manifest refers to, or raise `ManifestInvalid`.

    In one of a type that is not known, and that may be no JSON, every digest is taken for a reference.
    """
    told = (media_type or media_type_of(content)).lower()
    try:
        manifest = parse_manifest(content, told)
    except ManifestInvalid:
        if told in KNOWN_TYPES:
            raise
        manifest = Manifest(told)
    subject = None if manifest.subject is None else manifest.subject.digest
    if told not in KNOWN_TYPES:
        written = dict.fromkeys(Digest.parse(match.decode()) for match in _DIGEST.findall(content))
        return References(frozenset(written) - {subject}, tuple(written), subject)
    children = tuple(child.digest for child in manifest.manifests)
    described = manifest.layers if manifest.config is None else (manifest.config, *manifest.layers)
    return References(frozenset((*children, *(blob.digest for blob in described))), children, subject)
