"""The mark phase of garbage collection in a bucket: a survey of all that nothing needs.

A run surveys the bucket twice (see `gc_runs`). The second survey reads only manifests that the first one did not, and
again those of repositories with manifests to delete.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from attrs import define, field

from dockerproxy.bucket import keys
from dockerproxy.bucket.gc_plan import plan_repository
from dockerproxy.bucket.gc_runs import catalog_entry, content_entry, link_entry, tag_entry
from dockerproxy.bucket.s3 import S3Bucket
from dockerproxy.bucket.walk import (
    AT_ONCE,
    ListedRepository,
    read_references,
    read_tags,
    walk_contents,
    walk_repositories,
)
from dockerproxy.concurrency import gather
from dockerproxy.oci.names import Digest, Repository, Tag
from dockerproxy.store.mark import DigestText, ManifestUnreadable
from dockerproxy.store.references import References

_ROUNDING = 1.0  # seconds by which an age may be wrong, because a store may give dates in whole seconds
_BATCH = 512  # manifests with their references in memory at a time, if a repository needs all of its manifests

Followers = tuple[DigestText, ...]
"""The manifests that stay if another one does."""


@define
class Garbage:
    """Objects to delete: `contents` with their sizes in bytes, and the rest by repository.

    `manifests` are in the order of their deletion, with their followers. `tags` have the manifests that they led to.
    """

    contents: dict[DigestText, int] = field(factory=dict)
    links: dict[Repository, set[DigestText]] = field(factory=dict)
    manifests: dict[Repository, Mapping[DigestText, Followers]] = field(factory=dict)
    tags: dict[Repository, Mapping[Tag, DigestText]] = field(factory=dict)
    catalog: set[Repository] = field(factory=set)

    def entries(self) -> Iterator[str]:
        """Yield the entries. That of a content is also that of the links to it."""
        yield from map(content_entry, self.contents)
        for repository, links in self.links.items():
            yield from (link_entry(repository, text) for text in links if text not in self.contents)
        for repository, manifests in self.manifests.items():
            yield from (link_entry(repository, text) for text in manifests)
        for repository, tags in self.tags.items():
            yield from (tag_entry(repository, tag) for tag in tags)
        yield from map(catalog_entry, self.catalog)

    def keep_only(self, other: Garbage) -> None:
        """Remove all that is not in `other`, or not in the same state."""
        self.contents = {text: size for text, size in self.contents.items() if text in other.contents}
        for repository, links in list(self.links.items()):
            self.links[repository] = links & other.links.get(repository, set())
        for repository, manifests in list(self.manifests.items()):
            still = other.manifests.get(repository, {})
            self.manifests[repository] = {text: manifests[text] for text in manifests if text in still}
        for repository, tags in list(self.tags.items()):
            found = other.tags.get(repository, {})
            self.tags[repository] = {tag: target for tag, target in tags.items() if found.get(tag) == target}
        self.catalog &= other.catalog

    def limit(self, count: int) -> int:
        """Leave at most `count` entries. Return how many contents and links were left out."""
        self.catalog = set(sorted(self.catalog)[:count])
        others = sum(map(len, self.manifests.values())) + sum(map(len, self.tags.values())) + len(self.catalog)
        room = max(0, count - others)
        dropped = set(sorted(self.contents)[room:])
        room, left_out = max(0, room - len(self.contents)), len(dropped)
        for repository, links in list(self.links.items()):
            alone = sorted(links - self.contents.keys())
            kept, room = alone[:room], max(0, room - len(alone))
            left_out += len(alone) - len(kept)
            self.links[repository] = (links & self.contents.keys()) - dropped | set(kept)
        for text in dropped:
            del self.contents[text]
        return left_out


@define
class Survey:
    """One survey: `garbage` is its result, and `known` are the manifests that it has read.

    `on_step` is called after each short step, with the number of manifests that were seen. With `first`, this is the
    second survey. At most `max_manifests` are found.
    """

    _bucket: S3Bucket
    _grace: float
    _delete_untagged: bool
    _on_step: Callable[[int], object]
    _max_manifests: int
    _first: Survey | None = None
    garbage: Garbage = field(factory=Garbage, init=False)
    known: dict[Repository, set[DigestText]] = field(factory=dict, init=False)
    problems: list[str] = field(factory=list, init=False)
    orphans: dict[Repository, tuple[Tag, ...]] = field(factory=dict, init=False)
    repositories: int = field(default=0, init=False)
    contents: int = field(default=0, init=False)
    manifests: int = field(default=0, init=False)
    recent: int = field(default=0, init=False)
    recent_bytes: int = field(default=0, init=False)
    recent_manifests: int = field(default=0, init=False)
    without_catalog: list[Repository] = field(factory=list, init=False)
    _young: dict[DigestText, int] = field(factory=dict, init=False)
    _found: int = field(default=0, init=False)

    async def run(self) -> None:
        """Look at everything: first at the ages of contents, then at the repositories."""
        catalog = {
            name async for entry in self._bucket.list_keys(keys.CATALOG) if (name := keys.catalog_name(entry.key))
        }
        async for content in walk_contents(self._bucket):
            self.contents += 1
            text = str(content.digest)
            if self._is_young(content.age):
                self._young[text] = content.size
            elif self._first is None or text in self._first.garbage.contents:
                self.garbage.contents[text] = content.size
            self._on_step(self.manifests)
        self.garbage.catalog = set(catalog)
        async for repository in walk_repositories(self._bucket):
            self.repositories += 1
            await self._look_at(repository)
            if self.garbage.manifests.get(repository.name, {}).keys() != repository.manifests.keys():
                self.garbage.catalog.discard(repository.name)
                if repository.name not in catalog:
                    self.without_catalog.append(repository.name)
        self.recent = len(self._young)
        self.recent_bytes = sum(self._young.values())

    def _is_young(self, age: float) -> bool:
        return age <= self._grace + _ROUNDING

    async def _look_at(self, repository: ListedRepository) -> None:
        links = set()
        for text, age in repository.layers.items():
            if self._is_young(age):
                self._need_content(text)
            else:
                links.add(text)
        try:
            if self._must_plan(repository):
                await self._plan(repository, links)
            else:
                await self._need_all(repository, repository.manifests, links)
                await self._check_tags(repository)
        except ManifestUnreadable as error:
            remedy = f"; push the tag again, or run `dockerproxy rm {repository.name}:{error.tag}`" if error.tag else ""
            self.problems.append(f"{repository.name}: {error}; nothing was deleted from this repository{remedy}")
            await self._keep_whole(repository)
            return
        if links:
            self.garbage.links[repository.name] = links

    def _must_plan(self, repository: ListedRepository) -> bool:
        if not self._delete_untagged or self._found >= self._max_manifests:
            return False
        if self._first is None:
            return True
        before = self._first.garbage
        return repository.name in before.manifests or repository.name in before.tags

    async def _need_all(
        self, repository: ListedRepository, manifests: Iterable[DigestText], links: set[DigestText]
    ) -> None:
        """Mark all `manifests` as needed, and take all that they need from `links`."""
        known = self._first.known.get(repository.name, ()) if self._first is not None else ()
        unread = [text for text in manifests if text not in known]
        for text in repository.manifests:
            self._need_content(text)
            links.discard(text)
        for start in range(0, len(unread), _BATCH):
            for references in (await self._read(repository, unread[start : start + _BATCH])).values():
                self._need(references, links)
        self.known[repository.name] = set(unread)

    async def _read(
        self, repository: ListedRepository, manifests: Iterable[DigestText]
    ) -> dict[DigestText, References]:
        async def read(text: DigestText) -> tuple[DigestText, References]:
            references = await read_references(self._bucket, repository, text)
            self.manifests += 1
            self._on_step(self.manifests)
            return text, references

        return dict(await gather((read(text) for text in manifests), AT_ONCE))

    async def _plan(self, repository: ListedRepository, links: set[DigestText]) -> None:
        targets = await self._read_targets(repository)
        references = await self._read(repository, repository.manifests)
        plan = plan_repository(repository, targets, references, self._grace + _ROUNDING)
        for text in plan.live:
            self._need_content(text)
            links.discard(text)
            self._need(references[text], links)
        self.known[repository.name] = set(references)
        self.recent_manifests += plan.recent
        if plan.dead:
            self.garbage.manifests[repository.name] = plan.dead
            self._found += len(plan.dead)
        if plan.tags:
            self.garbage.tags[repository.name] = plan.tags
        if plan.orphans:
            self.orphans[repository.name] = plan.orphans

    async def _read_targets(self, repository: ListedRepository) -> dict[Tag, DigestText | None]:
        """Return the manifests of the tags, listed again, because the ages of the links must be looked at first.

        Manifests that were pushed since then are added to the repository, as new ones.
        """
        prefix = keys.tags_prefix(repository.name)
        tags = [
            Tag(tag) async for entry in self._bucket.list_keys(prefix) if (tag := keys.tag_of(entry.key)) is not None
        ]
        targets = await self._follow(repository, tags)
        for target in {target for target in targets.values() if target is not None} - repository.manifests.keys():
            if await self._is_linked(repository, target):
                repository.manifests[target] = 0.0
                if await self._bucket.size(keys.media_type_key(repository.name, Digest.parse(target))) is not None:
                    repository.notes.setdefault(target, set()).add("media-type")
        return targets

    async def _follow(self, repository: ListedRepository, tags: Iterable[Tag]) -> dict[Tag, DigestText | None]:
        """Return the manifests of tags, without those that a user removes at this moment."""
        targets = await read_tags(self._bucket, repository.name, tags)
        for tag, target in list(targets.items()):
            if target is None or target in repository.manifests or await self._is_linked(repository, target):
                continue
            if (await read_tags(self._bucket, repository.name, [tag])).get(tag) != target:
                del targets[tag]
        return targets

    async def _is_linked(self, repository: ListedRepository, text: DigestText) -> bool:
        return await self._bucket.size(keys.manifest_key(repository.name, Digest.parse(text))) is not None

    async def _check_tags(self, repository: ListedRepository) -> None:
        """Raise `ManifestUnreadable` if a tag leads to no manifest. Only tags that look so are read."""
        good = {tag for tag, text in repository.tag_index if text in repository.manifests}
        for tag, target in (await self._follow(repository, set(repository.tags) - good)).items():
            if target is None:
                raise ManifestUnreadable(f"the link of the tag {tag} is torn", tag)
            if not await self._is_linked(repository, target):
                raise ManifestUnreadable(f"the tag {tag} points to {target}, which is not a manifest here", tag)

    async def _keep_whole(self, repository: ListedRepository) -> None:
        """Mark everything that the repository has as needed, as far as it can be read."""
        for text in (*repository.layers, *repository.manifests):
            self._need_content(text)
        for target in (await read_tags(self._bucket, repository.name, repository.tags)).values():
            if target is not None:
                self._need_content(target)
        for text in repository.manifests:
            try:
                references = await read_references(self._bucket, repository, text)
            except ManifestUnreadable:
                continue
            self._need(references, set())
            self._on_step(self.manifests)

    def _need(self, references: References, links: set[DigestText]) -> None:
        for text in map(str, references.objects):
            self._need_content(text)
            links.discard(text)

    def _need_content(self, text: DigestText) -> None:
        self.garbage.contents.pop(text, None)
        self._young.pop(text, None)
