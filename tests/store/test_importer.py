"""Tests of the importer: which objects of another registry's directory are imported, and which are skipped."""

from __future__ import annotations

import mmap
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from dockerproxy.oci.names import Digest
from dockerproxy.store import importer
from dockerproxy.store import progress as progress_module
from dockerproxy.store.hosted_tree import HostedTree
from dockerproxy.store.importer import ImportResult, NotARegistry, Skipped, import_registry
from dockerproxy.store.layout import Layout
from dockerproxy.store.progress import Progress, Stopped
from dockerproxy.store.scrub import scrub
from tests.store.support.images import BOTH, ONE, TWO, image, put_image

REPOSITORY = "library/tiny"
SIGNATURE = image(b"sig", b"signature", subject=BOTH)


@pytest.fixture
def store(tmp_path: Path) -> HostedTree:
    return HostedTree.from_layout(Layout(tmp_path / "ours"))


@pytest.fixture
def other(tmp_path: Path) -> HostedTree:
    """A directory as `registry:2` writes it, without media types and subjects."""
    other = HostedTree.from_layout(Layout(tmp_path / "other"))
    put_image(other, REPOSITORY, BOTH, "v1", "latest")
    put_image(other, REPOSITORY, SIGNATURE)
    put_image(other, "two", ONE, "v1")
    for name in ("media-type", "subject"):
        for path in other.layout.root.rglob(name):
            path.unlink()
    for path in other.layout.root.rglob("_referrers"):
        shutil.rmtree(path)
    return other


def import_from(store: HostedTree, directory: Path, *, force: bool = False) -> tuple[ImportResult, list[Skipped]]:
    skipped_items: list[Skipped] = []
    result = import_registry(store.layout, directory, force=force, progress=Progress(emit=skipped_items.append))
    assert result.untaken == len(skipped_items)
    assert os.listdir(store.layout.staging) == []
    return result, skipped_items


def is_intact(store: HostedTree) -> bool:
    return scrub(store.layout).findings == 0


def test_imports_everything_in_repositories(store: HostedTree, other: HostedTree) -> None:
    other.blobs.put(b"garbage", Digest.of(b"garbage"))
    before = sorted(map(str, other.layout.root.rglob("*")))
    result, skipped_items = import_from(store, other.layout.root)
    assert skipped_items == []
    entries = {entry.key: entry.size for entry in other.blobs.walk() if entry.key != Digest.of(b"garbage")}
    assert result == ImportResult(
        repositories=2, hardlinked=len(entries), bytes=sum(entries.values()), manifests=5, tags=3
    )
    assert {entry.key: entry.size for entry in store.blobs.walk()} == entries
    assert store.links.tags(REPOSITORY) == ["latest", "v1"]
    assert store.links.tag(REPOSITORY, "v1") == BOTH.digest
    assert store.links.manifest_media_type(REPOSITORY, BOTH.digest) == BOTH.media_type
    assert is_intact(store)
    assert sorted(map(str, other.layout.root.rglob("*"))) == before
    config = Digest.of(b"config1")
    assert os.path.samefile(store.layout.blob(config), other.layout.blob(config))
    # Referrers are found although the source has no referrers index.
    store.referrers.index(REPOSITORY, store.referrers.missing(REPOSITORY))
    assert len(list(store.referrers.list(REPOSITORY, BOTH.digest, None))) == 1


def test_referrers_keep_their_order(store: HostedTree, other: HostedTree) -> None:
    signatures = [image(b"sig", b"%d" % number, subject=ONE) for number in range(5)]
    for number, signature in enumerate(signatures):
        put_image(other, "two", signature)
        other.links.set_manifest_time("two", signature.digest, number if number < 4 else 2**62)
    import_from(store, other.layout.root)
    store.referrers.index("two", store.referrers.missing("two"))
    entries = [entry for entry, _ in store.referrers.list("two", ONE.digest, None)]
    assert [entry.partition("-")[2] for entry in entries] == [f"sha256-{item.digest.hex}" for item in signatures]
    assert (store.links.manifest_time("two", signatures[4].digest) or 0) < 2**62  # a future time counts as now


