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
from dockerproxy.store.references import references_in

_SOME = 100  # names looked at in one step of reading

Text = str
"""A digest as text, or several with spaces in between.

Python's cyclic garbage collection, which holds the whole process while it looks at every object, does not look at text,
nor at tuples of text after a first time; with 100,000 of `Digest` it takes 100 ms. So what is kept of a registry is
text, in few containers. In this module no step does more the larger a registry is.
"""

Needs = tuple[Text, Text, Text | None]
"""What a manifest refers to: contents, those of them that may be manifests, and its subject (`References`)."""

_NOTHING: Needs = ("", "", None)

Chain = tuple[Text, "Chain | None"]
"""Text after text, the last one first: as little looked at as other tuples, and each is added in no time."""


@frozen
class Idle:
    """What a repository has and does not need.

    Manifests are in `groups`, of those that nothing needs but others of the group: an index, its images, their
    signatures. In each, those come first that refer to others. `needs` is what they refer to.
    """

    groups: list[tuple[Text, ...]] = field(factory=list)
    needs: dict[Text, Needs] = field(factory=dict)
    layers: set[Text] = field(factory=set)


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
    """What is `needed` by any repository, and what each has that is `idle` in it.

    A tag needs its manifest; a manifest needs what it refers to, its subject too, and all that refers to it as their
    subject. `delete_untagged`: else every manifest is needed. One whose content was used after `cutoff` (POSIX time)
    is needed in any case. Of a repository with a manifest that cannot be read, everything is: there is no telling.
    """

    _layout: Layout
    _links: Links
    cutoff: float
    delete_untagged: bool
    needed: set[Text] = field(factory=set, init=False)
    idle: dict[str, Idle] = field(factory=dict, init=False)
    problems: list[Problem] = field(factory=list, init=False)
    repositories: list[str] = field(factory=list, init=False)
    manifests: int = field(default=0, init=False)
    recent: int = field(default=0, init=False)  # manifests that are needed for having been used only

    def steps(self) -> Iterator[None]:
        """Make the survey, a moment's work a step. Blocks."""
        for repository in self._links.repositories():
            yield from self._survey(repository)
            self.repositories.append(repository)

    def keep(self, idle: Idle, members: Iterable[Text]) -> Iterator[None]:
        """Need these idle manifests after all, and what they refer to, one a step."""
        for member in members:
            self.needed.add(member)
            for content in idle.needs[member][0].split():
                self.needed.add(content)
                idle.layers.discard(content)
            yield None

    def _survey(self, repository: str) -> Iterator[None]:
        graph = _Graph(self._layout, self._links, repository)
        kept: set[Text] = set()
        try:
            tagged, recent = yield from self._read(repository, graph)
            yield from graph.spread(tagged, kept)
            if self.delete_untagged:
                for count, digest in enumerate(recent):
                    self.recent += digest not in kept
                    if count % _SOME == 0:
                        yield None
            yield from graph.spread(recent if self.delete_untagged else graph.needs, kept)
        except Unreadable as error:
            self.problems.append(Problem(repository, f"{error}; nothing is removed from this repository"))
            yield from self._need_all(repository)
            return
        idle = Idle()
        yield from graph.group(idle, kept)
        needed = yield from self._need(graph, idle, kept)
        for count, layer in enumerate(map(str, self._links.layers(repository))):
            if layer not in needed:
                idle.layers.add(layer)
            if count % _SOME == 0:
                yield None
        if idle.groups or idle.layers:
            self.idle[repository] = idle
        yield from emptying(kept, needed)
        yield from graph.emptying()

    def _read(self, repository: str, graph: _Graph) -> Generator[None, None, tuple[dict[Text, str], set[Text]]]:
        """Read the repository's manifests; return those that have a tag, and those that were used after `cutoff`."""
        tags: dict[str, Text] = {}
        tagged: dict[Text, str] = {}
        for tag, meant in self._links.each_tag(repository):
            if meant is None:
                raise Unreadable(f"the link of the tag {tag} cannot be read")
            tags[tag] = str(meant)
            tagged[str(meant)] = tag
            yield None
        recent: set[Text] = set()
        for digest in self._links.manifests(repository):
            if graph.read(digest) > self.cutoff:
                recent.add(str(digest))
            self.manifests += 1
            yield None
        for tag, text in tags.items():
            if text not in graph.needs and not self._links.has_manifest(repository, Digest.parse(text)):
                if self._links.tag(repository, tag) == Digest.parse(text):
                    raise Unreadable(f"the tag {tag} means {text}, which is no manifest of it")
            yield None
        return tagged, recent

    def _need(self, graph: _Graph, idle: Idle, kept: set[Text]) -> Generator[None, None, set[Text]]:
        """Need what is `kept`, and what that refers to; return all of it. What is idle keeps its part of the graph."""
        needed: set[Text] = set()
        while graph.needs:
            digest, needs = graph.needs.popitem()
            if digest in kept:
                needed.update(needs[0].split())
                self.needed.update(needs[0].split())
            else:
                idle.needs[digest] = needs
            yield None
        # Some of those that are kept are no manifests of the repository.
        for digest in kept:
            needed.add(digest)
            self.needed.add(digest)
            yield None
        return needed

    def _need_all(self, repository: str) -> Iterator[None]:
        for _, meant in self._links.each_tag(repository):
            if meant is not None:
                self.needed.add(str(meant))
            yield None
        for digest in self._links.manifests(repository):
            self.needed.add(str(digest))
            with suppress(Unreadable):
                needs, _ = load(self._layout, self._links, repository, digest)
                self.needed.update(needs[0].split())
            yield None
        for count, layer in enumerate(self._links.layers(repository)):
            self.needed.add(str(layer))
            if count % _SOME == 0:
                yield None


