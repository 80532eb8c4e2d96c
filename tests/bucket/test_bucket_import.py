"""Import of a registry's directory into a bucket."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from twisted.internet.defer import Deferred

from dockerproxy.bucket import keys, s3
from dockerproxy.bucket.bucket_import import BucketTarget, ReactorWrites
from dockerproxy.bucket.manifest_writer import ManifestWriter
from dockerproxy.errors import StoreUnavailable
from dockerproxy.oci.names import Digest
from dockerproxy.store import importer
from dockerproxy.store.hosted_tree import HostedTree
from dockerproxy.store.importer import ImportResult, Skipped, find_source_layout, import_registry, import_tree
from dockerproxy.store.layout import Layout
from dockerproxy.store.progress import Progress, Stopped, no_lock
from tests.bucket.support.trees import blocking, bucket_view, disk_view, fail_after, make_store, run
from tests.bucket.test_bucket_check import check
from tests.bucket.test_bucket_tree import damages, pushes, show, twins
from tests.cache.support.reactor import ManualReactor
from tests.store.support.images import BOTH, ONE, TWO, image, put_image
from tests.support.examples import examples
from tests.support.fake_store import FakeStore, refusal

SIGNATURE = image(b"sig", b"signature", subject=BOTH)
REPOSITORY = "team/app"


class WritesAtOnce:
    """Writes one after the other."""

    def __init__(self, fake: FakeStore) -> None:
        self._fake = fake
        self._error: Exception | None = None

    def submit(self, write: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self.flush()
        try:
            run(self._fake, write())
        except Exception as error:
            self._error = error

    def flush(self) -> None:
        if self._error is not None:
            raise self._error


def import_into(
    fake: FakeStore, directory: Path, staging: Path, *, force: bool = False, **progress: Any
) -> tuple[ImportResult, list[Skipped]]:
    skipped: list[Skipped] = []
    writer = ManifestWriter.of(fake.clock, fake.bucket(), lambda: fake.clock.seconds())
    target = BucketTarget.open(blocking(fake).wait, None, WritesAtOnce(fake), writer, str(staging))
    settings = Progress(emit=skipped.append, **progress)
    result = import_tree(find_source_layout(directory), target, force=force, progress=settings, lock=no_lock)
    assert os.listdir(staging) == []
    return result, skipped


@pytest.fixture
def source(tmp_path: Path) -> HostedTree:
    """A directory as `registry:2` writes it, without media types and subjects."""
    tree = HostedTree.from_layout(Layout(tmp_path / "source"))
    put_image(tree, REPOSITORY, BOTH, "v1", "latest")
    put_image(tree, REPOSITORY, SIGNATURE)
    put_image(tree, "two", ONE, "v1")
    for name in ("media-type", "subject"):
        for path in tree.layout.root.rglob(name):
            path.unlink()
    for path in tree.layout.root.rglob("_referrers"):
        shutil.rmtree(path)
    return tree


@pytest.fixture
def fake() -> FakeStore:
    return make_store()


def test_everything_in_repositories_is_there(source: HostedTree, fake: FakeStore, tmp_path: Path) -> None:
    source.blobs.put(b"garbage", Digest.of(b"garbage"))
    result, skipped = import_into(fake, source.layout.root, tmp_path / "staging")
    assert skipped == []
    contents = {entry.key: entry.size for entry in source.blobs.walk() if entry.key != Digest.of(b"garbage")}
    assert result == ImportResult(
        repositories=2, copied=len(contents), bytes=sum(contents.values()), manifests=5, tags=3
    )
    assert check(fake)[1] == []
    # As if it had been pushed: clients find the referrers, and the catalog has the names.
    assert f"site/{keys.referrer_key(REPOSITORY, BOTH.digest, SIGNATURE.digest)}" in fake.objects
    assert {f"site/{keys.catalog_key(name)}" for name in (REPOSITORY, "two")} <= fake.objects.keys()


def test_again_is_quick_and_changes_nothing(source: HostedTree, fake: FakeStore, tmp_path: Path) -> None:
    first, _ = import_into(fake, source.layout.root, tmp_path / "staging")
    before, sent = dict(fake.objects), len(fake.requests)
    result, skipped = import_into(fake, source.layout.root, tmp_path / "staging")
    assert (result, skipped) == (ImportResult(repositories=2, present=first.copied), [])
    assert fake.objects == before
    assert {request.method for request in fake.requests[sent:]} == {"HEAD", "GET"}
    # A HEAD for each content, a listing for each repository, a GET for each tag.
    assert len(fake.requests) - sent == first.copied + 2 + 3


@settings(max_examples=examples(25), deadline=None)
@given(pushes, damages)
def test_it_takes_what_a_directory_takes(pushed: Any, damaged: Any) -> None:
    with twins(pushed, damaged) as (root, _):
        fake = make_store()
        copy = root / "copy"
        expected_skipped: list[Skipped] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(importer.os, "sync", lambda: None)  # of all disks
            expected = import_registry(Layout(copy), root, progress=Progress(emit=expected_skipped.append))
        result, skipped = import_into(fake, root, root / "staging")
        assert sorted(map(str, skipped)) == sorted(map(str, expected_skipped))
        assert result.repositories == expected.repositories
        assert (result.copied, result.bytes) == (expected.hardlinked + expected.copied, expected.bytes)
        assert (result.manifests, result.tags, result.untaken) == (
            expected.manifests, expected.tags, expected.untaken
        )  # fmt: skip


def test_tags_of_others_stay_without_force(source: HostedTree, fake: FakeStore, tmp_path: Path) -> None:
    import_into(fake, source.layout.root, tmp_path / "staging")
    put_image(source, REPOSITORY, TWO, "v1")
    result, skipped = import_into(fake, source.layout.root, tmp_path / "staging")
    message = f"{REPOSITORY}:v1 points to {BOTH.digest} here, but to {TWO.digest} in the import"
    assert skipped == [Skipped("conflict", message)]
    assert (result.conflicts, result.tags) == (1, 0)
    assert fake.objects[f"site/{keys.tag_key(REPOSITORY, 'v1')}"] == str(BOTH.digest).encode()
    result, skipped = import_into(fake, source.layout.root, tmp_path / "staging", force=True)
    assert (result.conflicts, result.tags, skipped) == (0, 1, [])
    assert fake.objects[f"site/{keys.tag_key(REPOSITORY, 'v1')}"] == str(TWO.digest).encode()


def test_a_content_that_is_there_is_never_overwritten(source: HostedTree, fake: FakeStore, tmp_path: Path) -> None:
    base = Digest.of(b"base")
    fake.store(f"site/{keys.blob_key(base)}", b"base")
    fake.written[f"site/{keys.blob_key(base)}"] = 1.0
    Path(source.layout.blob(base)).write_bytes(b"bass")
    assert import_into(fake, source.layout.root, tmp_path / "staging")[1] == []
    assert fake.written[f"site/{keys.blob_key(base)}"] == 1.0
    assert fake.objects[f"site/{keys.blob_key(base)}"] == b"base"


# the files of strangers


def make_symlink(path: Path) -> None:
    path.symlink_to("/etc/passwd")


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda path: path.write_bytes(b"bass"), "damaged"),
        (lambda path: path.write_bytes(b""), "damaged"),
        (make_symlink, "unreadable"),
        (os.mkfifo, "unreadable"),
        (Path.mkdir, "unreadable"),
        (lambda path: os.truncate(_touch(path), 1 << 30), "damaged"),
    ],
    ids=["other content", "empty", "symbolic link", "FIFO", "directory", "sparse"],
)
def test_a_file_that_is_no_content_is_not_sent(
    source: HostedTree,
    fake: FakeStore,
    tmp_path: Path,
    make: Callable[[Path], object],
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = Path(source.layout.blob(Digest.of(b"base")))
    path.unlink()
    make(path)
    if path.is_file() and path.stat().st_size == 1 << 30:
        path.chmod(0o666)
        monkeypatch.setattr(importer, "_read_source", _no_read)
        monkeypatch.setattr(importer, "write_all", _no_write)  # its zeros would fill the disk
    result, skipped = import_into(fake, source.layout.root, tmp_path / "staging")
    assert [item.kind for item in skipped] == [kind, "missing", "missing"]
    assert result.untaken == 3
    assert f"site/{keys.blob_key(Digest.of(b'base'))}" not in fake.objects
    assert b"bass" not in fake.objects.values()


def _touch(path: Path) -> Path:
    path.touch()
    return path


def _no_read(fd: int, size: int, offset: int) -> bytes:
    return os.pread(fd, size, offset) if os.fstat(fd).st_size < 1 << 30 else b""


def _no_write(fd: int, pieces: Any, offset: int) -> None:
    raise AssertionError("it is copied")


def test_a_file_that_others_may_write_is_copied_before_it_is_sent(
    source: HostedTree, fake: FakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its owner changes it after it was verified."""
    path = Path(source.layout.blob(Digest.of(b"base")))
    path.chmod(0o666)
    real = importer.SourceBlob.verify_and_copy

    def change_it(blob: Any, *arguments: Any) -> bool:
        is_right = real(blob, *arguments)
        if blob.digest == Digest.of(b"base"):
            path.write_bytes(b"evil")
        return is_right

    monkeypatch.setattr(importer.SourceBlob, "verify_and_copy", change_it)
    assert import_into(fake, source.layout.root, tmp_path / "staging")[1] == []
    assert fake.objects[f"site/{keys.blob_key(Digest.of(b'base'))}"] == b"base"
    assert path.read_bytes() == b"evil"


