"""Pulls whole images into the cache for the administrator, as a client would, within the rate limits of registries.

A pull uses the same cache as the clients: it joins their downloads, they join its own, and what is here already is not
fetched again. It has no credential of its own, so it may read what a client without one may.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from enum import Enum
from functools import partial
from typing import Any

from attrs import define, field, frozen
from twisted.internet.defer import Deferred, DeferredList, DeferredSemaphore

from dockerproxy.cache.downloads import BlobDownload
from dockerproxy.cache.image_budget import PullBudget
from dockerproxy.cache.pins import MAX_CONTENTS, repository_key
from dockerproxy.cache.pullthrough import CachedRegistry, PullThrough
from dockerproxy.cache.reader import BlobReader
from dockerproxy.concurrency import current_client, in_thread
from dockerproxy.errors import (
    InsufficientStorage,
    ManifestInvalid,
    ManifestUnknown,
    NameInvalid,
    NameUnknown,
    RegistryError,
    SizeInvalid,
    Unauthorized,
    UpstreamRefused,
)
from dockerproxy.oci.content import ManifestResponse
from dockerproxy.oci.image_names import ImageName
from dockerproxy.oci.manifests import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    INDEX_TYPES,
    MAX_MANIFEST,
    OCI_INDEX,
    OCI_MANIFEST,
    Manifest,
    is_nondistributable,
    parse_manifest,
)
from dockerproxy.oci.names import Digest, Host, Reference, Registry, parse_tag
from dockerproxy.oci.platform_selection import ALL, IndexEntry, Platform, parse_index, require, select
from dockerproxy.oci.platforms import MAX_CONFIG, config_platform
from dockerproxy.oci.referrers import ReferrersQuery
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.disk_errors import disk_error
from dockerproxy.store.layout import IngestKey, Layout
from dockerproxy.store.links import Links
from dockerproxy.store.tree_reader import read_small
from dockerproxy.store.write_probe import write_file

_ACCEPT = [OCI_INDEX, DOCKER_LIST, OCI_MANIFEST, DOCKER_MANIFEST]
_BLOBS_AT_ONCE = 6  # of all pulls, so that clients have the rest of the line
_REQUESTS_AT_ONCE = 8  # for manifests
_MAX_DEPTH = 4  # of indexes in indexes
_MAX_REFERRERS = 100  # of one manifest
_COMPANION_SUFFIXES = (".sig", ".att", ".sbom")  # cosign's tags, which hold signatures and SBOMs of older images


class PullState(Enum):
    """The state of a pull, as users read it."""

    QUEUED = "queued"
    RESOLVING = "resolving"
    WAITING = "waiting"
    DOWNLOADING = "downloading"
    DONE = "done"
    FAILED = "failed"


@frozen
class PullRequest:
    """An image to pull. Empty `platforms` mean those that were pulled here before, or else this machine's."""

    image: ImageName
    platforms: tuple[str, ...] = ()
    referrers: bool = False

    @property
    def wanted_platforms(self) -> list[Platform]:
        """The platforms that it names. It is empty if it names none, or `ALL`."""
        return [] if ALL in self.platforms else [Platform.parse(text) for text in self.platforms]


@frozen
class Estimate:
    """A pull that has not been made yet: GETs that count, and the bytes to download; None if they are not known."""

    pulls: int
    size: int | None


@define(eq=False)
class ImagePull:
    """One pull, and what is known of it. `contents` has the sizes of the image's parts."""

    request: PullRequest
    registry: Registry
    state: PullState = PullState.QUEUED
    message: str = ""
    is_stale: bool = False
    """Whether the registry could not be asked, so that this is what was cached before."""
    digest: Digest | None = None
    media_type: str = ""
    contents: dict[Digest, int] = field(factory=dict)
    present: set[Digest] = field(factory=set)
    """Those of `contents` that are in the cache."""

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self.state in (PullState.DONE, PullState.FAILED)


