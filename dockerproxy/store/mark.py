"""The mark phase of garbage collection: finds the reachable objects of a registry by reading its manifests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress

from attrs import define, field, frozen

from dockerproxy.errors import ManifestInvalid
from dockerproxy.oci.manifests import MAX_MANIFEST, fallback_base, fallback_tag
from dockerproxy.oci.names import Digest
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.layout import Layout
from dockerproxy.store.links import Links
from dockerproxy.store.references import References, extract_references
from dockerproxy.store.tree_reader import Missing, StrictReader

DigestText = str
"""A digest as a string, because sets of strings are smaller and faster than sets of `Digest`."""


@frozen
class DerivedTag:
    """A tag that points to `target`. Its name is derived from the digest `subject`; None if only a part is known."""

    tag: str
    target: DigestText
    subject: DigestText | None


@frozen
class Unreferenced:
    """The unreachable objects of a repository.

    `groups` holds the manifests. The manifests of a group are connected by references, such as an index, its images
    and their signatures. In each group, manifests with children come first. `subjects` has the subjects of those that
    have one, and `layers` the unreachable blob links. `tags` has the tags to delete, because their names are derived
    from the digests of unreachable or former manifests. `orphans` are such tags that stay for now.
    """

    groups: list[list[DigestText]]
    subjects: dict[DigestText, DigestText]
    layers: set[DigestText]
    tags: list[DerivedTag]
    orphans: list[DerivedTag]


@frozen
class Problem:
    """An error that prevents the collection of a repository's garbage."""

    repository: str
    message: str

    def __str__(self) -> str:
        return f"{self.repository}: {self.message}"


class ManifestUnreadable(Exception):
    """A manifest cannot be read or parsed. The message names the manifest, but not the repository.

    `tag` is one that has to be removed or pushed again; "" if that would not help.
    """

    def __init__(self, message: str, tag: str = "") -> None:
        super().__init__(message)
        self.tag = tag


