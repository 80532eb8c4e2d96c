"""Which manifests of one repository in a bucket no tag leads to. Pure.

The rules are those of `store.mark`: a tag reaches its manifest, and a manifest its children, its subject and its
referrers. A tag with a name that is derived from the digest of another manifest is no root, but belongs to that one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from attrs import define, field, frozen

from dockerproxy.bucket.walk import ListedRepository
from dockerproxy.oci.manifests import fallback_base, fallback_tag
from dockerproxy.oci.names import Digest, Tag
from dockerproxy.store.mark import DigestText, ManifestUnreadable
from dockerproxy.store.references import References


@frozen
class Plan:
    """The needs of a repository.

    `dead` has the manifests to delete, in their order: an index before its children, and a subject before its
    referrers. Those that would stay with one are its value. `tags` has the tags to delete, with their manifests, and
    `orphans` those that belonged to a manifest that is deleted, but stay for now. `recent` is the number of manifests
    that stay only because they are new.
    """

    live: frozenset[DigestText]
    dead: Mapping[DigestText, tuple[DigestText, ...]]
    tags: Mapping[Tag, DigestText]
    orphans: tuple[Tag, ...]
    recent: int


def plan_repository(
    repository: ListedRepository,
    targets: Mapping[Tag, DigestText | None],
    references: Mapping[DigestText, References],
    grace: float,
) -> Plan:
    """Return the plan of a repository with tags that lead to `targets`. Its manifests have `references`.

    A manifest with a link younger than `grace` seconds is a root. Raise `ManifestUnreadable` if a tag leads nowhere.
    """
    planner = _Planner(repository, references)
    recent = {text for text, age in repository.manifests.items() if age <= grace}
    planner.read_tags(targets, recent)
    planner.reach(planner.roots)
    reached = len(recent & planner.live)
    planner.reach(recent)
    tags, orphans = planner.former, []
    for tag, target, subject in planner.derived:
        if subject in planner.live:
            continue
        if target in recent:
            orphans.append(tag)
        else:
            tags[tag] = target
    return Plan(frozenset(planner.live), planner.order_dead(), tags, tuple(orphans), len(recent) - reached)


@define
class _Planner:
    _repository: ListedRepository
    _references: Mapping[DigestText, References]
    roots: set[DigestText] = field(factory=set, init=False)
    live: set[DigestText] = field(factory=set, init=False)
    derived: list[tuple[Tag, DigestText, DigestText]] = field(factory=list, init=False)  # tag, target, subject
    former: dict[Tag, DigestText] = field(factory=dict, init=False)
    _referrers: dict[DigestText, list[DigestText]] = field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        for text, references in self._references.items():
            if references.subject is not None:
                self._referrers.setdefault(str(references.subject), []).append(text)

    def read_tags(self, targets: Mapping[Tag, DigestText | None], recent: set[DigestText]) -> None:
        """Sort the tags into `roots`, `derived` and `former`."""
        manifests = self._repository.manifests
        bases: dict[Tag, DigestText] | None = None
        for tag, target in targets.items():
            base = fallback_base(tag)
            if target is None:
                raise ManifestUnreadable(f"the link of the tag {tag} is torn", tag)
            if base is None:
                self._add_root(tag, target)
                continue
            if bases is None:
                bases = {fallback_tag(Digest.parse(text)): text for text in manifests}
            subject = bases.get(Tag(base))
            if subject == target:  # a person may give an image its own digest as a name
                self._add_root(tag, target)
            elif subject is not None:
                self._check_target(tag, target)
                self.derived.append((tag, target, subject))
                self._referrers.setdefault(subject, []).append(target)
            elif target in manifests and tag not in self._repository.orphaned:
                self._add_root(tag, target)  # a digest that was never here is a name as any other
            elif target not in recent:
                self.former[tag] = target

    def _add_root(self, tag: Tag, target: DigestText) -> None:
        self._check_target(tag, target)
        self.roots.add(target)

    def _check_target(self, tag: Tag, target: DigestText) -> None:
        if target not in self._repository.manifests:
            raise ManifestUnreadable(f"the tag {tag} points to {target}, which is not a manifest here", tag)

    def reach(self, roots: Iterable[DigestText]) -> None:
        """Add the manifests that are reachable from `roots` to `live`."""
        pending = [root for root in roots if root not in self.live]
        self.live.update(pending)
        while pending:
            for text in self._neighbours(pending.pop()):
                if text not in self.live:
                    self.live.add(text)
                    pending.append(text)

    def _neighbours(self, text: DigestText) -> Iterator[DigestText]:
        yield from self._followers(text)
        subject = self._references[text].subject
        if subject is not None and str(subject) in self._repository.manifests:
            yield str(subject)

    def _followers(self, text: DigestText) -> Iterator[DigestText]:
        """Yield the children and the referrers of a manifest."""
        for child in map(str, self._references[text].manifests):
            if child in self._repository.manifests:
                yield child
        yield from self._referrers.get(text, ())

    def order_dead(self) -> dict[DigestText, tuple[DigestText, ...]]:
        followers = {
            text: tuple(follower for follower in dict.fromkeys(self._followers(text)) if follower not in self.live)
            for text in self._repository.manifests
            if text not in self.live
        }
        waiting = dict.fromkeys(followers, 0)
        for texts in followers.values():
            for text in texts:
                waiting[text] += 1
        ready = sorted(text for text, count in waiting.items() if not count)
        ordered: dict[DigestText, tuple[DigestText, ...]] = {}
        while ready:
            text = ready.pop()
            ordered[text] = followers[text]
            for follower in followers[text]:
                waiting[follower] -= 1
                if not waiting[follower]:
                    ready.append(follower)
        # Two indexes with a child in common may lead back to each other, if the child of one refers to the other.
        return {**ordered, **{text: followers[text] for text in sorted(followers.keys() - ordered.keys())}}