class ImagePuller:
    """Pulls images of the registries in the live table `registries`, by host. `clock` returns POSIX time."""

    def __init__(
        self,
        reactor: Any,
        cache: PullThrough,
        layout: Layout,
        registries: Mapping[Host, Registry],
        budget: PullBudget,
    ) -> None:
        self._reactor = reactor
        self._cache = cache
        self._layout = layout
        self._blobs = Blobs(layout, durable=False)
        self._links = Links(layout, durable=False)
        self._registries = registries
        self._budget = budget
        self._blob_slots: Any = DeferredSemaphore(_BLOBS_AT_ONCE)
        self._request_slots: Any = DeferredSemaphore(_REQUESTS_AT_ONCE)

    def prepare(self, request: PullRequest) -> ImagePull:
        """Return a pull that has not begun. Raise `NameUnknown` if the registry is not one of ours."""
        registry = self._registries.get(request.image.host)
        if registry is None:
            raise NameUnknown(f"{request.image.host} is not cached here; add it to REGISTRIES")
        return ImagePull(request, registry)

    def row(self, pull: ImagePull) -> dict[str, Any]:
        """Return what is known of `pull`, as a JSON value."""
        state, message = pull.state, pull.message
        until = None if pull.is_over else self._budget.waits_until(pull)
        if until is not None:
            state, message = PullState.WAITING, self._budget.sentence(pull.registry)
        done = sum(pull.contents[digest] for digest in pull.present)
        if state is PullState.DOWNLOADING:
            done += sum(self._written(pull, digest) for digest in pull.contents.keys() - pull.present)
        return {
            "image": str(pull.request.image),
            "state": state.value,
            "digest": None if pull.digest is None else str(pull.digest),
            "done": done,
            "total": sum(pull.contents.values()) if pull.contents else None,
            "message": message,
            "until": until,
        }

    def _written(self, pull: ImagePull, digest: Digest) -> int:
        download = self._download(pull, digest)
        return 0 if download is None else min(download.written, pull.contents[digest])

    def _download(self, pull: ImagePull, digest: Digest) -> BlobDownload | None:
        return self._cache.blobs.downloads.get(IngestKey(str(pull.registry.host), digest))

    def _view(self, pull: ImagePull) -> CachedRegistry:
        return self._cache.registry(pull.registry, None)

    # before the pull

    async def resolve(self, pull: ImagePull) -> None:
        """Find out the digest of the image, by HEAD, which no registry counts. Raise `RegistryError`."""
        current_client.set("")
        image = pull.request.image
        async with self._slot(self._request_slots):
            manifest = await self._view(pull).manifest(image.repository, image.reference, _ACCEPT, head=True)
        pull.digest, pull.media_type = manifest.digest, manifest.media_type
        pull.is_stale = manifest.cache_status == "STALE"
        if pull.is_stale:
            pull.message = f"what is cached stays, because {manifest.because}"

    async def resolve_in_turn(self, pull: ImagePull) -> None:
        """Do the same as `resolve`. If the registry refuses that for now, wait and ask again."""
        pull.state = PullState.RESOLVING
        try:
            await self.resolve(pull)
        except RegistryError as error:
            if error.status != 429:
                raise
            resolve = partial(self.resolve, pull)
            await self._budget.spend(pull, self._identity(pull), resolve, resolve)

    async def estimate(self, pull: ImagePull) -> Estimate:
        """Return the cost of a resolved pull. Only what is in the cache is read.

        Raise `NameInvalid` if it is known already that a platform is missing.
        """
        key, digest = repository_key(pull.request.image), pull.digest
        assert digest is not None  # it is resolved
        content = await in_thread(self._reactor, self._read_stored, key, digest)
        if content is None:
            is_index = pull.media_type in INDEX_TYPES
            platforms = len(pull.request.platforms) or 1
            return Estimate(1 + (platforms if is_index else 0), None)
        missing, size, children = 0, 0, [content]
        if pull.media_type in INDEX_TYPES:
            children = []
            for child in await self._choose(pull, content):
                child_content = await in_thread(self._reactor, self._read_stored, key, child)
                if child_content is None:
                    missing += 1
                else:
                    children.append(child_content)
        for child_content in children:
            image = await self._parse(pull, parse_manifest, child_content, None)
            if children == [content] and (image.config is None or self._blobs.exists(image.config.digest)):
                await self._require_platforms(pull, image)
            blobs = _blobs_of(image)
            size += sum(blobs[blob] for blob in blobs if not self._blobs.exists(blob))
        return Estimate(missing, None if missing else size)

    def counts(self, pull: ImagePull) -> bool:
        """Return whether the registry of a resolved pull has said that it counts pulls."""
        return self._budget.is_limited(pull.registry, self._identity(pull))

    def budget_row(self, pull: ImagePull) -> dict[str, Any]:
        """Return the rest of the limit at the registry of `pull`, as a JSON value."""
        return self._budget.row(pull.registry, self._identity(pull))

    def _identity(self, pull: ImagePull) -> str:
        return self._view(pull).identity_at(pull.request.image.repository)

    def _read_stored(self, key: str, digest: Digest) -> bytes | None:
        if not self._links.has_manifest(key, digest):
            return None
        return read_small(self._layout.blob(digest), MAX_MANIFEST)

    # the pull

    async def fetch_manifests(self, pull: ImagePull) -> None:
        """Fetch the manifests of a resolved pull, and fill its `contents`. Raise `RegistryError`."""
        current_client.set("")
        pull.state = PullState.RESOLVING
        assert pull.digest is not None  # it is resolved
        is_here = await self._has_manifest(pull, pull.digest)
        top = await self._manifest(pull, pull.digest if is_here else pull.request.image.reference)
        pull.digest, pull.media_type = top.digest, top.media_type
        await self._add_tree(pull, top, 0)

    async def _add_tree(self, pull: ImagePull, manifest: ManifestResponse, depth: int) -> None:
        self._add(pull, manifest.digest, manifest.size, present=True)
        if not await self._has_manifest(pull, manifest.digest):
            await self._explain_absence(manifest.digest)
        content = manifest.content or b""
        if manifest.media_type not in INDEX_TYPES:
            image = await self._parse(pull, parse_manifest, content, None)
            for digest, size in _blobs_of(image).items():
                self._add(pull, digest, size, present=False)
            if depth == 0 and pull.request.wanted_platforms:
                if image.config is not None:
                    pull.state = PullState.DOWNLOADING
                    await self._fetch_blob(pull, image.config.digest)
                await self._require_platforms(pull, image)
            return
        if depth == _MAX_DEPTH:
            raise ManifestInvalid(f"{pull.request.image} has more than {_MAX_DEPTH} indexes in each other")
        chosen = await self._choose(pull, content) if depth == 0 else await self._all(pull, content)
        await self._add_trees(pull, chosen, depth + 1)

    async def _add_trees(self, pull: ImagePull, digests: Iterable[Digest], depth: int) -> None:
        """Add manifests with all that they lead to. Those that are there already are not read again.

        A thousand indexes may list the same thousand.
        """
        for digest in digests:
            if digest not in pull.present:
                await self._add_tree(pull, await self._manifest(pull, digest), depth)

    async def _require_platforms(self, pull: ImagePull, image: Manifest) -> None:
        """Raise `NameInvalid` if an image without an index is not for the platforms that the pull is to have.

        Its configuration says so; it says nothing if that is not here.
        """
        wanted = pull.request.wanted_platforms
        if not wanted:
            return
        platform = await in_thread(self._reactor, self._platform_of, image)
        try:
            require([] if platform is None else [platform], wanted)
        except NameInvalid as error:
            raise NameInvalid(f"{pull.request.image}: {error.message}") from None

    def _platform_of(self, image: Manifest) -> Platform | None:
        if image.config is None:
            return None
        text = config_platform(read_small(self._layout.blob(image.config.digest), MAX_CONFIG) or b"")
        try:
            return None if text is None else Platform.parse(text)
        except NameInvalid:
            return None

    def _add(self, pull: ImagePull, digest: Digest, size: int, *, present: bool) -> None:
        if digest not in pull.contents and len(pull.contents) >= MAX_CONTENTS:
            raise SizeInvalid(f"{pull.request.image} consists of more than {MAX_CONTENTS} manifests and blobs")
        pull.contents[digest] = size
        if present:
            pull.present.add(digest)

    async def _all(self, pull: ImagePull, content: bytes) -> list[Digest]:
        return select(await self._parse(pull, parse_index, content), (), every=True)

    async def _choose(self, pull: ImagePull, content: bytes) -> list[Digest]:
        """Return the manifests of an index that the pull is to have. Raise `NameInvalid`."""
        request, entries = pull.request, await self._parse(pull, parse_index, content)
        every = ALL in request.platforms
        wanted = request.wanted_platforms
        if not request.platforms:
            wanted = await in_thread(self._reactor, self._default_platforms, request.image, entries)
            # As in containerd, an index that says nothing about platforms is for all of them.
            images = [entry for entry in entries if entry.attests is None]
            every = bool(images) and all(entry.platform is None for entry in images)
        try:
            return select(entries, wanted, every=every, attestations=request.referrers)
        except NameInvalid as error:
            raise NameInvalid(f"{request.image}: {error.message}") from None

    def _default_platforms(self, image: ImageName, entries: Iterable[IndexEntry]) -> list[Platform]:
        """Return the platforms of which the cache has this image, or the index that its tag led to before."""
        key = repository_key(image)
        all_entries = [*entries]
        before = None if isinstance(image.reference, Digest) else self._links.tag(key, image.reference)
        old = None if before is None else self._read_stored(key, before)
        try:
            all_entries += parse_index(old) if old is not None else ()
        except ManifestInvalid:  # the tag led to an image of one platform
            pass
        asked = {
            entry.platform
            for entry in all_entries
            if entry.platform is not None and self._links.has_manifest(key, entry.digest)
        }
        offered = {entry.platform for entry in entries}
        return sorted(asked & offered) or [Platform.normalized("linux", os.uname().machine, "")]

    async def _parse(self, pull: ImagePull, function: Callable[..., Any], *arguments: Any) -> Any:
        return await self._cache.parser.parse(function, *arguments, client=str(pull.registry))

    async def _manifest(self, pull: ImagePull, reference: Reference) -> ManifestResponse:
        """Return a manifest with its content. If it has to be fetched, wait until the budget allows that."""
        view, name = self._view(pull), pull.request.image.repository

        async def get(*, head: bool = False) -> ManifestResponse:
            async with self._slot(self._request_slots):
                return await view.manifest(name, reference, _ACCEPT, head=head)

        if isinstance(reference, Digest) and await self._has_manifest(pull, reference):
            return await get()
        return await self._budget.spend(pull, self._identity(pull), get, lambda: get(head=True))

    async def _explain_absence(self, digest: Digest) -> None:
        """Raise the error because of which the cache has not stored a manifest: its users got that all the same."""
        try:
            await in_thread(self._reactor, write_file, self._layout.staging)
        except OSError as error:
            raise _not_cached(digest, error) from None
        raise InsufficientStorage(f"{digest} was not cached; the daemon's log says why")

    async def _has_manifest(self, pull: ImagePull, digest: Digest) -> bool:
        key = repository_key(pull.request.image)
        return self._links.has_manifest(key, digest) and self._blobs.exists(digest)

    async def fetch_blobs(self, pull: ImagePull) -> None:
        """Download the missing ones of `contents`. Raise `RegistryError` for the first that fails."""
        current_client.set("")
        pull.state = PullState.DOWNLOADING
        missing = [digest for digest in pull.contents if digest not in pull.present]
        work = [Deferred.fromCoroutine(self._fetch_blob(pull, digest)) for digest in missing]
        for is_success, result in await DeferredList(work, consumeErrors=True):
            failure: Any = result
            if not is_success:
                failure.raiseException()

    async def _fetch_blob(self, pull: ImagePull, digest: Digest) -> None:
        current_client.set("")
        async with self._slot(self._blob_slots):
            content = (await self._view(pull).blob(pull.request.image.repository, digest, head=False)).content
            if content is not None:
                try:
                    await content.wait_verified()
                finally:
                    content.close()
        size = self._blobs.size(digest)
        if size is None:
            raise _not_cached(digest, content.failure if isinstance(content, BlobReader) else None)
        pull.contents[digest] = size  # a manifest may have lied about it
        pull.present.add(digest)

    async def fetch_referrers(self, pull: ImagePull) -> None:
        """Fetch the signatures and SBOMs of the image, and add them to `contents`. An error is only noted."""
        current_client.set("")
        image = pull.request.image
        subjects = [digest for digest in pull.contents if await self._has_manifest(pull, digest)]
        for subject in subjects:
            try:
                index = await self._view(pull).referrers(image.repository, subject, ReferrersQuery())
                entries = (await self._parse(pull, parse_index, index.content))[:_MAX_REFERRERS]
                await self._add_trees(pull, (entry.digest for entry in entries), 1)
            except RegistryError as error:
                pull.message = f"its referrers were not fetched: {error.message}"
        if pull.digest is not None:
            await self._fetch_companions(pull, pull.digest)

    async def _fetch_companions(self, pull: ImagePull, digest: Digest) -> None:
        for suffix in _COMPANION_SUFFIXES:
            try:
                tag = parse_tag(f"{digest.algorithm}-{digest.hex}{suffix}")
                await self._add_tree(pull, await self._manifest(pull, tag), 1)
            except (UpstreamRefused, ManifestUnknown):
                continue  # there is none, which the cache remembers for outages
            except RegistryError as error:
                pull.message = f"its signatures were not fetched: {error.message}"
                return

    @asynccontextmanager
    async def _slot(self, slots: Any) -> Any:
        await slots.acquire()
        try:
            yield
        finally:
            slots.release()


