"""The mark phase of garbage collection: what a registry needs of what it holds, found by reading its manifests."""

from __future__ import annotations

import os
from collections.abc import Container, Generator, Iterable, Iterator
from contextlib import suppress

from attrs import define, field, frozen

from dockerproxy.errors import ManifestInvalid
from dockerproxy.oci.manifests import MAX_MANIFEST
from dockerproxy.oci.names import Digest
from dockerproxy.store.layout import Layout
from dockerproxy.store.links import Links
from dockerproxy.store.references import extract_references

_YIELD_EVERY = 100  # names looked at in one step of reading

DigestText = str
"""A digest as text, or several with spaces in between.

Python's cyclic garbage collection, which holds the whole process while it looks at every object, does not look at text,
nor at tuples of text after a first time; with 100,000 of `Digest` it takes 100 ms. So what is kept of a registry is
text, in few containers. In this module no step does more the larger a registry is.
"""

ManifestRefs = tuple[DigestText, DigestText, DigestText | None]
"""What a manifest refers to: contents, those of them that may be manifests, and its subject (`References`)."""

_NO_REFS: ManifestRefs = ("", "", None)

LinkedList = tuple[DigestText, "LinkedList | None"]
"""Text after text, the last one first: as little looked at as other tuples, and each is added in no time."""


@frozen
class Unreferenced:
    """What a repository has and does not need.

    Manifests are in `groups`, of those that nothing needs but others of the group: an index, its images, their
    signatures. In each, those come first that refer to others. `needs` is what they refer to.
    """

    groups: list[tuple[DigestText, ...]] = field(factory=list)
    refs: dict[DigestText, ManifestRefs] = field(factory=dict)
    layers: set[DigestText] = field(factory=set)


@frozen
class Problem:
    """Something in a repository that could not be understood."""

    repository: str
    message: str

    def __str__(self) -> str:
        return f"{self.repository}: {self.message}"


class ManifestUnreadable(Exception):
    """A sentence's end about a manifest that cannot be read."""


