"""A walk through a whole bucket, by few listings: its contents, and its repositories one after the other.

Memory grows with the largest repository only. Objects that are written meanwhile may be missing. Every age is that of
the object, in seconds, by the clock of the store.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable

from attrs import define, field, frozen

from dockerproxy.bucket import keys
from dockerproxy.bucket.s3 import ListedKey, S3Bucket
from dockerproxy.bucket.store_errors import retry_after
from dockerproxy.concurrency import gather
from dockerproxy.errors import DigestInvalid, ManifestInvalid, NameInvalid, StoreRefused
from dockerproxy.oci.manifests import MAX_MANIFEST
from dockerproxy.oci.names import Digest, Repository, Tag, parse_tag
from dockerproxy.store.layout import digest_from_names
from dockerproxy.store.mark import DigestText, ManifestUnreadable
from dockerproxy.store.references import References, extract_references

AT_ONCE = 16  # requests that a walk sends at a time
_MAX_LINK = 256  # bytes of a link or a media type


@frozen(slots=True)
class ListedContent:
    """A content of the bucket: a blob, or the content of a manifest. `size` is in bytes."""

    digest: Digest
    size: int
    age: float


@define
class ListedRepository:
    """The keys of a repository. Digests are texts, and `layers`, `manifests` and `tags` have the ages of the links.

    `notes` has the names of the objects beside the link to a manifest, also if there is no link. `tag_index` has pairs
    of a tag and a manifest that it has, or had. `referrers` has pairs of a subject and a manifest that refers to it.
    """

    name: Repository
    layers: dict[DigestText, float] = field(factory=dict)
    manifests: dict[DigestText, float] = field(factory=dict)
    notes: dict[DigestText, set[str]] = field(factory=dict)
    tags: dict[Tag, float] = field(factory=dict)
    tag_index: set[tuple[Tag, DigestText]] = field(factory=set)
    orphaned: set[Tag] = field(factory=set)
    referrers: set[tuple[DigestText, DigestText]] = field(factory=set)

    def add(self, entry: ListedKey) -> None:
        """Add an object of this repository. Keys of other kinds do not count."""
        match entry.key.removeprefix(f"{keys.REPOSITORIES}{self.name}/").split("/"):
            case ["_layers", algorithm, encoded, "link"] if digest := digest_from_names(algorithm, encoded):
                self.layers[str(digest)] = entry.age
            case ["_manifests", "revisions", algorithm, encoded, name] if digest := digest_from_names(
                algorithm, encoded
            ):
                if name == "link":
                    self.manifests[str(digest)] = entry.age
                else:
                    self.notes.setdefault(str(digest), set()).add(name)
            case ["_manifests", "tags", text, *rest] if tag := _parse_tag(text):
                self._add_to_tag(tag, rest, entry.age)
            case ["_referrers", algorithm, encoded, name] if subject := digest_from_names(algorithm, encoded):
                referrer = keys.referrer_of(name)
                if referrer is not None:
                    self.referrers.add((str(subject), str(referrer)))

    def _add_to_tag(self, tag: Tag, names: list[str], age: float) -> None:
        match names:
            case ["current", "link"]:
                self.tags[tag] = age
            case ["orphaned"]:
                self.orphaned.add(tag)
            case ["index", algorithm, encoded, "link"] if digest := digest_from_names(algorithm, encoded):
                self.tag_index.add((tag, str(digest)))


async def walk_contents(bucket: S3Bucket) -> AsyncIterator[ListedContent]:
    """Yield all contents."""
    async for entry in bucket.list_keys(keys.BLOBS):
        digest = keys.content_of(entry.key)
        if digest is not None:
            yield ListedContent(digest, entry.size, entry.age)


async def walk_repositories(bucket: S3Bucket) -> AsyncIterator[ListedRepository]:
    """Yield all repositories. Raise `StoreRefused` if the store does not list the keys of one together."""
    current: ListedRepository | None = None
    seen: set[Repository] = set()
    async for entry in bucket.list_keys(keys.REPOSITORIES):
        name = keys.repository_of(entry.key)
        if name is None:
            continue
        if current is None or name != current.name:
            if current is not None:
                yield current
            if name in seen:
                raise StoreRefused(f"{bucket.location} lists the keys of {name} in two places", headers=retry_after())
            seen.add(name)
            current = ListedRepository(name)
        current.add(entry)
    if current is not None:
        yield current


async def walk_repository(bucket: S3Bucket, name: Repository) -> ListedRepository:
    """Return one repository."""
    repository = ListedRepository(name)
    async for entry in bucket.list_keys(keys.own_prefix(name)):
        repository.add(entry)
    return repository


async def read_tags(bucket: S3Bucket, name: Repository, tags: Iterable[Tag]) -> dict[Tag, DigestText | None]:
    """Return the manifests of tags. A torn link has None, and a tag that is not there is left out."""

    async def read(tag: Tag) -> tuple[Tag, bytes | None]:
        return tag, await bucket.read_start(keys.tag_key(name, tag), _MAX_LINK)

    found = await gather((read(tag) for tag in tags), AT_ONCE)
    return {tag: _parse_link(content) for tag, content in found if content is not None}


async def read_references(bucket: S3Bucket, repository: ListedRepository, text: DigestText) -> References:
    """Return the references of a manifest. Raise `ManifestUnreadable`."""
    digest = Digest.parse(text)
    media_type = None
    try:
        content = await bucket.get(keys.blob_key(digest), MAX_MANIFEST)
        if "media-type" in repository.notes.get(text, ()):
            media_type = await bucket.read_start(keys.media_type_key(repository.name, digest), _MAX_LINK)
    except StoreRefused as error:
        raise ManifestUnreadable(f"the manifest {digest} cannot be read ({error.message})") from None
    if content is None:
        raise ManifestUnreadable(f"the content of the manifest {digest} is missing")
    if Digest.of(content, digest.algorithm) != digest:
        raise ManifestUnreadable(f"the manifest {digest} is damaged: its content does not match the digest")
    try:
        return extract_references(content, (media_type or b"").decode("latin-1") or None)
    except ManifestInvalid as error:
        raise ManifestUnreadable(f"the manifest {digest} is invalid ({error.message})") from None


def _parse_link(content: bytes) -> DigestText | None:
    try:
        return str(Digest.parse(content.decode("ascii").strip()))
    except (DigestInvalid, UnicodeDecodeError):
        return None


def _parse_tag(text: str) -> Tag | None:
    try:
        return parse_tag(text)
    except NameInvalid:
        return None
