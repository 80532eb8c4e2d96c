"""Pulls of images for the administrator from registries that lie, and the limits of registries."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from attrs import asdict
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from dockerproxy.cache.identity import PUBLIC
from dockerproxy.cache.image_budget import PullBudget
from dockerproxy.cache.image_pull import ImagePull, ImagePuller, PullRequest
from dockerproxy.cache.pins import MAX_CONTENTS, repository_key
from dockerproxy.cache.pull_counts import PullCounts
from dockerproxy.cache.rate_limits import LIMIT, RateLimit, RateLimits
from dockerproxy.errors import SizeInvalid, UpstreamFailing
from dockerproxy.oci.content import ManifestResponse
from dockerproxy.oci.image_names import ImageName
from dockerproxy.oci.manifests import OCI_INDEX, OCI_MANIFEST
from dockerproxy.oci.names import Digest, Reference, Registry
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.layout import Layout
from dockerproxy.store.links import Links
from dockerproxy.store.records import Records
from tests.cache.support.reactor import ManualReactor

NOW = 1_800_000_000.0
QUAY = Registry.parse("quay.io")
IMAGE = ImageName.parse("quay.io/hostile/app:v1")


class HostileRegistry:
    """Manifests by digest, and what refers to each. Each request is counted. A GET stores it, as the cache does."""

    def __init__(self, layout: Layout) -> None:
        self.blobs, self.links = Blobs(layout, durable=False), Links(layout, durable=False)
        self.manifests: dict[str, tuple[str, bytes]] = {}
        self.referrers_of: dict[str, list[Digest]] = {}
        self.requests = Counter[str]()
        self.refusals = 0  # of the next requests

    def put(self, document: dict[str, Any], media_type: str, tag: str = "") -> Digest:
        content = json.dumps({"schemaVersion": 2, "mediaType": media_type, **document}).encode()
        digest = Digest("sha256", hashlib.sha256(content).hexdigest())
        for name in filter(None, (str(digest), tag)):
            self.manifests[name] = media_type, content
        return digest

    def put_index(self, children: Iterable[Digest], media_type: str, tag: str = "", name: str = "") -> Digest:
        entries = [{"mediaType": media_type, "digest": str(child), "size": 10} for child in children]
        return self.put({"manifests": entries, "annotations": {"name": name}}, OCI_INDEX, tag)

    def put_image(self, name: str, layers: int = 0, tag: str = "") -> Digest:
        def blob(text: str) -> dict[str, Any]:
            digest = hashlib.sha256(f"{name} {text}".encode()).hexdigest()
            return {"mediaType": "application/octet-stream", "digest": f"sha256:{digest}", "size": 1}

        return self.put({"config": blob("c"), "layers": [blob(str(n)) for n in range(layers)]}, OCI_MANIFEST, tag)

    # the view of a registry

    async def manifest(self, name: str, reference: Reference, accept: object, *, head: bool) -> ManifestResponse:
        self.requests[str(reference)] += 1
        if self.refusals:
            self.refusals -= 1
            raise UpstreamFailing("quay.io answered 429", 429, headers=[("Retry-After", "5")])
        media_type, content = self.manifests[str(reference)]
        digest = Digest("sha256", hashlib.sha256(content).hexdigest())
        if not head:
            self.blobs.put(content, digest)
            self.links.link_manifest(repository_key(IMAGE), digest, media_type)
        return ManifestResponse(digest, media_type, len(content), content, "MISS")

    async def referrers(self, name: str, subject: Digest, query: object) -> Any:
        entries = [
            {"mediaType": OCI_MANIFEST, "digest": str(one), "size": 1}
            for one in self.referrers_of.get(str(subject), ())
        ]
        content = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}).encode()
        return SimpleNamespace(content=content)

    def identity_at(self, name: str) -> str:
        return PUBLIC


class Harness:
    def __init__(self, folder: Path) -> None:
        layout = Layout(folder)
        self.reactor, self.registry = ManualReactor(), HostileRegistry(layout)
        self.records = Records(folder / "records")
        self.limits = RateLimits(self.records, self.clock)
        self.budget = PullBudget(self.reactor, self.limits, PullCounts(self.clock), self.clock, 20)
        cache: Any = SimpleNamespace(registry=lambda *_: self.registry, parser=self)
        self.puller = ImagePuller(self.reactor, cache, layout, {QUAY.host: QUAY}, self.budget)

    def clock(self) -> float:
        return NOW + self.reactor.seconds()

    async def parse(self, function: Callable[..., Any], *arguments: Any, client: str) -> Any:
        return function(*arguments)

    def run(self, work: Any, seconds: float = 0) -> Any:
        deferred = Deferred.fromCoroutine(work)
        self.reactor.run_due_calls()
        for _ in range(int(seconds)):
            self.reactor.advance(1)
        assert deferred.called, "it is still waiting"
        result: Any = deferred.result
        if isinstance(result, Failure):
            deferred.addErrback(lambda failure: None)
            result.raiseException()
        return result

    def pull(self, *platforms: str, referrers: bool = False) -> ImagePull:
        """Fetch the manifests of the image."""
        pull = self.puller.prepare(PullRequest(IMAGE, platforms, referrers))
        self.run(self.puller.resolve(pull))
        self.run(self.puller.fetch_manifests(pull))
        return pull


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    return Harness(tmp_path)


def test_indexes_that_list_the_same_ones_are_read_once(harness: Harness) -> None:
    """Ten in each of four levels are ten thousand ways to the same manifests."""
    level = [harness.registry.put_image(str(number)) for number in range(10)]
    media_type = OCI_MANIFEST
    for depth in range(3):
        level = [harness.registry.put_index(level, media_type, name=f"{depth} {number}") for number in range(10)]
        media_type = OCI_INDEX
    harness.registry.put_index(level, media_type, "v1")
    pull = harness.pull("all")
    assert len(pull.contents) == 1 + 4 * 10 + 10
    assert max(harness.registry.requests.values()) <= 2


def test_an_image_of_too_many_parts(harness: Harness) -> None:
    harness.registry.put_image("large", MAX_CONTENTS - 2, "v1")
    assert len(harness.pull().contents) == MAX_CONTENTS
    harness.registry.put_image("too large", MAX_CONTENTS - 1, "v1")
    with pytest.raises(SizeInvalid, match="consists of more than 5000 manifests and blobs"):
        harness.pull()


def test_too_many_referrers_leave_the_image_as_it_is(harness: Harness) -> None:
    """A pin may have as many parts as a pull, and would fail because of one more."""
    subject = harness.registry.put_image("app", 2000, "v1")
    harness.registry.referrers_of[str(subject)] = [harness.registry.put_image(f"r{n}", 100) for n in range(100)]
    for suffix in (".sig", ".att", ".sbom"):
        harness.registry.put_image(suffix, 10, f"sha256-{subject.hex}{suffix}")
    pull = harness.pull(referrers=True)
    pull.present.update(pull.contents)
    harness.run(harness.puller.fetch_referrers(pull))
    assert len(pull.contents) == MAX_CONTENTS
    assert "were not fetched: quay.io/hostile/app:v1 consists of more than 5000 manifests and blobs" in pull.message


def test_a_refusal_of_a_clock_that_was_wrong_holds_up_no_pull(harness: Harness) -> None:
    years = RateLimit(100, 21600, 90, refused_until=NOW + 20 * 365 * 86400, since=NOW + 20 * 365 * 86400)
    harness.records.put(asdict(years), LIMIT, "quay.io")
    harness.registry.put_image("app", 1, "v1")
    assert harness.pull().digest is not None


def test_a_registry_that_refuses_even_head_is_asked_again_later(harness: Harness) -> None:
    digest = harness.registry.put_image("app", 1, "v1")
    harness.registry.refusals = 4
    pull = harness.puller.prepare(PullRequest(IMAGE))
    resolving = Deferred.fromCoroutine(harness.puller.resolve_in_turn(pull))
    harness.reactor.run_due_calls()
    row = harness.puller.row(pull)
    assert (row["state"], row["until"]) == ("waiting", NOW + 5)
    assert row["message"] == "quay.io refuses pulls now; this goes on by 08:00:05 UTC"
    for _ in range(30):
        harness.reactor.advance(1)
    assert resolving.called and pull.digest == digest
    assert harness.puller.row(pull)["until"] is None
