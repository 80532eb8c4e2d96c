"""Tests that every `HostedStore` must pass. A subclass has the fixture `store`, and `run`, which awaits a coroutine."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest

from dockerproxy.errors import (
    BlobUploadBusy,
    BlobUploadUnknown,
    DigestInvalid,
    ManifestBlobUnknown,
    ManifestNeeded,
)
from dockerproxy.oci.content import Content, RemovedImages
from dockerproxy.oci.manifests import OCI_INDEX, OCI_MANIFEST, fallback_tag
from dockerproxy.oci.names import Digest, Repository, Tag, parse_repository, parse_tag
from dockerproxy.oci.paging import NamePage, Page
from dockerproxy.oci.pushed_manifest import PushedManifest
from dockerproxy.oci.uploads import UploadStatus
from dockerproxy.registry.hosted_store import HostedStore

APP, OTHER = parse_repository("team/app"), parse_repository("other/place")
ALL = Page(1000, None)
T = TypeVar("T")


def make_descriptor(content: bytes, media_type: str = "application/vnd.test") -> dict[str, Any]:
    return {"mediaType": media_type, "digest": str(Digest.of(content)), "size": len(content)}


def make_image(config: bytes, *layers: bytes, subject: Digest | None = None, kind: str = "") -> PushedManifest:
    document: dict[str, Any] = {
        "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": make_descriptor(config),
        "layers": [make_descriptor(layer) for layer in layers],
    }  # fmt: skip
    if subject is not None:
        document["subject"] = {"mediaType": OCI_MANIFEST, "digest": str(subject), "size": 1}
    if kind:
        document["artifactType"] = kind
    return PushedManifest.parse(json.dumps(document).encode(), None, OCI_MANIFEST)


def make_tags(*names: str) -> list[Tag]:
    return [parse_tag(name) for name in names]


async def read_all(content: Content) -> bytes:
    data, offset = b"", 0
    try:
        while chunk := await content.read(offset, 5):
            data += chunk
            offset += len(chunk)
    finally:
        content.close()
    return data


class HostedStoreSuite(ABC):
    """The tests. Every one begins with an empty store."""

    @abstractmethod
    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Return the result of `coroutine`."""

    def push_blob(self, store: HostedStore, content: bytes, repository: Repository = APP) -> Digest:
        async def push() -> Digest:
            digest = Digest.of(content)
            upload = await store.uploads.start(repository, "sha256", "someone")
            await upload.append(content)
            await upload.commit(digest)
            return digest

        return self.run(push())

    def push_image(
        self, store: HostedStore, seed: str, *tags: str, repository: Repository = APP, **options: Any
    ) -> Digest:
        self.push_blob(store, seed.encode(), repository)
        manifest = make_image(seed.encode(), **options)
        self.run(store.commit_manifest(repository, manifest, make_tags(*tags)))
        return manifest.digest

    def tags(self, store: HostedStore, repository: Repository = APP) -> list[str]:
        return self.run(store.tags(repository, ALL)).names

    def referrers(self, store: HostedStore, subject: Digest, kind: str | None = None, after: str | None = None) -> Any:
        page = self.run(store.referrers(APP, subject, kind, after))
        assert page.last is None
        return [json.loads(descriptor)["digest"] for descriptor in page.descriptors]

    # nothing

    def test_an_empty_store(self, store: HostedStore) -> None:
        digest = Digest.of(b"x")
        assert not self.run(store.has_repository(APP))
        assert self.run(store.blob_size(APP, digest)) is None
        assert self.run(store.open_blob(APP, digest)) is None
        assert not self.run(store.mount_blob(APP, digest, None))
        assert not self.run(store.mount_blob(APP, digest, OTHER))
        assert not self.run(store.unlink_blob(APP, digest))
        for reference in (digest, parse_tag("latest")):
            assert self.run(store.manifest(APP, reference)) is None
        assert not self.run(store.remove_tag(APP, parse_tag("latest")))
        assert not self.run(store.remove_manifest(APP, digest))
        assert self.run(store.tags(APP, ALL)) == NamePage([], False)
        assert self.run(store.repositories(ALL)) == NamePage([], False)
        assert self.referrers(store, digest) == []
        assert not self.run(store.has_repository(APP))

    # uploads

    @pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
    def test_an_upload(self, store: HostedStore, algorithm: str) -> None:
        upload = self.run(store.uploads.start(APP, algorithm, "someone"))
        session = upload.status.session
        for part in (b"first ", b"second"):
            self.run(upload.append(part))
        assert upload.status.size == 12
        assert self.run(store.uploads.status(APP, session)).size == 12
        assert not self.run(store.has_repository(APP))
        digest = Digest.of(b"first second", algorithm)
        self.run(upload.commit(digest))
        assert self.run(store.has_repository(APP))
        assert self.run(store.blob_size(APP, digest)) == 12
        content = self.run(store.open_blob(APP, digest))
        assert content is not None and content.size == 12
        assert self.run(read_all(content)) == b"first second"
        with pytest.raises(BlobUploadUnknown):
            self.run(store.uploads.resume(APP, session))

    def test_a_blob_of_any_algorithm_may_end_an_upload(self, store: HostedStore) -> None:
        upload = self.run(store.uploads.start(APP, "sha256", "someone"))
        self.run(upload.append(b"data"))
        self.run(upload.commit(Digest.of(b"data", "sha512")))
        assert self.run(store.blob_size(APP, Digest.of(b"data", "sha512"))) == 4

    def test_an_empty_blob(self, store: HostedStore) -> None:
        upload = self.run(store.uploads.start(APP, "sha256", "someone"))
        self.run(upload.commit(Digest.of(b"")))
        assert self.run(store.blob_size(APP, Digest.of(b""))) == 0

    def test_an_offer_without_bytes_is_resumed(self, store: HostedStore) -> None:
        upload = self.run(store.uploads.start(APP, "sha512", "someone"))
        session = upload.status.session
        self.run(upload.suspend())
        assert self.run(store.uploads.status(APP, session)) == UploadStatus(session, 0)
        with pytest.raises(BlobUploadUnknown):
            self.run(store.uploads.resume(OTHER, session))
        resumed = self.run(store.uploads.resume(APP, session))
        self.run(resumed.append(b"data"))
        stored_session = resumed.status.session
        self.run(resumed.suspend())
        for name in (session, stored_session):
            assert self.run(store.uploads.status(APP, name)) == UploadStatus(stored_session, 4)
        resumed = self.run(store.uploads.resume(APP, session))
        self.run(resumed.commit(Digest.of(b"data")))
        for name in (session, stored_session):
            with pytest.raises(BlobUploadUnknown):
                self.run(store.uploads.status(APP, name))

    def test_a_first_chunk_that_is_dropped_leaves_an_offer(self, store: HostedStore) -> None:
        upload = self.run(store.uploads.start(APP, "sha256", "someone"))
        session = upload.status.session
        self.run(upload.append(b"data"))
        self.run(upload.truncate(0))
        assert upload.status == UploadStatus(session, 0)
        with pytest.raises(DigestInvalid):
            self.run(upload.commit(Digest.of(b"data")))
        self.run(upload.commit(Digest.of(b"")))

    def test_a_session_is_resumed(self, store: HostedStore) -> None:
        upload = self.run(store.uploads.start(APP, "sha256", "someone"))
        session = upload.status.session
        self.run(upload.append(b"one "))
        with pytest.raises(BlobUploadBusy):
            self.run(store.uploads.resume(APP, session))
        for _ in range(2):
            self.run(upload.suspend())
        with pytest.raises(BlobUploadUnknown):
            self.run(store.uploads.resume(OTHER, session))
        resumed = self.run(store.uploads.resume(APP, session))
        assert resumed.status.size == 4
        self.run(resumed.append(b"twoXX"))
        self.run(resumed.truncate(7))
        self.run(resumed.commit(Digest.of(b"one two")))
        self.run(resumed.suspend())
        assert self.run(store.blob_size(APP, Digest.of(b"one two"))) == 7

    def test_other_bytes_change_nothing(self, store: HostedStore) -> None:
        upload = self.run(store.uploads.start(APP, "sha256", "someone"))
        self.run(upload.append(b"data"))
        with pytest.raises(DigestInvalid):
            self.run(upload.commit(Digest.of(b"data and more")))
        assert self.run(store.blob_size(APP, Digest.of(b"data"))) is None
        self.run(upload.append(b" and more"))
        self.run(upload.commit(Digest.of(b"data and more")))
        assert self.run(store.blob_size(APP, Digest.of(b"data and more"))) == 13

    def test_cancel(self, store: HostedStore) -> None:
        upload = self.run(store.uploads.start(APP, "sha256", "someone"))
        for _ in range(2):
            self.run(upload.cancel())
        with pytest.raises(BlobUploadUnknown):
            self.run(store.uploads.status(APP, upload.status.session))

    @pytest.mark.parametrize("session", ["x", "../x", "6b1f7a4e-0c2f-4c52-8f9d-3f6d7c1b2a10"])
    def test_unknown_sessions(self, store: HostedStore, session: str) -> None:
        for operation in (store.uploads.resume, store.uploads.status):
            with pytest.raises(BlobUploadUnknown):
                self.run(operation(APP, session))

    # blobs

    def test_a_blob_belongs_to_its_repositories(self, store: HostedStore) -> None:
        digest = self.push_blob(store, b"shared", OTHER)
        assert self.run(store.blob_size(APP, digest)) is None
        assert self.run(store.open_blob(APP, digest)) is None
        self.push_blob(store, b"shared")
        assert self.run(store.unlink_blob(OTHER, digest))
        assert not self.run(store.unlink_blob(OTHER, digest))
        assert self.run(store.blob_size(OTHER, digest)) is None
        assert self.run(store.blob_size(APP, digest)) == 6

    def test_mount(self, store: HostedStore) -> None:
        digest = self.push_blob(store, b"shared", OTHER)
        third = parse_repository("third")
        assert not self.run(store.mount_blob(APP, digest, third))
        assert self.run(store.blob_size(APP, digest)) is None
        assert self.run(store.mount_blob(APP, digest, OTHER))
        assert self.run(store.mount_blob(APP, digest, third))  # it is there already
        assert self.run(store.blob_size(APP, digest)) == 6

    def test_mount_without_a_source(self, store: HostedStore) -> None:
        digest = self.push_blob(store, b"shared", OTHER)
        assert self.run(store.mount_blob(APP, digest, None))
        assert self.run(store.blob_size(APP, digest)) == 6

    # manifests

    def test_a_manifest(self, store: HostedStore) -> None:
        for blob in (b"config", b"layer"):
            self.push_blob(store, blob)
        pushed = make_image(b"config", b"layer")
        self.run(store.commit_manifest(APP, pushed, make_tags("1", "latest")))
        for reference in (pushed.digest, *make_tags("1", "latest")):
            stored = self.run(store.manifest(APP, reference))
            assert stored is not None
            assert (stored.digest, stored.media_type, stored.content) == (pushed.digest, OCI_MANIFEST, pushed.content)
        assert self.run(store.manifest(OTHER, pushed.digest)) is None
        assert self.run(store.manifest(APP, parse_tag("2"))) is None
        assert self.tags(store) == ["1", "latest"]

    def test_missing_references(self, store: HostedStore) -> None:
        self.push_blob(store, b"config")
        self.push_blob(store, b"layer", OTHER)
        manifest = make_image(b"config", b"layer")
        with pytest.raises(ManifestBlobUnknown, match=str(Digest.of(b"layer"))):
            self.run(store.commit_manifest(APP, manifest, make_tags("1")))
        assert self.run(store.manifest(APP, manifest.digest)) is None
        assert self.tags(store) == []

    def test_an_index(self, store: HostedStore) -> None:
        child = self.push_image(store, "child")
        document = {
            "schemaVersion": 2, "mediaType": OCI_INDEX,
            "manifests": [{"mediaType": OCI_MANIFEST, "digest": str(child), "size": 1}],
        }  # fmt: skip
        index = PushedManifest.parse(json.dumps(document).encode(), None, OCI_INDEX)
        with pytest.raises(ManifestBlobUnknown):
            self.run(store.commit_manifest(OTHER, index, []))
        self.run(store.commit_manifest(APP, index, []))
        assert self.run(store.manifest(APP, index.digest)) is not None
        assert self.tags(store) == []

    def test_a_tag_moves(self, store: HostedStore) -> None:
        old, new = self.push_image(store, "old", "1"), self.push_image(store, "new", "1")
        stored = self.run(store.manifest(APP, parse_tag("1")))
        assert stored is not None and stored.digest == new
        assert self.run(store.manifest(APP, old)) is not None

    def test_removing_a_tag_keeps_the_manifest(self, store: HostedStore) -> None:
        digest = self.push_image(store, "x", "1", "2")
        assert self.run(store.remove_tag(APP, parse_tag("1")))
        assert not self.run(store.remove_tag(APP, parse_tag("1")))
        assert self.tags(store) == ["2"]
        assert self.run(store.manifest(APP, digest)) is not None

    def test_removing_a_manifest_removes_its_tags(self, store: HostedStore) -> None:
        digest = self.push_image(store, "x", "1", "2")
        self.push_image(store, "y", "3")
        assert self.run(store.remove_manifest(APP, digest))
        assert not self.run(store.remove_manifest(APP, digest))
        assert self.tags(store) == ["3"]
        assert self.run(store.manifest(APP, digest)) is None
        self.push_image(store, "x", "1")
        assert self.tags(store) == ["1", "3"]

    def push_index(self, store: HostedStore, tag: str, *children: Digest) -> Digest:
        document = {
            "schemaVersion": 2, "mediaType": OCI_INDEX,
            "manifests": [{"mediaType": OCI_MANIFEST, "digest": str(child), "size": 1} for child in children],
        }  # fmt: skip
        index = PushedManifest.parse(json.dumps(document).encode(), None, OCI_INDEX)
        self.run(store.commit_manifest(APP, index, make_tags(tag)))
        return index.digest

    def test_removing_an_image_by_force(self, store: HostedStore) -> None:
        child, other = self.push_image(store, "child", "1", "2"), self.push_image(store, "other")
        index = self.push_index(store, "both", child, other)
        with pytest.raises(ManifestNeeded, match=f"the index {APP}:both needs {child}"):
            self.run(store.remove_manifest(APP, child))
        assert self.tags(store) == ["1", "2", "both"]
        assert self.run(store.remove_images(APP, child)) == RemovedImages(tags=2, manifests=1)
        assert self.run(store.remove_images(APP, child)) == RemovedImages(tags=0, manifests=0)
        assert self.tags(store) == ["both"]
        assert self.run(store.manifest(APP, child)) is None
        assert self.run(store.manifest(APP, index)) is not None
        assert self.run(store.blob_size(APP, Digest.of(b"child"))) == 5, "gc deletes it"

    def test_removing_a_referrer_and_its_subject(self, store: HostedStore) -> None:
        subject = self.push_image(store, "subject", "v1")
        signature = self.push_image(store, "signature", fallback_tag(subject) + ".sig", subject=subject)
        assert self.referrers(store, subject) == [str(signature)]
        assert self.run(store.remove_images(APP, subject)) == RemovedImages(tags=1, manifests=1)
        assert self.tags(store) == [fallback_tag(subject) + ".sig"], "gc deletes it, and what it leads to"
        assert self.run(store.remove_images(APP, signature)) == RemovedImages(tags=1, manifests=1)
        assert self.referrers(store, subject) == []

    def test_removing_a_repository(self, store: HostedStore) -> None:
        child = self.push_image(store, "child", "1", "2")
        self.push_index(store, "both", child)
        self.push_image(store, "signature", fallback_tag(child) + ".sig", subject=child)
        self.push_image(store, "elsewhere", "1", repository=OTHER)
        self.push_image(store, "below", "1", repository=parse_repository(f"{APP}/below"))
        assert self.run(store.remove_images(APP)) == RemovedImages(tags=4, manifests=3)
        assert self.tags(store) == []
        assert self.run(store.manifest(APP, child)) is None
        assert self.run(store.repositories(ALL)).names == [OTHER, f"{APP}/below"]
        assert self.run(store.remove_images(APP)) == RemovedImages(tags=0, manifests=0)
        assert self.push_image(store, "child", "1") == child
        assert self.tags(store) == ["1"]
        assert self.referrers(store, child) == []

    # lists

    @pytest.mark.parametrize("limit", [1, 2, 3, 100])
    def test_pages_of_tags(self, store: HostedStore, limit: int) -> None:
        names = ["_x", "Alpha", "beta", "V1", "v1", "V2", "v2.0", "zeta"]
        self.push_image(store, "x", *reversed(names))
        listed: list[str] = []
        page = NamePage([], True)
        while page.more:
            page = self.run(store.tags(APP, Page(limit, listed[-1] if listed else None)))
            assert len(page.names) <= limit
            listed += page.names
        assert listed == names
        assert self.run(store.tags(APP, Page(100, "C"))).names == ["V1", "v1", "V2", "v2.0", "zeta"]
        assert self.run(store.tags(APP, Page(0, None))) == NamePage([], False)

    @pytest.mark.parametrize("limit", [1, 2, 3, 100])
    def test_pages_of_repositories(self, store: HostedStore, limit: int) -> None:
        names = ["a", "a/b", "a/b/c", "a-b", "b"]
        for name in names:
            self.push_image(store, "x", repository=parse_repository(name))
        self.push_blob(store, b"only a blob", parse_repository("a/a"))
        listed: list[str] = []
        page = NamePage([], True)
        while page.more:
            page = self.run(store.repositories(Page(limit, listed[-1] if listed else None)))
            assert len(page.names) <= limit
            listed += page.names
        assert listed == names
        assert self.run(store.repositories(Page(100, "a/b/0"))).names == ["a/b/c", "a-b", "b"]

    # referrers

    def test_referrers(self, store: HostedStore) -> None:
        subject = Digest.of(b"pushed later")
        signature = self.push_image(store, "signature", subject=subject, kind="application/sig")
        bom = self.push_image(store, "bom", subject=subject, kind="application/bom")
        self.push_image(store, "unrelated")
        assert sorted(self.referrers(store, subject)) == sorted(map(str, (signature, bom)))
        assert self.referrers(store, subject, "application/sig") == [str(signature)]
        assert self.referrers(store, subject, "application/other") == []
        assert self.run(store.referrers(OTHER, subject, None, None)).descriptors == []
        assert self.run(store.remove_manifest(APP, signature))
        assert self.referrers(store, subject) == [str(bom)]
        self.push_image(store, "signature", subject=subject, kind="application/sig")
        assert len(self.referrers(store, subject)) == 2