def test_large_contents_are_sent_in_parts(fake: FakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "PART_SIZE", 1000)
    monkeypatch.setattr(s3, "_LARGE_BLOB", 5000)
    monkeypatch.setattr(s3, "_LARGE_PART_SIZE", 4000)
    monkeypatch.setattr(s3, "_MIB", 1)
    source = HostedTree.from_layout(Layout(tmp_path / "source"))
    large, larger = image(b"c1", b"l" * 2500), image(b"c2", b"m" * 9000)
    for manifest in (large, larger):
        put_image(source, "big", manifest)
    assert import_into(fake, source.layout.root, tmp_path / "staging")[1] == []
    parts = [len(request.body) for request in fake.requests if "partNumber" in request.query]
    assert sorted(parts) == [500, 1000, 1000, 1000, 4000, 4000]
    assert check(fake)[1] == []


# bad days


@pytest.mark.slow
def test_links_come_last(source: HostedTree, fake: FakeStore, tmp_path: Path) -> None:
    """Whenever it ends, no tag leads to anything that lacks something. The next import completes it."""
    complete = make_store()
    import_into(complete, source.layout.root, tmp_path / "staging")
    writes = [number for number, request in enumerate(complete.requests) if request.method == "PUT"]
    for last in writes[:: max(1, len(writes) // 25)]:
        fake = make_store()
        fail_after(fake, last, lambda request: refusal(503, "SlowDown"))
        with pytest.raises(StoreUnavailable):
            import_into(fake, source.layout.root, tmp_path / "staging")
        fake.faults.clear()
        lacking = {finding.repository for finding in check(fake)[1]}  # an index may come before its images
        assert not [key for key in fake.objects for name in lacking if f"{name}/_manifests/tags" in key]
        import_into(fake, source.layout.root, tmp_path / "staging")
        theirs = {key: content for key, content in fake.objects.items() if "taken-over" not in key}
        assert theirs == {key: content for key, content in complete.objects.items() if "taken-over" not in key}


def test_a_stopped_import_can_be_repeated(source: HostedTree, fake: FakeStore, tmp_path: Path) -> None:
    reports: list[Any] = []
    import_into(make_store(), source.layout.root, tmp_path / "staging", report=lambda *state: reports.append(state))
    stops = 0
    for stop_after in range(0, len(reports), 7):
        calls = iter(range(stop_after))

        def stop(*state: Any, calls: Iterator[int] = calls) -> None:
            if next(calls, None) is None:
                raise Stopped

        # A later one has less to do, and so may come to its end. How much, depends on the order of the directories.
        try:
            import_into(fake, source.layout.root, tmp_path / "staging", report=stop)
        except Stopped:
            stops += 1
    assert stops >= 3
    assert import_into(fake, source.layout.root, tmp_path / "staging")[1] == []
    assert next(show(bucket_view(fake), disk_records(tmp_path)))["tags"] == 2


def disk_records(tmp_path: Path) -> Any:
    from dockerproxy.store.records import Records

    return Records(tmp_path / "records")


def test_an_image_that_lacks_a_layer_is_taken_as_it_is(source: HostedTree, fake: FakeStore, tmp_path: Path) -> None:
    os.unlink(source.layout.blob(Digest.of(b"layer1")))
    result, skipped = import_into(fake, source.layout.root, tmp_path / "staging")
    assert [item.kind for item in skipped] == ["missing", "missing"]
    assert (result.manifests, result.tags) == (5, 3)
    assert {finding.kind for finding in check(fake)[1]} == {"missing"}


# writes at the same time


class ThreadedReactor(ManualReactor):
    """Runs what threads hand over in a thread of its own, as a reactor does."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[Callable[[], object]] = []
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def callFromThread(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        with self._wake:
            self._calls.append(lambda: function(*args, **kwargs))
            self._wake.notify()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._calls)
                call = self._calls.pop(0)
            call()


def test_writes_are_bounded_and_their_errors_are_raised() -> None:
    reactor = ThreadedReactor()
    writes = ReactorWrites(reactor, at_once=3)
    waiting: list[Deferred[None]] = []

    async def write() -> None:
        done: Deferred[None] = Deferred()
        waiting.append(done)
        await done

    for _ in range(3):
        writes.submit(write)
    fourth = threading.Thread(target=writes.submit, args=(write,))
    fourth.start()
    fourth.join(0.05)
    assert fourth.is_alive(), "there is no room"
    reactor.callFromThread(lambda: waiting[0].callback(None))
    fourth.join(10)
    assert not fourth.is_alive()
    ended = threading.Event()
    flush = threading.Thread(target=lambda: (writes.flush(), ended.set()))
    flush.start()
    assert not ended.wait(0.05)
    reactor.callFromThread(lambda: [done.callback(None) for done in waiting[1:]])
    assert ended.wait(10)

    async def fail() -> None:
        raise StoreUnavailable("the store is down")

    writes.submit(fail)
    with pytest.raises(StoreUnavailable):
        writes.flush()
    with pytest.raises(StoreUnavailable):
        writes.submit(write)


def test_disk_and_bucket_are_the_same_registry(source: HostedTree, fake: FakeStore, tmp_path: Path) -> None:
    import_into(fake, source.layout.root, tmp_path / "staging")
    records = disk_records(tmp_path)

    def comparable(view: Any) -> list[Any]:
        shown = []
        for entry in show(view, records):
            for row in entry if isinstance(entry, list) else [entry]:
                shown.append({**row, "last_used": None} if isinstance(row, dict) else row)
        return [row for row in shown if isinstance(row, dict) and "needed_by" in row]

    assert comparable(bucket_view(fake)) == comparable(disk_view(source.layout.root))