@define
class _Graph:
    """The manifests of one repository, and how they hang together."""

    _layout: Layout
    _links: Links
    _repository: str
    needs: dict[Text, Needs] = field(factory=dict, init=False)
    _indexes: dict[Text, Chain] = field(factory=dict, init=False)
    _referrers: dict[Text, Chain] = field(factory=dict, init=False)

    def read(self, digest: Digest) -> float:
        """Take a manifest in, and return when it was last used (POSIX time); raise `Unreadable`."""
        needs, date = load(self._layout, self._links, self._repository, digest)
        text = str(digest)
        _, manifests, subject = self.needs[text] = needs
        for child in manifests.split():
            self._indexes[child] = text, self._indexes.get(child)
        if subject is not None:
            self._referrers[subject] = text, self._referrers.get(subject)
        return date

    def spread(
        self, roots: Iterable[Text], reached: set[Text], *, apart_from: Container[Text] | None = None
    ) -> Iterator[None]:
        """Put into `reached` what `roots` need.

        With `apart_from` what needs them as well, but only manifests that are here and not in that.
        """
        for root in roots:
            waiting = [root]
            while waiting:
                digest = waiting.pop()
                excluded = apart_from is not None and (digest in apart_from or digest not in self.needs)
                if digest not in reached and not excluded:
                    reached.add(digest)
                    waiting.extend(self._leads_to(digest))
                    if apart_from is not None:
                        waiting.extend(_links_of(self._indexes.get(digest)))
                yield None

    def group(self, idle: Idle, kept: set[Text]) -> Iterator[None]:
        """Put the manifests that are not `kept` into groups."""
        grouped: set[Text] = set()
        for digest in self.needs:
            if digest not in kept and digest not in grouped:
                members: set[Text] = set()
                yield from self.spread([digest], members, apart_from=kept)
                first: list[Text] = []
                others: list[Text] = []
                for member in members:
                    (first if self.needs[member][1] else others).append(member)
                    grouped.add(member)
                    yield None
                idle.groups.append((*first, *others))
            yield None

    def emptying(self) -> Iterator[None]:
        """Forget how manifests hang together, a little at a time."""
        for chains in (self._indexes, self._referrers):
            while chains:
                chains.popitem()
                yield None

    def _leads_to(self, digest: Text) -> Iterator[Text]:
        _, manifests, subject = self.needs.get(digest, _NOTHING)
        yield from manifests.split()
        yield from _links_of(self._referrers.get(digest))
        if subject is not None and subject in self.needs:
            yield subject


def _links_of(chain: Chain | None) -> Iterator[Text]:
    while chain is not None:
        text, chain = chain
        yield text


def load(layout: Layout, links: Links, repository: str, digest: Digest) -> tuple[Needs, float]:
    """Return what a manifest refers to, and when it was last used (POSIX time); raise `Unreadable`. Blocks."""
    # Not by way of `Blobs`: that would date every manifest as used now.
    try:
        with open(layout.blob(digest), "rb", buffering=0) as file:
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
        found = references_in(content, links.manifest_media_type(repository, digest))
    except ManifestInvalid as error:
        raise Unreadable(f"the manifest {digest} is not understood ({error.message})") from None
    subject = None if found.subject is None else str(found.subject)
    return (_text(found.contents), _text(found.manifests), subject), status.st_mtime


def _text(digests: Iterable[Digest]) -> Text:
    return " ".join(map(str, digests))


def emptying(*sets: set[Text]) -> Iterator[None]:
    """Empty `sets` a little at a time: to free 100,000 texts in one go takes Python 10 ms, and holds it."""
    for texts in sets:
        while texts:
            for _ in range(min(_SOME, len(texts))):
                texts.pop()
            yield None
