"""A registry in a bucket looks to an administrator as the same registry in a directory does."""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dockerproxy.admin.images import ImageReader
from dockerproxy.admin.inventory import list_manifests, list_repositories
from dockerproxy.admin.repository_view import RepositoryView
from dockerproxy.admin.resolver import ImageRef, ImageResolver, NotFound, StoreView
from dockerproxy.admin.summary import RepositoryReader, RepositorySummary
from dockerproxy.admin.viewer import Viewer
from dockerproxy.bucket import bucket_tree, keys
from dockerproxy.bucket.bucket_tree import BucketTree, ReaderThreads
from dockerproxy.errors import InsufficientStorage, StoreRefused, StoreUnavailable, UpstreamTimeout
from dockerproxy.oci.manifests import fallback_tag
from dockerproxy.oci.names import Digest
from dockerproxy.store.hosted_tree import HostedTree
from dockerproxy.store.layout import Layout
from dockerproxy.store.needs import find_needs
from dockerproxy.store.records import Records
from dockerproxy.thread_pool import DaemonThreadPool
from tests.bucket.support.trees import blocking, bucket_view, disk_view, fail_after, make_store, upload_tree
from tests.store.support.images import BOTH, ONE, TWO, ManifestTree, image, index, put_image
from tests.support.examples import examples
from tests.support.fake_store import FakeStore, refusal, xml

ARM = image(json.dumps({"os": "linux", "architecture": "arm64"}).encode(), b"base", b"arm")
SIGNATURE = image(b"sig", b"signature", subject=BOTH)
STRANGE = ManifestTree("application/vnd.strange", str(BOTH.digest).encode(), (b"named",))
IMAGES = (ONE, TWO, BOTH, ARM, SIGNATURE, STRANGE, index(BOTH, ARM), index(image(b"x"), ONE))
NAMES = ("a", "a-b", "a/b", "a/0b", "team/app")
TAGS = ("v1", "latest", "V2", fallback_tag(BOTH.digest))

pushes = st.lists(
    st.tuples(st.sampled_from(NAMES), st.sampled_from(IMAGES), st.lists(st.sampled_from(TAGS), max_size=2)),
    min_size=1,
    max_size=5,
)
damages = st.lists(st.tuples(st.integers(0, 10_000), st.sampled_from(["delete", "empty", "cut"])), max_size=4)