def test_a_second_import_is_a_no_op(store: HostedTree, other: HostedTree) -> None:
    import_from(store, other.layout.root)
    result, skipped_items = import_from(store, other.layout.root)
    assert skipped_items == []
    assert result == ImportResult(repositories=2, present=len(list(other.blobs.walk())))


@pytest.mark.parametrize("subdirectory", ["", "docker/registry/v2"])
def test_accepts_the_root_or_the_v2_directory(store: HostedTree, other: HostedTree, subdirectory: str) -> None:
    assert import_from(store, other.layout.root / subdirectory)[0].tags == 3


def test_other_directories_are_rejected(store: HostedTree, other: HostedTree, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "nothing", tmp_path, tmp_path / "file"):
        with pytest.raises(NotARegistry, match=str(directory)):
            import_from(store, directory)
    with pytest.raises(NotARegistry, match="own"):
        import_from(other, other.layout.root)


def test_copies_if_hard_links_are_impossible(
    store: HostedTree, other: HostedTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(source: str, target: str, **options: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    with monkeypatch.context() as patch:
        patch.setattr(importer.os, "link", link)
        result, _ = import_from(store, other.layout.root)
    assert (result.hardlinked, result.copied) == (0, len(list(other.blobs.walk())))
    assert is_intact(store)
    assert not os.path.samefile(store.layout.blob(ONE.digest), other.layout.blob(ONE.digest))
    third = HostedTree.from_layout(Layout(store.layout.root.parent / "third"))
    monkeypatch.setattr(importer.os, "geteuid", lambda: os.getuid() + 1000)
    assert import_from(third, other.layout.root)[0].hardlinked == 0


def test_a_conflicting_tag_is_only_moved_by_force(store: HostedTree, other: HostedTree) -> None:
    put_image(store, REPOSITORY, ONE, "v1", "mine")
    result, skipped_items = import_from(store, other.layout.root)
    assert (result.conflicts, result.tags) == (1, 2)
    assert [item.kind for item in skipped_items] == ["conflict"]
    assert f"{REPOSITORY}:v1" in skipped_items[0].message
    assert store.links.tag(REPOSITORY, "v1") == ONE.digest
    result, skipped_items = import_from(store, other.layout.root, force=True)
    assert (result.conflicts, result.tags, skipped_items) == (0, 1, [])
    assert store.links.tag(REPOSITORY, "v1") == BOTH.digest
    assert store.links.tag(REPOSITORY, "mine") == ONE.digest


def test_damaged_source_blobs_are_skipped(store: HostedTree, other: HostedTree) -> None:
    Path(other.layout.blob(Digest.of(b"layer1"))).write_bytes(b"layer?")
    Path(other.layout.blob(TWO.digest)).unlink()
    Path(other.layout.blob(SIGNATURE.digest)).write_bytes(b"no manifest")
    Path(other.layout.tag_current("two", "v1")).write_bytes(str(TWO.digest).encode())
    _, skipped_items = import_from(store, other.layout.root)
    messages = sorted(item.message for item in skipped_items)
    layer = Digest.of(b"layer1")
    assert messages == sorted([
        f"{layer} is damaged",
        f"{SIGNATURE.digest} is damaged",
        f"{REPOSITORY}: the blob {layer} is missing",
        f"two: the blob {layer} is missing",
        f"{REPOSITORY}: the manifest {SIGNATURE.digest} is missing",
        f"{REPOSITORY}: the manifest {TWO.digest} is missing",
        "two:v1: the manifest of the tag is missing",
    ])  # fmt: skip
    assert store.links.tags("two") == []
    assert not store.blobs.exists(layer)
    # Once the source blob is repaired, the next import adds it.
    Path(other.layout.blob(layer)).write_bytes(b"layer1")
    import_from(store, other.layout.root)
    assert store.links.has_layer(REPOSITORY, layer)


def test_import_repairs_a_damaged_target_blob(store: HostedTree, other: HostedTree) -> None:
    import_from(store, other.layout.root)
    path = store.layout.blob(ONE.digest)
    os.unlink(path)
    Path(path).write_bytes(b"short")
    assert import_from(store, other.layout.root)[0].hardlinked == 1
    assert is_intact(store)


@pytest.mark.parametrize("content", [b"", b"sha256:12"])
def test_torn_links_are_reported_and_mended(store: HostedTree, other: HostedTree, content: bytes) -> None:
    base, missing = Digest.of(b"base"), Digest.of(b"layer2")
    for path in (other.layout.layer(REPOSITORY, base), other.layout.layer(REPOSITORY, missing),
                 other.layout.manifest(REPOSITORY, BOTH.children[0].digest),
                 other.layout.tag_current(REPOSITORY, "v1"), other.layout.tag_current("two", "v1")):  # fmt: skip
        Path(path).write_bytes(content)
    os.unlink(other.layout.blob(missing))
    other.links._link(other.layout.tag_index("two", "v1", BOTH.digest), BOTH.digest)  # it has had two manifests
    messages = {item.message for item in import_from(store, other.layout.root)[1] if item.kind == "torn"}
    mended = "is torn; it was mended, because its content is here"
    assert messages == {
        f"{REPOSITORY}: the link to the blob {base} {mended}",
        f"{REPOSITORY}: the link to the blob {missing} is torn; it was not imported",
        f"{REPOSITORY}: the link to the manifest {BOTH.children[0].digest} {mended}",
        f"{REPOSITORY}: the tag v1 {mended}",
        "two: the tag v1 is torn; it was not imported",
    }
    assert store.links.has_layer(REPOSITORY, base) and not store.links.has_layer(REPOSITORY, missing)
    assert store.links.tag(REPOSITORY, "v1") == BOTH.digest
    assert store.links.tag("two", "v1") is None


def test_an_invalid_repository_name_is_skipped(store: HostedTree, other: HostedTree) -> None:
    os.rename(f"{other.layout.repositories}/two", f"{other.layout.repositories}/Two")
    result, skipped_items = import_from(store, other.layout.root)
    assert [item.kind for item in skipped_items] == ["invalid"]
    assert "Two" in skipped_items[0].message
    assert result.repositories == 1


def test_a_stopped_import_can_be_resumed(store: HostedTree, other: HostedTree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "_MAX_LOCK_HOLD", 0)  # report after each link
    steps = 0
    while True:
        remaining = iter(range(steps))

        def stop(phase: str, done: int, total: int | None, remaining: Iterator[int] = remaining) -> None:
            if next(remaining, None) is None:
                raise Stopped

        try:
            import_registry(store.layout, other.layout.root, progress=Progress(report=stop))
            break
        except Stopped:
            pass
        assert not os.path.exists(store.layout.staging) or os.listdir(store.layout.staging) == []
        for repository in store.links.repositories():
            for tag in store.links.tags(repository):
                digest = store.links.tag(repository, tag)
                assert digest is not None and store.links.has_manifest(repository, digest)
        steps += 3
    assert steps > 20
    assert is_intact(store)
    assert store.links.tags(REPOSITORY) == ["latest", "v1"]


def test_locks_cover_manifests_and_tags_only(store: HostedTree, other: HostedTree) -> None:
    """Requests wait for a lock, so nothing is reported, which may block, while one is held."""
    held: list[str] = []
    locked: list[str] = []

    @contextmanager
    def lock(repository: str) -> Iterator[None]:
        held.append(repository)
        locked.append(repository)
        yield
        held.pop()

    def check(*arguments: object) -> None:
        assert not held

    put_image(store, REPOSITORY, ONE, "v1")
    import_registry(store.layout, other.layout.root, progress=Progress(check, check), lock=lock)
    assert set(locked) == {REPOSITORY, "two"}


def test_progress_reports_bytes_and_manifests(store: HostedTree, other: HostedTree) -> None:
    reports: list[tuple[str, int, int | None]] = []
    progress: Progress[Skipped] = Progress(report=lambda *state: reports.append(state))
    import_registry(store.layout, other.layout.root, progress=progress)
    size = sum(entry.size for entry in other.blobs.walk())
    byte_counts = [done for phase, done, total in reports if phase == "contents" and total == size]
    assert byte_counts == sorted(byte_counts)
    assert byte_counts[-1] == size
    assert reports[-1] == ("manifests", 5, None)


# A directory of a stranger.


def blob_path(store: HostedTree, content: bytes) -> Path:
    return Path(store.layout.blob(Digest.of(content)))


def replace_by(make: Callable[[Path], object], path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    make(path)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (os.mkfifo, "a FIFO"),
        (os.mkdir, "a directory"),
        (lambda path: path.symlink_to("/dev/zero"), "a symbolic link"),
        (lambda path: path.symlink_to(path), "a symbolic link"),  # a loop
        (lambda path: path.symlink_to(path.parent / "missing"), "a symbolic link"),
        (lambda path: socket.socket(socket.AF_UNIX).bind(str(path)), "a socket"),
    ],
    ids=["FIFO", "directory", "device", "loop", "dangling", "socket"],
)
def test_what_is_no_file_is_not_a_blob(
    store: HostedTree, other: HostedTree, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], object], reason: str
) -> None:
    path = blob_path(other, b"layer1")
    monkeypatch.chdir(path.parent)  # the path of a socket has at most 107 bytes
    replace_by(lambda path: make(Path("data")), Path("data")) if reason == "a socket" else replace_by(make, path)
    _, skipped_items = import_from(store, other.layout.root)
    message = next(item.message for item in skipped_items if item.kind == "unreadable")
    assert f"{path} is {reason}" in message
    assert not os.path.lexists(blob_path(store, b"layer1"))
    assert store.links.tags(REPOSITORY) == ["latest", "v1"]