@define
class Mark:
    """Finds the blobs that no repository reaches, and the `unreferenced` objects of each repository.

    A tag reaches its manifest. A manifest reaches its references, its subject and its referrers. If `delete_untagged`
    is false, every manifest is a root. A manifest used after the cutoff is always a root. If a manifest of a repository
    cannot be read, all objects of that repository count as reachable, because its references are unknown.

    The cutoff is `cutoff` (POSIX time), or earlier while a push to the repository is under way: `cutoff_of` returns it.
    Then its blobs that were used after it stay, too.

    If the name of a tag is derived from the digest of a manifest that the repository has, or had, the tag is no root:
    its manifest counts as a referrer of that one, such as a signature, and both end together.

    `garbage` first has all blobs, and loses those that are reached. A blob that is written meanwhile is not in it, and
    stays. Memory grows with the number of blobs, manifests and links on disk, but not with the number of references:
    whoever may push could write a thousand references for each of them. References are therefore not remembered, but
    read from disk whenever they are needed, which is at most three times. `on_step` is called after each short step.
    """

    _layout: Layout
    _links: Links
    _reader: StrictReader
    cutoff: float
    _cutoff_of: Callable[[str], float]
    delete_untagged: bool
    on_step: Callable[[], object]
    garbage: set[DigestText] = field(factory=set, init=False)
    blob_count: int = field(default=0, init=False)
    unreferenced: dict[str, Unreferenced] = field(factory=dict, init=False)
    problems: list[Problem] = field(factory=list, init=False)
    repositories: list[str] = field(factory=list, init=False)
    manifest_count: int = field(default=0, init=False)
    recent_count: int = field(default=0, init=False)  # manifests reachable only due to recent use

    def run(self) -> None:
        """Mark all repositories."""
        for digest in Blobs(self._layout, durable=False, reader=self._reader).digests():
            self.garbage.add(str(digest))
            self.on_step()
        self.blob_count = len(self.garbage)
        for repository in self._links.repositories():
            self._mark_repository(repository)
            self.repositories.append(repository)

    def retain(self, repository: str, members: Iterable[DigestText]) -> None:
        """Mark these unreferenced manifests of a repository and their references as reachable after all."""
        layers = self.unreferenced[repository].layers
        try:
            for member in members:
                self._mark(self._read(repository, member)[0], layers)
                self.garbage.discard(member)
                self.on_step()
        except ManifestUnreadable as error:
            self.problems.append(Problem(repository, f"{error}; no blob was deleted from this repository"))
            layers.clear()
            self._mark_all(repository)

    def _mark_repository(self, repository: str) -> None:
        layers: set[DigestText] = set()
        for layer in self._links.layers(repository):
            layers.add(str(layer))
            self.on_step()
        try:
            roots, derived = self._read_tags(repository)
            catalog = self._read_catalog(repository, roots, derived)
            live: set[DigestText] = set()
            self._reach(repository, catalog, roots, live, layers)
            self.recent_count += len(catalog.recent - live)
            self._reach(repository, catalog, catalog.recent if self.delete_untagged else catalog.digests, live, layers)
            groups = self._group(repository, catalog, live)
            self._retain_recent(repository, layers)
        except ManifestUnreadable as error:
            remedy = f"; push the tag again, or run `dockerproxy rm {repository}:{error.tag}`" if error.tag else ""
            self.problems.append(Problem(repository, f"{error}; nothing was deleted from this repository{remedy}"))
            self._mark_all(repository)
            return
        tags, orphans = catalog.former, list[DerivedTag]()
        for item in catalog.derived:
            if item.subject not in live:
                (orphans if item.target in catalog.recent else tags).append(item)
            self.on_step()
        if groups or layers or tags:
            subjects = {digest: subject for digest, subject in catalog.subjects.items() if digest not in live}
            self.unreferenced[repository] = Unreferenced(groups, subjects, layers, tags, orphans)

    def _retain_recent(self, repository: str, layers: set[DigestText]) -> None:
        """Mark the blobs among `layers` that were used after the cutoff of the repository."""
        cutoff = self._cutoff_of(repository)
        if cutoff >= self.cutoff:
            return  # `SafeDelete` keeps them
        for text in list(layers):
            with suppress(*Missing):
                if self._reader.stat(self._layout.blob(Digest.parse(text))).st_mtime > cutoff:
                    layers.discard(text)
                    self.garbage.discard(text)
            self.on_step()

    def _read_tags(self, repository: str) -> tuple[dict[DigestText, str], dict[str, DigestText]]:
        """Return the repository's tagged manifests, each with one of its tags.

        If untagged manifests are deleted, the tags with names derived from a digest are returned by themselves.
        """
        roots: dict[DigestText, str] = {}
        derived: dict[str, DigestText] = {}
        for tag, target in self._links.iter_tags(repository):
            if target is None:
                raise ManifestUnreadable(f"the link of the tag {tag} is torn", tag)
            if self.delete_untagged and fallback_base(tag) is not None:
                derived[tag] = str(target)
            else:
                roots[str(target)] = tag
            self.on_step()
        return roots, derived

    def _read_catalog(self, repository: str, roots: dict[DigestText, str], derived: dict[str, DigestText]) -> _Catalog:
        """Read the repository's manifests, unless each of them is a root. Check that the tagged ones exist.

        Add the `derived` tags to `roots` if their digests were never seen here.
        """
        catalog, cutoff = _Catalog(), self._cutoff_of(repository)
        subjects: dict[str | None, DigestText | None] = {base: _subject(base) for base in map(fallback_base, derived)}
        for digest in self._links.manifests(repository):
            text = str(digest)
            if subjects and (base := fallback_tag(digest)) in subjects:
                subjects[base] = text
            if self.delete_untagged:
                references, last_used = self._read(repository, text)
                if references.subject is not None:
                    subject = catalog.subjects[text] = str(references.subject)
                    catalog.referrers.setdefault(subject, []).append(text)
                if last_used > cutoff:
                    catalog.recent.add(text)
            catalog.digests.add(text)
            self.manifest_count += 1
            self.on_step()
        for tag, text in derived.items():
            item = DerivedTag(tag, text, subjects[fallback_base(tag)])
            if item.subject == text:  # a person may give an image its own digest as a name
                roots[text] = tag
            elif item.subject in catalog.digests:
                catalog.derived.append(item)
                catalog.referrers.setdefault(item.subject, []).append(text)
            elif text in catalog.digests and not self._links.is_orphaned(repository, tag):
                roots[text] = tag
            elif text not in catalog.recent:
                catalog.former.append(item)
            self.on_step()
        for tag, text in (*((tag, text) for text, tag in roots.items()), *((i.tag, i.target) for i in catalog.derived)):
            target = Digest.parse(text)
            if text not in catalog.digests and not self._links.has_manifest(repository, target):
                if self._links.tag(repository, tag) == target:
                    raise ManifestUnreadable(f"the tag {tag} points to {text}, which is not a manifest here", tag)
            self.on_step()
        return catalog

    def _reach(
        self,
        repository: str,
        catalog: _Catalog,
        roots: Iterable[DigestText],
        live: set[DigestText],
        layers: set[DigestText],
    ) -> None:
        """Add the manifests that are reachable from `roots` to `live`, and mark them and their references."""

        def visit(digests: Iterable[DigestText]) -> None:
            for digest in digests:
                if digest not in live:
                    live.add(digest)
                    pending.append(digest)

        pending: list[DigestText] = []
        for root in roots:
            visit([root])
            while pending:
                digest = pending.pop()
                self.garbage.discard(digest)
                layers.discard(digest)
                visit(catalog.referrers.get(digest, ()))
                if digest in catalog.digests:
                    references, _ = self._read(repository, digest)
                    self._mark(references, layers)
                    visit(child for child in map(str, references.manifests) if catalog.leads_on(child))
                    if references.subject is not None and str(references.subject) in catalog.digests:
                        visit([str(references.subject)])
                self.on_step()

    def _group(self, repository: str, catalog: _Catalog, live: set[DigestText]) -> list[list[DigestText]]:
        """Return the groups of the manifests that are not `live`."""
        forest = _Forest()
        parents: set[DigestText] = set()
        for digest in catalog.digests:
            if digest not in live:
                forest.find(digest)
                references, _ = self._read(repository, digest)
                for child in map(str, references.manifests):
                    if child in catalog.digests and child not in live:
                        parents.add(digest)
                        forest.join(digest, child)
                subject = catalog.subjects.get(digest)
                if subject is not None and subject in catalog.digests:
                    forest.join(digest, subject)
            self.on_step()
        for item in catalog.derived:
            if item.subject is not None and item.subject not in live and item.target not in live:
                forest.join(item.subject, item.target)
            self.on_step()
        groups: dict[DigestText, tuple[list[DigestText], list[DigestText]]] = {}
        for digest in forest.parents:
            groups.setdefault(forest.find(digest), ([], []))[digest not in parents].append(digest)
            self.on_step()
        return [[*group_parents, *leaves] for group_parents, leaves in groups.values()]

    def _mark(self, references: References, layers: set[DigestText]) -> None:
        for digest in map(str, references.objects):
            self.garbage.discard(digest)
            layers.discard(digest)

    def _mark_all(self, repository: str) -> None:
        for _, target in self._links.iter_tags(repository):
            if target is not None:
                self.garbage.discard(str(target))
            self.on_step()
        for digest in self._links.manifests(repository):
            self.garbage.discard(str(digest))
            with suppress(ManifestUnreadable):
                self._mark(self._read(repository, str(digest))[0], set())
            self.on_step()
        for layer in self._links.layers(repository):
            self.garbage.discard(str(layer))
            self.on_step()

    def _read(self, repository: str, text: DigestText) -> tuple[References, float]:
        return load_references(self._reader, self._layout, self._links, repository, Digest.parse(text))