def damage(root: Path, where: int, how: str) -> None:
    """Delete, empty or cut one of the files."""
    paths = sorted(path for path in (root / "docker").rglob("*") if path.is_file())
    path = paths[where % len(paths)]
    if how == "delete":
        path.unlink()
        with suppress(OSError):
            os.removedirs(path.parent)  # a bucket has no empty directories
    else:
        os.truncate(path, 0 if how == "empty" else path.stat().st_size // 2)


@contextmanager
def twins(pushed: Any, damaged: Any = ()) -> Iterator[tuple[Path, FakeStore]]:
    """Yield a directory and a bucket with the same registry."""
    with tempfile.TemporaryDirectory() as folder:
        root, fake = Path(folder), make_store()
        tree = HostedTree.from_layout(Layout(root))
        for name, manifest, tags in pushed:
            put_image(tree, name, manifest, *tags)
        for where, how in damaged:
            damage(root, where, how)
        upload_tree(fake, root)
        yield root, fake


def open_images(view: StoreView, name: str, records: Records) -> ImageReader:
    return ImageReader(RepositoryView.of(Viewer.administrator(), view, name, records))


def show(view: StoreView, records: Records) -> Iterator[Any]:
    """Yield everything that an administrator can see of a store."""
    names = []
    for row in list_repositories(view.snapshot()):
        if row["manifests"]:  # a bucket's catalog has no other ones
            names.append(row["name"])
            yield row
    resolver = ImageResolver([view], frozenset())
    yield resolver.snapshot().complete("a")
    for name in names:
        store = view.snapshot()
        yield sorted(list_manifests(ImageRef(store, name)), key=lambda row: (row["tag"] or "", row["digest"]))
        yield sorted((str(need.digest), need.tag) for need in find_needs(store.contents, store.links, name))
        reader = open_images(view.snapshot(), name, records)
        tags = reader.tags(1)
        yield tags
        for tag in tags.tags:
            yield reader.manifest(Digest.parse(tag["digest"]))
            yield str(resolver.snapshot().resolve(f"{name}:{tag['tag']}"))
            yield list(list_manifests(resolver.snapshot().resolve(f"{name}:{tag['tag']}")))
            yield list(list_manifests(resolver.snapshot().resolve(f"{name}@{tag['digest']}")))


@settings(max_examples=examples(60), deadline=None)
@given(pushes, damages)
def test_it_looks_the_same(pushed: Any, damaged: Any) -> None:
    with twins(pushed, damaged) as (root, fake):
        records = Records(root / "records")
        assert list(show(bucket_view(fake), records)) == list(show(disk_view(root), records))


@settings(max_examples=examples(30), deadline=None)
@given(pushes, damages)
def test_the_summary_of_the_page_is_the_same(pushed: Any, damaged: Any) -> None:
    with twins(pushed, damaged) as (root, fake):
        expected, found = (summarize(view, root) for view in (disk_view(root), bucket_view(fake, walks=True)))
        for row in (*expected.values(), *found.values()):
            row.signature, row.read_at = (), 0.0
        fields = [name for name in RepositorySummary.__slots__ if not name.startswith("__")]

        def values(rows: dict[str, RepositorySummary]) -> dict[str, list[Any]]:
            return {key: [getattr(row, name) for name in fields] for key, row in rows.items()}

        assert values(found) == values(expected)


def summarize(
    view: StoreView, root: Path, known: dict[str, RepositorySummary] | None = None
) -> dict[str, RepositorySummary]:
    found: dict[str, RepositorySummary] = {}
    for _ in RepositoryReader(view, Records(root / "records"), lambda: 0.0).renew(known or {}, found, 2000):
        pass
    return found


def test_names_that_do_not_exist_have_the_same_suggestions() -> None:
    with twins([("team/app", BOTH, ["v1"])]) as (root, fake):
        for name in ("app", "team/ap", "team/app:v2", f"team/app@{ARM.digest}", "team/APP", "..", "a/../b", "x" * 300):
            errors = []
            for view in (disk_view(root), bucket_view(fake)):
                with pytest.raises(NotFound) as caught:
                    ImageResolver([view], frozenset()).snapshot().resolve(name)
                errors.append((str(caught.value), caught.value.suggestions))
            assert errors[0] == errors[1]


# requests


def test_a_thousand_repositories_are_two_lists_and_details_of_what_is_shown() -> None:
    with twins([("team/app", ARM, ["v1"])]) as (_, fake):
        prefix = f"site/{keys.REPOSITORIES}team/app/"
        for key in [key for key in fake.objects if key.startswith(prefix)]:
            for number in range(1000):
                name = key.replace("team/app", f"more/app{number:03}")
                fake.store(name, fake.objects[key])
        for number in range(1000):
            fake.store(f"site/{keys.catalog_key(f'more/app{number:03}')}", b"")
        fake.requests.clear()
        view = bucket_view(fake)
        assert len(list(view.links.repositories())) == 1001
        assert [str(request) for request in fake.requests] == ["GET list-type"] * 2
        fake.requests.clear()
        [row] = list_repositories(bucket_view(fake), "team/*")
        assert row["platforms"] == ["linux/arm64"]
        # The catalog, the keys of a repository, four sizes, the type of the manifest, it and its configuration.
        assert len(fake.requests) == 2 + 1 + 4 + 3
        fake.requests.clear()
        assert len(summarize(bucket_view(fake, walks=True), Path("/nowhere"))) == 1001
        listings = sum("list-type" in request.query for request in fake.requests)
        assert listings == -(-len([key for key in fake.objects if keys.REPOSITORIES in key]) // 1000)


def test_an_unchanged_repository_is_not_read_again() -> None:
    with twins([("team/app", BOTH, ["v1"]), ("a", ONE, [])]) as (root, fake):
        known = summarize(bucket_view(fake, walks=True), root)
        fake.requests.clear()
        assert summarize(bucket_view(fake, walks=True), root, known) == known
        assert [str(request) for request in fake.requests] == ["GET list-type"]
        fake.clock.advance(5)
        fake.store(f"site/{keys.tag_key('a', 'new')}", str(ONE.digest).encode())
        assert summarize(bucket_view(fake, walks=True), root, known)["a"].figures.tags == 1


def test_only_the_tags_that_are_shown_are_read() -> None:
    with twins([("a", ONE, ["v1"])]) as (root, fake):
        for number in range(300):
            fake.store(f"site/{keys.tag_key('a', f't{number:03}')}", str(ONE.digest).encode())
        fake.requests.clear()
        reader = open_images(bucket_view(fake), "a", Records(root / "records"))
        page = reader.tags(2)
        assert (page.count, [tag["tag"] for tag in page.tags]) == (301, [f"t{number:03}" for number in range(50, 100)])
        assert sum("tags" in request.key for request in fake.requests) == 50


def test_only_some_requests_are_sent_at_a_time() -> None:
    """Those of all listings together, and listings within listings do not wait for each other."""
    pool = DaemonThreadPool(0, bucket_tree.AT_ONCE, "test")
    pool.start()
    threads, lock, started = ReaderThreads(pool), threading.Lock(), threading.Event()
    running, most = 0, 0

    def work(item: int) -> int:
        nonlocal running, most
        if item >= 0:
            return sum(threads.map(work, [-1 - item] * 40))
        with lock:
            running += 1
            most = max(most, running)
            if running == bucket_tree.AT_ONCE:
                started.set()
        started.wait(10)
        with lock:
            running -= 1
        return item

    try:
        assert list(threads.map(work, range(40))) == [40 * (-1 - item) for item in range(40)]
        assert bucket_tree.AT_ONCE <= most <= bucket_tree.AT_ONCE + 1  # the caller's own thread works, too
        with pytest.raises(ZeroDivisionError):
            list(threads.map(lambda item: 1 // item, [1, 0, 2]))
        assert list(threads.map(str, [1])) == ["1"]
    finally:
        pool.stop()


# bad days, and strange buckets


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (lambda: refusal(503, "SlowDown"), StoreUnavailable),
        (lambda: refusal(500, "InternalError"), StoreUnavailable),
        (lambda: refusal(403, "AccessDenied"), StoreRefused),
        (lambda: refusal(507, "InsufficientStorage"), InsufficientStorage),
        (lambda: UpstreamTimeout("store.test: no answer within 30 s"), StoreUnavailable),
        (lambda: xml("Error", "<Code>InternalError</Code>"), StoreUnavailable),
    ],
    ids=["slow down", "internal error", "denied", "full", "time-out", "error in a success"],
)
@pytest.mark.parametrize("after", range(4))
def test_a_store_that_fails_in_the_middle(answer: Callable[[], Any], error: type[Exception], after: int) -> None:
    with twins([("team/app", BOTH, ["v1"])]) as (_, fake):
        listings = [number for number, request in enumerate(seen(fake)) if "list-type" in request.query]
        count = listings[after % len(listings)]
        fail_after(fake, count, lambda request: answer())
        with pytest.raises(error):
            list(list_manifests(ImageRef(bucket_view(fake), "team/app")))
            list(list_repositories(bucket_view(fake)))


def seen(fake: FakeStore) -> list[Any]:
    """Return the requests of two listings."""
    fake.requests.clear()
    list(list_manifests(ImageRef(bucket_view(fake), "team/app")))
    list(list_repositories(bucket_view(fake)))
    return [*fake.requests]


def test_a_failure_that_passes_is_not_noticed() -> None:
    with twins([("team/app", BOTH, ["v1"])]) as (root, fake):
        for _ in range(3):
            fake.fail(refusal(503, "SlowDown"))
        assert list(list_repositories(bucket_view(fake))) == list(list_repositories(disk_view(root)))
        assert not fake.faults


def test_strange_keys_are_passed_over() -> None:
    with twins([("team/app", ONE, ["v1"])]) as (root, fake):
        expected = list(show(disk_view(root), Records(root / "records")))
        own = f"site/{keys.REPOSITORIES}team/app/"
        for key in (
            f"{own}_manifests/", f"{own}_manifests/revisions/sha256/{ONE.digest.hex}/", f"{own}_layers/sha256/x/link",
            f"{own}_manifests/tags/.bad/current/link", f"{own}_manifests/tags/v1/current/link/below",
            f"{own}_manifests/tags/v9/index/sha256/{ONE.digest.hex}/link", f"{own}_uploads/1/data", f"{own}_layers/x",
            f"site/{keys.REPOSITORIES}_strange/_layers/link", f"site/{keys.REPOSITORIES}UPPER/_manifests/link",
            f"site/{keys.CATALOG}Not!A!Name", f"site/{keys.CATALOG}..!..!etc", f"site/{keys.REPOSITORIES}team/app2",
        ):  # fmt: skip
            fake.store(key, b"strange")
        assert list(show(bucket_view(fake), Records(root / "records"))) == expected


def test_a_repository_with_too_many_keys_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket_tree, "_MAX_KEYS", 10)
    with twins([("team/app", BOTH, ["v1"])]) as (_, fake):
        with pytest.raises(StoreRefused, match="has more than 10 keys of team/app"):
            list(list_repositories(bucket_view(fake)))
        with pytest.raises(StoreRefused, match="has more than 10 keys of team/app"):
            list(bucket_view(fake, walks=True).links.repositories())


def test_memory_holds_the_keys_of_a_few_repositories() -> None:
    with twins([("team/app", ONE, ["v1"])]) as (_, fake):
        for number in range(200):
            fake.store(f"site/{keys.manifest_key(f'many/n{number}', ONE.digest)}", str(ONE.digest).encode())
        tree = BucketTree(blocking(fake), None, walks=True)
        assert sum(1 for _ in tree.list_repositories()) == 201
        assert len(tree._repositories) == bucket_tree._MAX_REPOSITORIES


def test_a_content_longer_than_the_limit_is_read_to_the_limit() -> None:
    fake = make_store()
    digest = Digest.of(b"x" * 100)
    fake.store(f"site/{keys.blob_key(digest)}", b"x" * 100)
    fake.store(f"site/{keys.blob_key(Digest.of(b''))}", b"")
    contents = bucket_view(fake).contents
    assert contents.read(digest, 40) == b"x" * 40
    assert contents.read(digest, 400) == b"x" * 100
    assert contents.read(Digest.of(b""), 400) == b""
    assert contents.read(Digest.of(b"absent"), 400) is None
    assert contents.size(digest) == 100 and contents.size(Digest.of(b"absent")) is None