@define
class Mark:
    """What is `needed` by any repository, and what each has that is `idle` in it.

    A tag needs its manifest; a manifest needs what it refers to, its subject too, and all that refers to it as their
    subject. `delete_untagged`: else every manifest is needed. One whose content was used after `cutoff` (POSIX time)
    is needed in any case. Of a repository with a manifest that cannot be read, everything is: there is no telling.
    """

    _layout: Layout
    _links: Links
    cutoff: float
    delete_untagged: bool
    reachable: set[DigestText] = field(factory=set, init=False)
    unreferenced: dict[str, Unreferenced] = field(factory=dict, init=False)
    problems: list[Problem] = field(factory=list, init=False)
    repositories: list[str] = field(factory=list, init=False)
    manifest_count: int = field(default=0, init=False)
    recent_count: int = field(default=0, init=False)  # manifests that are needed for having been used only

    def steps(self) -> Iterator[None]:
        """Make the survey, a moment's work a step. Blocks."""
        for repository in self._links.repositories():
            yield from self._mark_repository(repository)
            self.repositories.append(repository)

    def retain(self, unreferenced: Unreferenced, members: Iterable[DigestText]) -> Iterator[None]:
        """Need these idle manifests after all, and what they refer to, one a step."""
        for member in members:
            self.reachable.add(member)
            for digest in unreferenced.refs[member][0].split():
                self.reachable.add(digest)
                unreferenced.layers.discard(digest)
            yield None

    def _mark_repository(self, repository: str) -> Iterator[None]:
        graph = _Graph(self._layout, self._links, repository)
        live: set[DigestText] = set()
        try:
            roots, recent = yield from self._read_manifests(repository, graph)
            yield from graph.reach(roots, live)
            if self.delete_untagged:
                for count, digest in enumerate(recent):
                    self.recent_count += digest not in live
                    if count % _YIELD_EVERY == 0:
                        yield None
            yield from graph.reach(recent if self.delete_untagged else graph.refs, live)
        except ManifestUnreadable as error:
            self.problems.append(Problem(repository, f"{error}; nothing is removed from this repository"))
            yield from self._mark_all(repository)
            return
        unreferenced = Unreferenced()
        yield from graph.group_unreferenced(unreferenced, live)
        reachable = yield from self._mark_reachable(graph, unreferenced, live)
        for count, layer in enumerate(map(str, self._links.layers(repository))):
            if layer not in reachable:
                unreferenced.layers.add(layer)
            if count % _YIELD_EVERY == 0:
                yield None
        if unreferenced.groups or unreferenced.layers:
            self.unreferenced[repository] = unreferenced
        yield from clear_incrementally(live, reachable)
        yield from graph.clear_incrementally()

    def _read_manifests(
        self, repository: str, graph: _Graph
    ) -> Generator[None, None, tuple[dict[DigestText, str], set[DigestText]]]:
        """Read the repository's manifests; return those that have a tag, and those that were used after `cutoff`."""
        tags: dict[str, DigestText] = {}
        roots: dict[DigestText, str] = {}
        for tag, target in self._links.iter_tags(repository):
            if target is None:
                raise ManifestUnreadable(f"the link of the tag {tag} cannot be read")
            tags[tag] = str(target)
            roots[str(target)] = tag
            yield None
        recent: set[DigestText] = set()
        for digest in self._links.manifests(repository):
            if graph.add(digest) > self.cutoff:
                recent.add(str(digest))
            self.manifest_count += 1
            yield None
        for tag, text in tags.items():
            if text not in graph.refs and not self._links.has_manifest(repository, Digest.parse(text)):
                if self._links.tag(repository, tag) == Digest.parse(text):
                    raise ManifestUnreadable(f"the tag {tag} means {text}, which is no manifest of it")
            yield None
        return roots, recent

    def _mark_reachable(
        self, graph: _Graph, unreferenced: Unreferenced, live: set[DigestText]
    ) -> Generator[None, None, set[DigestText]]:
        """Need what is `kept`, and what that refers to; return all of it. What is idle keeps its part of the graph."""
        reachable: set[DigestText] = set()
        while graph.refs:
            digest, refs = graph.refs.popitem()
            if digest in live:
                reachable.update(refs[0].split())
                self.reachable.update(refs[0].split())
            else:
                unreferenced.refs[digest] = refs
            yield None
        # Some of those that are kept are no manifests of the repository.
        for digest in live:
            reachable.add(digest)
            self.reachable.add(digest)
            yield None
        return reachable

    def _mark_all(self, repository: str) -> Iterator[None]:
        for _, target in self._links.iter_tags(repository):
            if target is not None:
                self.reachable.add(str(target))
            yield None
        for digest in self._links.manifests(repository):
            self.reachable.add(str(digest))
            with suppress(ManifestUnreadable):
                refs, _ = load_refs(self._layout, self._links, repository, digest)
                self.reachable.update(refs[0].split())
            yield None
        for count, layer in enumerate(self._links.layers(repository)):
            self.reachable.add(str(layer))
            if count % _YIELD_EVERY == 0:
                yield None