@pytest.mark.parametrize(
    "name",
    ["docker", "docker/registry/v2", "docker/registry/v2/blobs", "docker/registry/v2/repositories"],
)
def test_a_link_on_the_way_to_everything_is_refused_with_its_name(
    store: HostedTree, other: HostedTree, tmp_path: Path, name: str
) -> None:
    path, elsewhere = other.layout.root / name, tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    with pytest.raises(NotARegistry, match=f"{path} is a symbolic link"):
        import_from(store, other.layout.root)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_link_above_a_blob_is_not_followed(store: HostedTree, other: HostedTree, tmp_path: Path, depth: int) -> None:
    path, elsewhere = blob_path(other, b"layer1").parents[depth - 1], tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    _, skipped_items = import_from(store, other.layout.root)
    assert any(f"{path} is a symbolic link" in item.message for item in skipped_items)
    assert not store.blobs.exists(Digest.of(b"layer1"))


def test_links_in_repositories_are_reported_once_and_the_rest_is_imported(
    store: HostedTree, other: HostedTree, tmp_path: Path
) -> None:
    repositories = Path(other.layout.repositories)
    (repositories / "two").rename(tmp_path / "two")
    (repositories / "two").symlink_to(tmp_path / "two")
    tag = Path(other.layout.tag_current(REPOSITORY, "latest"))
    tag.rename(tmp_path / "tag")
    tag.symlink_to(tmp_path / "tag")
    result, skipped_items = import_from(store, other.layout.root)
    assert sorted(item.message for item in skipped_items) == sorted(
        f"{path} is a symbolic link, which is not followed" for path in (repositories / "two", tag)
    )
    assert (result.repositories, store.links.tags(REPOSITORY)) == (1, ["v1"])