@define
class _Catalog:
    """The manifests of a repository, without their references.

    If untagged manifests are deleted, it has also the `recent` ones, and the `subjects` of those that have one.
    `referrers` has the manifests by subject; the subject need not be a manifest of the repository. `derived` are the
    tags with names derived from the digests of others, `former` those of digests that are not there any more.
    """

    digests: set[DigestText] = field(factory=set, init=False)
    recent: set[DigestText] = field(factory=set, init=False)
    subjects: dict[DigestText, DigestText] = field(factory=dict, init=False)
    referrers: dict[DigestText, list[DigestText]] = field(factory=dict, init=False)
    derived: list[DerivedTag] = field(factory=list, init=False)
    former: list[DerivedTag] = field(factory=list, init=False)

    def leads_on(self, digest: DigestText) -> bool:
        """Return whether other manifests may be reached from `digest`."""
        return digest in self.digests or digest in self.referrers


@define
class _Forest:
    """Disjoint sets of manifests (union-find with path halving)."""

    parents: dict[DigestText, DigestText] = field(factory=dict, init=False)  # a root is its own parent

    def find(self, digest: DigestText) -> DigestText:
        """Return the representative of the set that contains `digest`; add a new set if there is none."""
        parents = self.parents
        parent = parents.setdefault(digest, digest)
        while parent != digest:
            parents[digest] = parents[parent]
            digest = parents[digest]
            parent = parents[digest]
        return digest

    def join(self, one: DigestText, other: DigestText) -> None:
        """Unite the sets of two manifests."""
        self.parents[self.find(one)] = self.find(other)


def _subject(base: str | None) -> DigestText | None:
    """Return the digest that a `fallback_base` was derived from, if it has all of it."""
    return base.replace("-", ":") if base is not None and base.startswith("sha256-") else None


def load_references(
    reader: StrictReader, layout: Layout, links: Links, repository: str, digest: Digest
) -> tuple[References, float]:
    """Return the references of a manifest and its last use (POSIX time). Blocks. Raises `ManifestUnreadable`."""
    # Do not use `Blobs`, because it would record a use of every manifest.
    try:
        with open(reader.open(layout.blob(digest)), "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if status.st_size > MAX_MANIFEST:
                size = f"{status.st_size} bytes, more than the {MAX_MANIFEST} allowed"
                raise ManifestUnreadable(f"the manifest {digest} has {size}")
            content = file.read(status.st_size) or b""
    except Missing:
        raise ManifestUnreadable(f"the blob of the manifest {digest} is missing") from None
    except OSError as error:
        raise ManifestUnreadable(f"the manifest {digest} cannot be read ({error.strerror})") from None
    if Digest.of(content, digest.algorithm) != digest:
        raise ManifestUnreadable(f"the manifest {digest} is damaged: its content does not match the digest")
    try:
        references = extract_references(content, links.manifest_media_type(repository, digest))
    except ManifestInvalid as error:
        raise ManifestUnreadable(f"the manifest {digest} is invalid ({error.message})") from None
    return references, status.st_mtime