def describe_failure(pull: ImagePull, error: RegistryError) -> str:
    """Return the sentence of a pull that failed."""
    image = pull.request.image
    if isinstance(error, UpstreamRefused) and error.status == 404:
        if pull.state is PullState.DOWNLOADING:
            return f"{image.host} does not have all that {image.repository} consists of"
        return f"{image.host} has no {image.repository}:{image.reference}"
    if isinstance(error, UpstreamRefused | Unauthorized) and error.status in (401, 403):
        return (
            f"{image.host} does not let us read {image.repository} ({error.message}); AUTH_REGISTRIES may have a login"
        )
    return error.message


def _not_cached(digest: Digest, failure: Exception | None) -> RegistryError:
    """Return the error of a pull whose content was passed on and not stored, because of `failure`."""
    consequence, cause = f"{digest} was not cached", None if failure is None else failure.__cause__
    for error in (failure, cause):
        if isinstance(error, OSError):
            return disk_error("CACHE_DIR", error, consequence)
    return InsufficientStorage(f"{consequence}: {failure or 'it was evicted at once'}")


def _blobs_of(manifest: Manifest) -> dict[Digest, int]:
    """Return the blobs that a client of the image downloads, and their sizes, 0 if they are not stated."""
    descriptors = manifest.layers if manifest.config is None else (manifest.config, *manifest.layers)
    return {blob.digest: blob.size or 0 for blob in descriptors if not is_nondistributable(blob.media_type)}