@pytest.mark.parametrize("kind", ["layer", "manifest", "media type", "tag"])
def test_a_link_file_that_is_a_fifo_is_reported(store: HostedTree, other: HostedTree, kind: str) -> None:
    path = Path({
        "layer": other.layout.layer(REPOSITORY, Digest.of(b"layer1")),
        "manifest": other.layout.manifest(REPOSITORY, BOTH.digest),
        "media type": other.layout.media_type(REPOSITORY, BOTH.digest),
        "tag": other.layout.tag_current(REPOSITORY, "latest"),
    }[kind])  # fmt: skip
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    _, skipped_items = import_from(store, other.layout.root)
    assert [item.message for item in skipped_items if item.kind == "unreadable"] == [f"{path} is a FIFO, not a file"]


def test_the_directory_itself_may_be_a_link(store: HostedTree, other: HostedTree, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(other.layout.root)
    assert import_from(store, tmp_path / "link")[0].tags == 3


def test_a_large_sparse_file_takes_no_room(store: HostedTree, other: HostedTree) -> None:
    path = blob_path(other, b"layer1")
    path.chmod(0o666)  # so that it would be copied
    os.truncate(path, 1 << 43)
    _, skipped_items = import_from(store, other.layout.root)
    [message] = [item.message for item in skipped_items if item.kind == "unreadable"]
    assert f"a copy needs {1 << 43} bytes" in message
    os.truncate(path, 64 * 1024 * 1024)
    written: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importer, "write_all", lambda fd, chunks, offset: written.append(len(chunks[0])))
        _, skipped_items = import_from(store, other.layout.root)
    assert (written, skipped_items[0].kind) == ([], "damaged")