@define
class _Graph:
    """The manifests of one repository, and how they hang together."""

    _layout: Layout
    _links: Links
    _repository: str
    refs: dict[DigestText, ManifestRefs] = field(factory=dict, init=False)
    _parents: dict[DigestText, LinkedList] = field(factory=dict, init=False)
    _referrers: dict[DigestText, LinkedList] = field(factory=dict, init=False)

    def add(self, digest: Digest) -> float:
        """Take a manifest in, and return when it was last used (POSIX time); raise `Unreadable`."""
        refs, last_used = load_refs(self._layout, self._links, self._repository, digest)
        text = str(digest)
        _, manifests, subject = self.refs[text] = refs
        for child in manifests.split():
            self._parents[child] = text, self._parents.get(child)
        if subject is not None:
            self._referrers[subject] = text, self._referrers.get(subject)
        return last_used

    def reach(
        self, roots: Iterable[DigestText], visited: set[DigestText], *, excluding: Container[DigestText] | None = None
    ) -> Iterator[None]:
        """Put into `reached` what `roots` need.

        With `apart_from` what needs them as well, but only manifests that are here and not in that.
        """
        for root in roots:
            stack = [root]
            while stack:
                digest = stack.pop()
                is_excluded = excluding is not None and (digest in excluding or digest not in self.refs)
                if digest not in visited and not is_excluded:
                    visited.add(digest)
                    stack.extend(self._successors(digest))
                    if excluding is not None:
                        stack.extend(_iter_linked_list(self._parents.get(digest)))
                yield None

    def group_unreferenced(self, unreferenced: Unreferenced, live: set[DigestText]) -> Iterator[None]:
        """Put the manifests that are not `kept` into groups."""
        visited: set[DigestText] = set()
        for digest in self.refs:
            if digest not in live and digest not in visited:
                members: set[DigestText] = set()
                yield from self.reach([digest], members, excluding=live)
                parents: list[DigestText] = []
                leaves: list[DigestText] = []
                for member in members:
                    (parents if self.refs[member][1] else leaves).append(member)
                    visited.add(member)
                    yield None
                unreferenced.groups.append((*parents, *leaves))
            yield None

    def clear_incrementally(self) -> Iterator[None]:
        """Forget how manifests hang together, a little at a time."""
        for chains in (self._parents, self._referrers):
            while chains:
                chains.popitem()
                yield None

    def _successors(self, digest: DigestText) -> Iterator[DigestText]:
        _, manifests, subject = self.refs.get(digest, _NO_REFS)
        yield from manifests.split()
        yield from _iter_linked_list(self._referrers.get(digest))
        if subject is not None and subject in self.refs:
            yield subject


def _iter_linked_list(node: LinkedList | None) -> Iterator[DigestText]:
    while node is not None:
        text, node = node
        yield text


def load_refs(layout: Layout, links: Links, repository: str, digest: Digest) -> tuple[ManifestRefs, float]:
    """Return what a manifest refers to, and when it was last used (POSIX time); raise `Unreadable`. Blocks."""
    # Not by way of `Blobs`: that would date every manifest as used now.
    try:
        with open(layout.blob(digest), "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if status.st_size > MAX_MANIFEST:
                raise ManifestUnreadable(f"the manifest {digest} has more than {MAX_MANIFEST} bytes")
            content = file.read(status.st_size) or b""
    except (FileNotFoundError, NotADirectoryError):
        raise ManifestUnreadable(f"the content of the manifest {digest} is missing") from None
    except OSError as error:
        raise ManifestUnreadable(f"the manifest {digest} cannot be read ({error.strerror})") from None
    if Digest.of(content, digest.algorithm) != digest:
        raise ManifestUnreadable(f"the content of the manifest {digest} is damaged")
    try:
        references = extract_references(content, links.manifest_media_type(repository, digest))
    except ManifestInvalid as error:
        raise ManifestUnreadable(f"the manifest {digest} is not understood ({error.message})") from None
    subject = None if references.subject is None else str(references.subject)
    return (_join_digests(references.objects), _join_digests(references.manifests), subject), status.st_mtime


def _join_digests(digests: Iterable[Digest]) -> DigestText:
    return " ".join(map(str, digests))


def clear_incrementally(*sets: set[DigestText]) -> Iterator[None]:
    """Empty `sets` a little at a time: to free 100,000 texts in one go takes Python 10 ms, and holds it."""
    for texts in sets:
        while texts:
            for _ in range(min(_YIELD_EVERY, len(texts))):
                texts.pop()
            yield None
