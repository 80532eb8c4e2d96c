"""The mark phase of garbage collection: finds the reachable objects of a registry by reading its manifests."""

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

_YIELD_EVERY = 100  # names handled in one step

DigestText = str
"""A digest as a string, or several digests separated by spaces.

Python's garbage collector stops the whole process while it looks at every tracked object. With 100,000 `Digest` objects
that takes 100 ms. It does not track strings, and untracks tuples of strings when it first sees them. This module
therefore stores strings in a few containers, and no step does more work if the registry is larger.
"""

ManifestRefs = tuple[DigestText, DigestText, DigestText | None]
"""The references of a manifest (`References`): all objects, those that may be manifests, and the subject."""

_NO_REFS: ManifestRefs = ("", "", None)

LinkedList = tuple[DigestText, "LinkedList | None"]
"""Linked list, the last string first. The garbage collector untracks it like other tuples, and adding is O(1)."""


@frozen
class Unreferenced:
    """The unreachable objects of a repository.

    `groups` holds the manifests. The manifests of a group are connected by references, such as an index, its images
    and their signatures. In each group, manifests with children come first. `refs` has the references of each
    manifest, and `layers` the unreachable blob links.
    """

    groups: list[tuple[DigestText, ...]] = field(factory=list)
    refs: dict[DigestText, ManifestRefs] = field(factory=dict)
    layers: set[DigestText] = field(factory=set)


@frozen
class Problem:
    """An error that prevents the collection of a repository's garbage."""

    repository: str
    message: str

    def __str__(self) -> str:
        return f"{self.repository}: {self.message}"


class ManifestUnreadable(Exception):
    """A manifest cannot be read or parsed. The message names the manifest, but not the repository."""


@define
class Mark:
    """Finds the objects that are `reachable` from any repository, and those `unreferenced` in each repository.

    A tag reaches its manifest. A manifest reaches its references, its subject and its referrers. If `delete_untagged`
    is false, every manifest is a root. A manifest used after `cutoff` (POSIX time) is always a root. If a manifest of
    a repository cannot be read, all objects of that repository count as reachable, because its references are unknown.
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
    recent_count: int = field(default=0, init=False)  # manifests reachable only due to recent use

    def steps(self) -> Iterator[None]:
        """Mark all repositories. Each step blocks briefly."""
        for repository in self._links.repositories():
            yield from self._mark_repository(repository)
            self.repositories.append(repository)

    def retain(self, unreferenced: Unreferenced, members: Iterable[DigestText]) -> Iterator[None]:
        """Mark these unreferenced manifests and their references as reachable after all, one manifest per step."""
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
            self.problems.append(Problem(repository, f"{error}; nothing was deleted from this repository"))
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
        """Read the repository's manifests. Return the tagged ones, and those used after `cutoff`."""
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
        for tag, target_text in tags.items():
            target = Digest.parse(target_text)
            if target_text not in graph.refs and not self._links.has_manifest(repository, target):
                if self._links.tag(repository, tag) == target:
                    raise ManifestUnreadable(f"the tag {tag} points to {target_text}, which is not a manifest here")
            yield None
        return roots, recent

    def _mark_reachable(
        self, graph: _Graph, unreferenced: Unreferenced, live: set[DigestText]
    ) -> Generator[None, None, set[DigestText]]:
        """Mark the `live` manifests and their references as reachable, and return them all.

        Move the references of the other manifests from the graph to `unreferenced`.
        """
        reachable: set[DigestText] = set()
        while graph.refs:
            digest, refs = graph.refs.popitem()
            if digest in live:
                reachable.update(refs[0].split())
                self.reachable.update(refs[0].split())
            else:
                unreferenced.refs[digest] = refs
            yield None
        # Some live digests are not manifests of this repository.
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
    """The manifests of one repository and the references between them."""

    _layout: Layout
    _links: Links
    _repository: str
    refs: dict[DigestText, ManifestRefs] = field(factory=dict, init=False)
    _parents: dict[DigestText, LinkedList] = field(factory=dict, init=False)
    _referrers: dict[DigestText, LinkedList] = field(factory=dict, init=False)

    def add(self, digest: Digest) -> float:
        """Add a manifest and return its last use (POSIX time). Raises `ManifestUnreadable`."""
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
        """Add the digests that are reachable from `roots` to `visited`.

        If `excluding` is given, follow references backwards as well, but only visit manifests of this graph that are
        not in `excluding`.
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
        """Divide the manifests that are not `live` into groups."""
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
        """Free the references between manifests in short steps."""
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
    """Return the references of a manifest and its last use (POSIX time). Blocks. Raises `ManifestUnreadable`."""
    # Do not use `Blobs`, because it would record a use of every manifest.
    try:
        with open(layout.blob(digest), "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if status.st_size > MAX_MANIFEST:
                size = f"{status.st_size} bytes, more than the {MAX_MANIFEST} allowed"
                raise ManifestUnreadable(f"the manifest {digest} has {size}")
            content = file.read(status.st_size) or b""
    except (FileNotFoundError, NotADirectoryError):
        raise ManifestUnreadable(f"the blob of the manifest {digest} is missing") from None
    except OSError as error:
        raise ManifestUnreadable(f"the manifest {digest} cannot be read ({error.strerror})") from None
    if Digest.of(content, digest.algorithm) != digest:
        raise ManifestUnreadable(f"the manifest {digest} is damaged: its content does not match the digest")
    try:
        references = extract_references(content, links.manifest_media_type(repository, digest))
    except ManifestInvalid as error:
        raise ManifestUnreadable(f"the manifest {digest} is invalid ({error.message})") from None
    subject = None if references.subject is None else str(references.subject)
    return (_join_digests(references.objects), _join_digests(references.manifests), subject), status.st_mtime


def _join_digests(digests: Iterable[Digest]) -> DigestText:
    return " ".join(map(str, digests))


def clear_incrementally(*sets: set[DigestText]) -> Iterator[None]:
    """Empty `sets` in short steps, because freeing 100,000 strings at once blocks Python for 10 ms."""
    for texts in sets:
        while texts:
            for _ in range(min(_YIELD_EVERY, len(texts))):
                texts.pop()
            yield None