@pytest.mark.parametrize("way", ["writable by the group", "writable by all", "open", "two names", "mapped"])
def test_what_others_can_still_write_is_copied(store: HostedTree, other: HostedTree, tmp_path: Path, way: str) -> None:
    path = blob_path(other, b"layer1")
    with ExitStack() as stack:
        if way == "open":
            stack.enter_context(path.open("ab"))
        elif way == "mapped":
            with path.open("r+b") as file:
                stack.enter_context(mmap.mmap(file.fileno(), 0))
        elif way == "two names":
            os.link(path, tmp_path / "name")
        else:
            path.chmod(0o664 if "group" in way else 0o646)
        result, skipped_items = import_from(store, other.layout.root)
    assert (skipped_items, result.copied) == ([], 1)
    path.write_bytes(b"changed")
    assert is_intact(store)


def test_a_file_that_grows_or_shrinks_while_it_is_read_is_not_imported(
    store: HostedTree, other: HostedTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = blob_path(other, b"layer1")
    read_source = importer._read_source

    def shrink(fd: int, size: int, offset: int) -> bytes:
        if size and os.fstat(fd).st_ino == path.stat().st_ino:
            os.truncate(path, 3)
        return read_source(fd, size, offset)

    def grow(fd: int, size: int, offset: int) -> bytes:
        if os.fstat(fd).st_ino == path.stat().st_ino:
            with path.open("ab") as file:
                file.write(b"more")
        return read_source(fd, size, offset)

    for change in (grow, shrink):
        with monkeypatch.context() as patch:
            patch.setattr(importer, "_read_source", change)
            import_from(store, other.layout.root)
        assert not store.blobs.exists(Digest.of(b"layer1"))
        path.write_bytes(b"layer1")


def test_names_that_are_not_utf_8_are_reported(store: HostedTree, other: HostedTree) -> None:
    os.makedirs(os.fsencode(other.layout.repositories) + b"/caf\xe9/_layers")
    os.makedirs(os.fsencode(other.layout.tags(REPOSITORY)) + b"/\xff/current")
    result, skipped_items = import_from(store, other.layout.root)
    assert (result.repositories, skipped_items) == (2, [])


def test_counts_are_numbers(store: HostedTree, other: HostedTree) -> None:
    result, _ = import_from(store, other.layout.root)
    assert type(result.hardlinked) is int and type(result.copied) is int
