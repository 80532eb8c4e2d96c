"""The mark phase of garbage collection: what a registry needs of what it holds, found by reading its manifests."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Container, Generator, Iterable, Iterator, Mapping
from contextlib import suppress

from attrs import define, field, frozen

from dockerproxy.errors import ManifestInvalid
from dockerproxy.oci.manifests import MAX_MANIFEST
from dockerproxy.oci.names import Digest
from dockerproxy.store.layout import Layout
from dockerproxy.store.links import Links
from dockerproxy.store.references import references_in

_PART = 32
"""So many manifests go in one step at most. An image for all platforms, with its signatures, has fewer."""

_SOME = 200  # names looked at in one step of reading


Text = str
"""A digest as text. Python's garbage collection does not look at text, and at every `Digest` it does: with 100,000 of
them a full run holds the whole process for 100 ms."""

Needs = tuple[tuple[Text, ...], tuple[Text, ...], Text | None]
"""What a manifest refers to: contents, those of them that may be manifests, and its subject (`References`)."""

_NOTHING: Needs = ((), (), None)


@frozen(eq=False)
class Group:
    """Manifests of a repository that nothing needs but others of the group: an index, its images, their signatures.

    They stay or go together, in one step; a large one in `parts`, those first that refer to others.
    """

    repository: str
    parts: tuple[tuple[Text, ...], ...]
    needs: Mapping[Text, Needs] = field(repr=False)


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
    needed: set[Text] = field(factory=set, init=False)
    idle_manifests: list[Group] = field(factory=list, init=False)
    idle_layers: dict[str, set[Text]] = field(factory=dict, init=False)
    problems: list[Problem] = field(factory=list, init=False)
    repositories: list[str] = field(factory=list, init=False)
    manifests: int = field(default=0, init=False)
    recent: int = field(default=0, init=False)  # manifests that are needed for having been used only

    def steps(self) -> Iterator[None]:
        """Make the survey, a moment's work a step. Blocks."""
        for repository in self._links.repositories():
            yield from self._survey(repository)
            self.repositories.append(repository)

    def keep(self, group: Group, members: Iterable[Text]) -> None:
        """Need `members` of a group after all."""
        idle = self.idle_layers.get(group.repository, set())
        for member in members:
            contents = group.needs[member][0]
            self.needed.add(member)
            self.needed.update(contents)
            idle.difference_update(contents)

    def _survey(self, repository: str) -> Iterator[None]:
        graph = _Graph(self._layout, self._links, repository)
        kept: set[Text] = set()
        try:
            tagged, recent = yield from self._read(repository, graph)
            yield from graph.spread(tagged, kept)
            if not self.delete_untagged:
                recent = set(graph.needs)
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
            needed.update(graph.needs.get(digest, _NOTHING)[0])
            yield None
        self.needed |= needed
        idle = set()
        for count, layer in enumerate(map(str, self._links.layers(repository))):
            if layer not in needed:
                idle.add(layer)
            if count % _SOME == 0:
                yield None
        if idle:
            self.idle_layers[repository] = idle

    def _read(self, repository: str, graph: _Graph) -> Generator[None, None, tuple[set[Text], set[Text]]]:
        """Read the repository's manifests; return those that have a tag, and those that were used after `cutoff`."""
        tagged: dict[str, Digest] = {}
        for tag in self._links.tags(repository):
            digest = self._links.tag(repository, tag)
            if digest is not None:
                tagged[tag] = digest
            elif os.path.exists(self._layout.tag_current(repository, tag)):
                raise Unreadable(f"the link of the tag {tag} cannot be read")
            yield None
        recent: set[Text] = set()
        for digest in self._links.manifests(repository):
            _, date = graph.read(digest)
            self.manifests += 1
            if date > self.cutoff:
                recent.add(str(digest))
            yield None
        for tag, digest in tagged.items():
            if str(digest) not in graph.needs and not self._links.has_manifest(repository, digest):
                if self._links.tag(repository, tag) == digest:
                    raise Unreadable(f"the tag {tag} means {digest}, which is no manifest of it")
        return set(map(str, tagged.values())), recent

    def _need_all(self, repository: str) -> Iterator[None]:
        for tag in self._links.tags(repository):
            digest = self._links.tag(repository, tag)
            if digest is not None:
                self.needed.add(str(digest))
        for digest in self._links.manifests(repository):
            self.needed.add(str(digest))
            with suppress(Unreadable):
                needs, _ = _Graph(self._layout, self._links, repository).read(digest)
                self.needed.update(needs[0])
            yield None
        for count, layer in enumerate(self._links.layers(repository)):
            self.needed.add(str(layer))
            if count % _SOME == 0:
                yield None

    def _note_groups(self, repository: str, graph: _Graph, kept: set[Text]) -> Iterator[None]:
        left = graph.needs.keys() - kept
        while left:
            members: set[Text] = set()
            yield from graph.spread({next(iter(left))}, members, within=left, upwards=True)
            left -= members
            ordered = sorted(members, key=lambda member: (not graph.needs[member][1], member))
            parts = tuple(tuple(ordered[start : start + _PART]) for start in range(0, len(ordered), _PART))
            self.idle_manifests.append(Group(repository, parts, {member: graph.needs[member] for member in ordered}))


@define
class _Graph:
    """The manifests of one repository, and how they hang together."""

    _layout: Layout
    _links: Links
    _repository: str
    needs: dict[Text, Needs] = field(factory=dict, init=False)
    _indexes: dict[Text, list[Text]] = field(factory=lambda: defaultdict(list), init=False)
    _referrers: dict[Text, list[Text]] = field(factory=lambda: defaultdict(list), init=False)

    def read(self, digest: Digest) -> tuple[Needs, float]:
        """Take a manifest in, and return what it refers to and when it was last used; raise `Unreadable`."""
        needs, date = self._load(digest)
        text = str(digest)
        _, manifests, subject = self.needs[text] = needs
        for child in manifests:
            self._indexes[child].append(text)
        if subject is not None:
            self._referrers[subject].append(text)
        return needs, date

    def spread(
        self,
        roots: Iterable[Text],
        reached: set[Text],
        *,
        within: Container[Text] | None = None,
        upwards: bool = False,
    ) -> Iterator[None]:
        """Put into `reached` what `roots` need, with `upwards` also what needs them; nothing that is not `within`."""
        waiting = [*roots]
        while waiting:
            digest = waiting.pop()
            if digest in reached or (within is not None and digest not in within):
                continue
            reached.add(digest)
            _, manifests, subject = self.needs.get(digest, _NOTHING)
            waiting.extend(manifests)
            waiting.extend(self._referrers.get(digest, ()))
            if subject is not None and subject in self.needs:
                waiting.append(subject)
            if upwards:
                waiting.extend(self._indexes.get(digest, ()))
            yield None

    def _load(self, digest: Digest) -> tuple[Needs, float]:
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
        try:
            found = references_in(content, self._links.manifest_media_type(self._repository, digest))
        except ManifestInvalid as error:
            raise Unreadable(f"the manifest {digest} is not understood ({error.message})") from None
        subject = None if found.subject is None else str(found.subject)
        return (tuple(map(str, found.contents)), tuple(map(str, found.manifests)), subject), status.st_mtime
