from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections import deque
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from dockerproxy.cache.access import GRANT_TTL, STALE_GRANT_TTL, Access, AccessState
from dockerproxy.cache.identity import PUBLIC
from dockerproxy.cache.janitor import GRACE, Janitor, divide_excess
from dockerproxy.oci.names import Digest
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.files import Staging
from dockerproxy.store.ingest import Ingest
from dockerproxy.store.layout import IngestKey, Layout
from dockerproxy.store.links import Links
from dockerproxy.store.records import Records
from tests.support.examples import examples

MANY = 1 << 40
DAY = 86400.0
REPOSITORY, OTHER = "quay.io/org/app", "registry-1.docker.io/library/app"
OCI = "application/vnd.oci.image.manifest.v1+json"


class JanitorHarness:
    """A cache on disk. Its clock is the file system's, plus `offset`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.offset = 0.0
        self.layout = Layout(root)
        self.blobs = Blobs(self.layout, durable=False)
        self.links = Links(self.layout, False, self.now)
        self.restart()
        self.pinned: set[tuple[str, str | None]] = set()
        self.janitor = Janitor(self.layout, Records(root / "records"), self.now, None, self.is_pinned)

    def is_pinned(self, repository: str, name: str | None) -> bool:
        return (repository, name) in self.pinned

    def restart(self) -> None:
        self.records = Records(self.root / "records")
        self.access = Access(self.records, self.now)

    def now(self) -> float:
        return time.time() + self.offset

    def clean(self, max_inodes: int = MANY) -> None:
        for _ in self.janitor.clean(max_inodes):
            pass

    def pull(self, repository: str, tag: str, content: bytes = b"manifest", layer: bytes = b"layer") -> Digest:
        """Leave what a pull leaves."""
        digest, layer_digest = Digest.of(content), Digest.of(layer)
        self.blobs.put(content, digest)
        self.blobs.put(layer, layer_digest)
        self.links.link_manifest(repository, digest, OCI)
        self.links.link_layer(repository, layer_digest)
        self.links.set_tag(repository, tag, digest)
        self.records.put({"any": {"digest": str(digest), "type": OCI, "checked": self.now()}}, "tag", repository, tag)
        self.access.record_grant(repository, PUBLIC, self.now())
        return digest

    def evict_all(self) -> None:
        for digest in list(self.blobs.digests()):
            self.blobs.remove(digest)

    def is_complete(self, repository: str, tag: str, digest: Digest) -> bool:
        links = Links(self.layout, False)
        return all(
            [
                links.has_manifest(repository, digest),
                links.manifest_media_type(repository, digest) == OCI,
                links.tag(repository, tag) == digest,
                self.records.get("tag", repository, tag) is not None,
                self.records.get("grant", repository, PUBLIC) is not None,
            ]
        )

    @property
    def files(self) -> list[str]:
        """The files and directories of links and records."""
        roots = [Path(self.layout.repositories), self.root / "records"]
        paths = [path.relative_to(self.root) for root in roots if root.exists() for path in root.rglob("*")]
        return sorted(str(path) for path in paths if "~staging" not in path.parts)


@pytest.fixture
def harness(tmp_path: Path) -> JanitorHarness:
    return JanitorHarness(tmp_path)


def test_everything_of_an_evicted_image_goes(harness: JanitorHarness) -> None:
    for number in range(50):
        harness.pull(f"{REPOSITORY}{number}", "1.0")
        harness.pull(f"{REPOSITORY}{number}", "1.0", b"the tag has moved")
    harness.evict_all()
    harness.offset += GRACE - 60
    before = harness.files
    harness.clean()
    assert harness.files == before
    harness.offset += 120
    harness.clean()
    harness.clean()  # parents of directories that have become empty
    assert harness.files == []
    assert harness.janitor.inodes == 0
    assert list(Path(harness.layout.staging).iterdir()) == []


def test_an_image_in_the_cache_stays(harness: JanitorHarness) -> None:
    digest = harness.pull(REPOSITORY, "1.0")
    before = harness.files
    harness.offset += 1000 * DAY
    harness.clean()
    assert harness.files == before
    assert harness.is_complete(REPOSITORY, "1.0", digest)


def test_a_pinned_image_stays_however_many_others_there_are(harness: JanitorHarness) -> None:
    """Without its links and records, it would not be served while the registry does not answer."""
    digest = harness.pull(REPOSITORY, "1.0")
    layer = str(Digest.of(b"layer"))
    harness.pinned = {(REPOSITORY, name) for name in (None, "1.0", str(digest), layer)}
    others = [harness.pull(REPOSITORY, f"2.{number}", b"%d" % number) for number in range(20)]
    harness.offset += 10 * DAY
    harness.clean(max_inodes=1)
    assert harness.is_complete(REPOSITORY, "1.0", digest)
    assert harness.links.has_layer(REPOSITORY, Digest.of(b"layer"))
    assert not any(harness.links.has_manifest(REPOSITORY, other) for other in others)


def test_former_manifests_of_a_tag_go(harness: JanitorHarness) -> None:
    old = [harness.pull(REPOSITORY, "latest", b"%d" % number) for number in range(20)]
    new = harness.pull(REPOSITORY, "latest", b"new")
    expected = len(harness.files) - 20 * 5  # a link to the manifest, its type, and an entry in the index
    for digest in old:
        harness.blobs.remove(digest)
    harness.offset += GRACE + 1
    harness.clean()
    assert harness.is_complete(REPOSITORY, "latest", new)
    assert len(harness.files) == expected


def test_a_partial_download_keeps_the_link(harness: JanitorHarness) -> None:
    """A request has found the link, and will not write it again when the blob is complete."""
    harness.pull(REPOSITORY, "1.0")
    harness.evict_all()
    ingest = Ingest.open(harness.layout, IngestKey("quay.io", Digest.of(b"layer")))
    assert ingest is not None
    harness.records.put({"size": 5}, "flight", "quay.io", str(Digest.of(b"layer")))
    harness.offset += GRACE + 1
    harness.clean()
    assert harness.links.has_layer(REPOSITORY, Digest.of(b"layer"))
    assert harness.records.get("flight", "quay.io", str(Digest.of(b"layer"))) is not None
    ingest.discard()
    harness.offset += DAY  # the link has just been used
    harness.clean()
    harness.clean()
    assert harness.files == []


@pytest.mark.parametrize("relink", [False, True])
def test_a_blob_that_arrives_while_its_link_is_removed(
    harness: JanitorHarness, monkeypatch: pytest.MonkeyPatch, relink: bool
) -> None:
    """Either the request finds no link and writes a new one, or the janitor finds the blob and restores the link."""
    digest = harness.pull(REPOSITORY, "1.0")
    harness.evict_all()
    move_aside = Staging.move_aside

    def arrive(staging: Staging, path: str) -> str | None:
        staged_path = move_aside(staging, path)
        if digest.hex in path and "revisions" in path:
            harness.blobs.put(b"manifest", digest)
            if relink:
                harness.links.link_manifest(REPOSITORY, digest, OCI)
        return staged_path

    monkeypatch.setattr(Staging, "move_aside", arrive)
    harness.offset += GRACE + 1
    harness.clean()
    assert harness.is_complete(REPOSITORY, "1.0", digest)
    assert not Links(harness.layout, False).has_layer(REPOSITORY, Digest.of(b"layer"))
    assert list(Path(harness.layout.staging).iterdir()) == []


def test_a_record_written_while_it_is_removed_stays(harness: JanitorHarness) -> None:
    harness.records.put({"at": 1.0}, "client", "quay.io", "own:1")
    [entry] = harness.records.walk("client")
    harness.records.put({"at": 2.0}, "client", "quay.io", "own:1")
    assert not harness.records.discard(entry)
    assert harness.records.get("client", "quay.io", "own:1") == {"at": 2.0}


def test_logins_go_after_a_day(harness: JanitorHarness) -> None:
    for number in range(2000):
        harness.records.put({"at": harness.now()}, "client", "quay.io", f"own:{number}")
    harness.offset += STALE_GRANT_TTL - 60
    harness.records.put({"at": harness.now()}, "client", "quay.io", "own:new")
    path = next(entry.path for entry in harness.records.walk("client") if "own:new" in entry.key)
    os.utime(path, (harness.now(), harness.now()))
    harness.clean()
    assert len(harness.files) == 2003
    harness.offset += 120
    harness.clean()
    assert [entry.key for entry in harness.records.walk("client")] == [("client", "quay.io", "own:new")]


def test_grants_of_clients_go_after_a_day_and_shared_ones_stay(harness: JanitorHarness) -> None:
    harness.pull(REPOSITORY, "1.0")
    for number in range(300):
        harness.access.record_grant(REPOSITORY, f"own:{number}", harness.now())
    harness.access.record_grant(REPOSITORY, "login:1", harness.now())
    harness.offset += STALE_GRANT_TTL + 60
    harness.clean()
    assert sorted(entry.key[2] for entry in harness.records.walk("grant")) == ["login:1", PUBLIC]


def test_a_denial_stays_as_long_as_the_grant(harness: JanitorHarness) -> None:
    harness.pull(REPOSITORY, "1.0")
    harness.access.record_denial(REPOSITORY, PUBLIC)
    harness.offset += 100 * DAY
    for max_inodes in (MANY, MANY):
        harness.clean(max_inodes)
        harness.restart()
        assert len(list(harness.records.walk("denial"))) == 1
        assert harness.access.state(REPOSITORY, PUBLIC, public=True) is AccessState.UNKNOWN
    harness.clean(0)
    assert list(harness.records.walk("grant")) == []
    harness.clean(0)
    assert list(harness.records.walk("denial")) == []


def test_records_of_signatures_go_with_their_image(harness: JanitorHarness) -> None:
    digest = harness.pull(REPOSITORY, "1.0")
    for kept in (True, False):
        for subject in (str(digest), f"sha256:{'0' * 64}", "no digest"):
            harness.records.put({"public": True}, "absence", REPOSITORY, subject.replace(":", "-") + ".sig")
            harness.records.put({"public": True, "index": ""}, "referrers", REPOSITORY, subject)
        harness.offset += 100 * DAY
        harness.clean()
        assert [entry.key[2] for entry in harness.records.walk("referrers")] == [str(digest)] * kept
        assert len(list(harness.records.walk("absence"))) == kept
        harness.evict_all()
        harness.offset += GRACE + 60
        harness.clean()


def test_challenges_stay_and_unknown_records_go_after_a_month(harness: JanitorHarness) -> None:
    harness.records.put({"fields": []}, "challenge", "https://quay.io")
    harness.records.put({PUBLIC: 1.0}, "access", REPOSITORY)  # of an earlier version
    harness.offset += 29 * DAY
    harness.clean()
    assert harness.records.get("access", REPOSITORY) is not None
    harness.offset += 2 * DAY
    harness.clean(0)
    assert harness.records.kinds() == ["challenge"]


@pytest.mark.parametrize("name", ["own:" + "x" * 500, "a/b", "..", "~", "ä\udcff"])
def test_keys_are_read_from_the_names_of_files(harness: JanitorHarness, name: str) -> None:
    for key in (("grant", name, "own:1"), ("grant", REPOSITORY, name)):
        harness.records.put({"at": 1.0}, *key)
        [entry] = harness.records.walk("grant")
        assert entry.key == key
        assert harness.records.read(entry) == {"at": 1.0}
        assert harness.records.discard(entry)


def test_torn_records_go(harness: JanitorHarness) -> None:
    harness.records.put({"at": 1.0}, "tag", REPOSITORY, "x" * 128)
    harness.records.put({"at": 1.0}, "tag", REPOSITORY, "1.0")
    for path in (harness.root / "records").rglob("*~.json"):
        path.write_bytes(b'{"key":')
    harness.offset += 31 * DAY
    harness.clean()
    harness.clean()
    assert harness.files == []


# too many


def test_count_is_close_to_the_number_of_files(harness: JanitorHarness) -> None:
    for number in range(40):
        for tag in range(number % 4 + 1):
            harness.pull(f"{REPOSITORY}{number}", f"{tag}", b"%d" % tag)
            harness.access.record_grant(f"{REPOSITORY}{number}", f"own:{tag}", harness.now())
    harness.clean()
    assert len(harness.files) <= harness.janitor.inodes <= len(harness.files) * 1.2


def test_the_oldest_records_go_first(harness: JanitorHarness) -> None:
    for number in range(500):
        harness.records.put({"at": 1.0}, "client", "quay.io", f"own:{number}")
    for entry in harness.records.walk("client"):
        used = harness.now() - 100 - int(entry.key[2].removeprefix("own:"))
        os.utime(entry.path, (used, used))
    harness.clean(250)
    left = [int(entry.key[2].removeprefix("own:")) for entry in harness.records.walk("client")]
    assert 200 <= len(left) <= 250
    assert max(left) < 300  # of 500; ages are known to 9 %


@pytest.mark.slow
@pytest.mark.parametrize("load", ["repositories", "tags", "logins", "identities"])
def test_any_load_ends_with_few_files(harness: JanitorHarness, load: str) -> None:
    """The manifest is always the same one, and its blob stays in the cache."""
    image = harness.pull(OTHER, "in-use", b"in use")
    harness.offset += DAY
    for number in range(300):
        if load == "repositories":
            harness.pull(f"evil.example/{number}", "latest")
        elif load == "tags":
            harness.pull("evil.example/x", f"{number}")
        elif load == "logins":
            harness.records.put({"at": harness.now()}, "client", "evil.example", f"own:{number}")
        else:
            harness.access.record_grant("evil.example/x", f"own:{number}", harness.now())
    for path in harness.root.rglob("*"):
        os.utime(path, (harness.now(), harness.now()))
    harness.clean(100)
    assert harness.janitor.inodes > 300  # all are younger than a minute
    harness.offset += 120
    harness.links.has_manifest(OTHER, image)
    harness.clean(100)
    harness.clean(100)
    assert len(harness.files) <= 130
    assert harness.janitor.inodes <= 130


def test_links_of_the_registry_with_most_go(harness: JanitorHarness) -> None:
    """A registry that answers everything does not displace what is known about another, although that is older."""
    digest = harness.pull(REPOSITORY, "latest")
    harness.records.put({"at": 1.0}, "client", "quay.io", "own:1")
    harness.offset = 120
    for number in range(60):
        harness.pull(f"evil.test/{number}", "latest")
    harness.records.put({"at": 1.0}, "client", "evil.test", "own:1")
    harness.offset = 240
    for _ in range(3):  # directories that have become empty go in the next walk
        harness.clean(400)
    assert 200 < harness.janitor.inodes <= 400
    assert harness.is_complete(REPOSITORY, "latest", digest)
    assert harness.records.get("client", "quay.io", "own:1") is not None


def test_young_links_go_if_they_have_to(harness: JanitorHarness) -> None:
    for number in range(30):
        harness.pull(f"evil.test/{number}", "latest")
    harness.clean(100)
    assert harness.janitor.inodes > 100
    for _ in range(3):
        deque(harness.janitor.clean(100, min_age=0), maxlen=0)
    assert harness.janitor.inodes <= 100


@given(counts=st.dictionaries(st.text(), st.integers(1, 1000), max_size=8), excess=st.integers(0, 5000))
def test_owners_of_most_lose_first(counts: dict[str, int], excess: int) -> None:
    losses = divide_excess(counts, excess)
    assert sum(losses.values()) == min(excess, sum(counts.values()))
    left = {owner: count - losses.get(owner, 0) for owner, count in counts.items()}
    assert all(count >= 0 for count in left.values())
    assert all(left[owner] >= max(left.values()) - 1 for owner in losses)


def test_a_used_link_outlives_others(harness: JanitorHarness) -> None:
    digests = [harness.pull(REPOSITORY, f"{number}", b"%d" % number) for number in range(100)]
    harness.offset += 2 * DAY
    assert harness.links.has_manifest(REPOSITORY, digests[50])
    harness.offset += 120
    harness.clean(300)
    assert harness.links.has_manifest(REPOSITORY, digests[50])
    assert harness.links.tag(REPOSITORY, "50") == digests[50]
    assert sum(Links(harness.layout, False).has_manifest(REPOSITORY, digest) for digest in digests) < 50


def test_a_clock_set_back_keeps_no_files(harness: JanitorHarness) -> None:
    for number in range(100):
        harness.records.put({"at": harness.now()}, "client", "quay.io", f"own:{number}")
    harness.offset -= 1000 * DAY
    harness.clean()
    harness.clean()
    assert harness.files == []


# a model

REPOSITORIES = st.sampled_from([REPOSITORY, OTHER])
CONTENTS = st.sampled_from([b"one", b"two", b"three"])
IDENTITIES = st.sampled_from([PUBLIC, "login:1", "own:1"])


class JanitorMachine(RuleBasedStateMachine):
    """Links and records have the times of their last writes in a model, which says what has to stay."""

    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.harness = JanitorHarness(self.folder)
        self.changes: dict[Path, int] = {}
        self.layers: dict[tuple[str, bytes], float] = {}  # the time of the last use
        self.manifests: dict[tuple[str, bytes], float] = {}
        self.created: dict[tuple[str, str, bytes], float] = {}
        self.tags: dict[tuple[str, bytes], float] = {}
        self.grants: dict[tuple[str, str], float] = {}
        self.denied: set[tuple[str, str]] = set()

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def settle(self) -> None:
        """Give the files that were just written the time of the harness."""
        for path in self.folder.rglob("*"):
            if self.changes.get(path) != path.stat().st_ctime_ns:
                os.utime(path, (self.harness.now(), self.harness.now()))
            self.changes[path] = path.stat().st_ctime_ns

    def is_present(self, content: bytes) -> bool:
        return self.harness.blobs.exists(Digest.of(content))

    @rule(content=CONTENTS, repository=REPOSITORIES)
    def fetch_layer(self, content: bytes, repository: str) -> None:
        self.harness.blobs.put(content, Digest.of(content))
        self.harness.links.link_layer(repository, Digest.of(content))
        self.harness.links.has_layer(repository, Digest.of(content))
        self.layers[repository, content] = self.harness.now()
        self.created.setdefault(("l", repository, content), self.harness.now())
        self.settle()

    @rule(content=CONTENTS, repository=REPOSITORIES)
    def fetch_manifest(self, content: bytes, repository: str) -> None:
        digest = Digest.of(content)
        self.harness.blobs.put(content, digest)
        self.harness.links.link_manifest(repository, digest, OCI)
        self.harness.links.has_manifest(repository, digest)
        self.harness.links.set_tag(repository, content.decode(), digest)
        record = {"any": {"digest": str(digest), "type": OCI, "checked": self.harness.now()}}
        self.harness.records.put(record, "tag", repository, content.decode())
        self.manifests[repository, content] = self.harness.now()
        self.created.setdefault(("m", repository, content), self.harness.now())
        self.tags[repository, content] = self.harness.now()
        self.settle()

    @rule(repository=REPOSITORIES, identity=IDENTITIES)
    def grant(self, repository: str, identity: str) -> None:
        self.harness.restart()
        self.harness.access.record_grant(repository, identity, self.harness.now())
        self.grants[repository, identity] = self.harness.now()
        self.denied.discard((repository, identity))
        self.settle()

    @precondition(lambda self: self.grants)
    @rule(data=st.data())
    def deny(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.grants)))
        self.harness.access.record_denial(*key)
        self.denied.add(key)
        self.settle()

    @rule(content=CONTENTS)
    def evict(self, content: bytes) -> None:
        self.harness.blobs.remove(Digest.of(content))

    @rule(seconds=st.sampled_from([10.0, GRACE - 30, GRACE + 30, STALE_GRANT_TTL + 30]))
    def advance(self, seconds: float) -> None:
        self.harness.offset += seconds

    @rule()
    def clean(self) -> None:
        self.harness.clean()
        now, links = self.harness.now(), Links(self.harness.layout, False)
        present = {}
        for kind, table, has in (("l", self.layers, links.has_layer), ("m", self.manifests, links.has_manifest)):
            for (repository, content), used in list(table.items()):
                needed = self.is_present(content)
                exists = has(repository, Digest.of(content))
                created = self.created.get((kind, repository, content), 0.0)
                assert exists or not (needed or now - created < GRACE - 20), (kind, repository, content)
                assert not exists or needed or now - used < GRACE, (kind, repository, content)
                if not exists:
                    del table[repository, content]
                    self.created.pop((kind, repository, content), None)
                present[repository] = present.get(repository, False) or exists
        for (repository, content), written in list(self.tags.items()):
            record = self.harness.records.get("tag", repository, content.decode())
            has_manifest = (repository, content) in self.manifests
            if (has_manifest and self.is_present(content)) or now - written < GRACE - 20:
                assert record is not None
            if has_manifest:
                assert links.tag(repository, content.decode()) == Digest.of(content)
            if record is None:
                del self.tags[repository, content]
        self.harness.restart()
        for (repository, identity), granted_at in list(self.grants.items()):
            state = self.harness.access.state(repository, identity, public=True)
            saved = self.harness.records.get("grant", repository, identity) is not None
            expires = identity.startswith("own:") and now - granted_at > STALE_GRANT_TTL - 20
            if (present.get(repository) and not expires) or now - granted_at < GRACE - 20:
                assert saved
            if (repository, identity) in self.denied and (repository, PUBLIC) not in self.grants:
                assert state is AccessState.UNKNOWN
            if saved and (repository, identity) not in self.denied and now - granted_at < GRANT_TTL - 20:
                assert state is AccessState.GRANTED
            if not saved:
                del self.grants[repository, identity]
                self.denied.discard((repository, identity))


TestJanitorMachine = JanitorMachine.TestCase
TestJanitorMachine.settings = settings(max_examples=examples(40), stateful_step_count=30, deadline=None)
