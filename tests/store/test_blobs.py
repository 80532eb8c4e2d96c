from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from dockerproxy.errors import DigestInvalid
from dockerproxy.oci.names import Digest
from dockerproxy.store.blobs import Blobs, OpenBlob, fill_cached, read_cached
from dockerproxy.store.layout import Layout
from tests.support.examples import examples

CONTENTS = [b"", b"a", b"bb", b"c" * 5000]


class ManualClock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class BlobsMachine(RuleBasedStateMachine):
    """Compare `Blobs` with a dict. Readers that stay open keep their bytes, even after a removal."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.layout = Layout(Path(self.directory.name))
        self.clock = ManualClock()
        self.blobs = Blobs(self.layout, False, self.clock)
        self.model: dict[Digest, tuple[bytes, float]] = {}
        self.readers: list[tuple[OpenBlob, bytes]] = []

    def teardown(self) -> None:
        for reader, content in self.readers:
            with reader:
                assert reader.read_blocking(0, 10_000) == content
        assert not os.path.exists(self.layout.staging) or os.listdir(self.layout.staging) == []
        self.directory.cleanup()

    @rule(content=st.sampled_from(CONTENTS), algorithm=st.sampled_from(["sha256", "sha512"]))
    def put(self, content: bytes, algorithm: str) -> None:
        digest = Digest.of(content, algorithm)
        self.blobs.put(content, digest)
        if not self.record_use(digest):
            self.model[digest] = (content, self.mtime(digest))

    @rule(content=st.sampled_from(CONTENTS))
    def commit(self, content: bytes) -> None:
        os.makedirs(self.layout.staging, exist_ok=True)
        staged_path = f"{self.layout.staging}/mine"
        Path(staged_path).write_bytes(content)
        digest = Digest.of(content)
        self.blobs.commit(staged_path, digest)
        assert not os.path.exists(staged_path)
        if not self.record_use(digest):
            self.model[digest] = (content, self.clock.now)

    @rule(content=st.sampled_from(CONTENTS))
    def remove(self, content: bytes) -> None:
        digest = Digest.of(content)
        assert self.blobs.remove(digest) == (self.model.pop(digest, None) is not None)

    @rule(content=st.sampled_from(CONTENTS), seconds=st.integers(0, 100))
    def open(self, content: bytes, seconds: int) -> None:
        self.clock.now += seconds
        digest = Digest.of(content)
        blob = self.blobs.open(digest)
        assert (blob is not None) == (digest in self.model)
        if blob is not None:
            assert (blob.size, blob.digest) == (len(content), digest)
            self.readers.append((blob, content))
            self.record_use(digest)

    @rule(content=st.sampled_from(CONTENTS), seconds=st.integers(0, 100))
    def touch(self, content: bytes, seconds: int) -> None:
        self.clock.now += seconds
        digest = Digest.of(content)
        assert self.blobs.touch(digest) == (len(content) if self.record_use(digest) else None)

    @rule()
    def walk(self) -> None:
        entries = {entry.key: (entry.size, entry.last_used) for entry in self.blobs.walk()}
        assert entries == {digest: (len(content), last) for digest, (content, last) in self.model.items()}

    @rule(content=st.sampled_from(CONTENTS))
    def query(self, content: bytes) -> None:
        digest = Digest.of(content)
        assert self.blobs.exists(digest) == (digest in self.model)
        assert self.blobs.size(digest) == (len(content) if digest in self.model else None)

    def record_use(self, digest: Digest) -> bool:
        """Record a use in the model. Return whether the blob exists."""
        if digest not in self.model:
            return False
        content, last_used = self.model[digest]
        if not 0 <= self.clock.now - last_used < 60:
            self.model[digest] = (content, self.clock.now)
        return True

    def mtime(self, digest: Digest) -> float:
        return os.stat(self.layout.blob(digest)).st_mtime


TestBlobs = BlobsMachine.TestCase
TestBlobs.settings = settings(max_examples=examples(40), stateful_step_count=30, deadline=None)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path)


def test_storing_a_blob_again_counts_as_a_use(layout: Layout) -> None:
    blobs, digest = Blobs(layout, True), Digest.of(b"a")
    for _ in range(2):
        blobs.put(b"a", digest)
        os.utime(layout.blob(digest), (0, 0))
        staged_path = Path(layout.staging) / "mine"
        staged_path.write_bytes(b"a")
        blobs.commit(str(staged_path), digest)
        assert os.stat(layout.blob(digest)).st_mtime > 0
        os.utime(layout.blob(digest), (0, 0))
        blobs.put(b"a", digest)
        assert os.stat(layout.blob(digest)).st_mtime > 0


def test_put_rejects_a_digest_mismatch(layout: Layout) -> None:
    with pytest.raises(DigestInvalid):
        Blobs(layout, True).put(b"a", Digest.of(b"b"))
    assert not Blobs(layout, True).exists(Digest.of(b"b"))


def test_commit_replaces_a_blob_of_the_wrong_size(layout: Layout) -> None:
    blobs, digest = Blobs(layout, True), Digest.of(b"whole")
    blobs.put(b"whole", digest)
    os.truncate(layout.blob(digest), 2)
    blobs.put(b"whole", digest)
    assert Path(layout.blob(digest)).read_bytes() == b"whole"
    os.truncate(layout.blob(digest), 2)
    staged_path = Path(layout.staging) / "x"
    staged_path.write_bytes(b"whole")
    blobs.commit(str(staged_path), digest)
    assert Path(layout.blob(digest)).read_bytes() == b"whole"


def test_commit_survives_a_concurrent_rmdir(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs, digest = Blobs(layout, True), Digest.of(b"x")
    real, calls = os.rename, []

    def rename(source: str, target: str) -> None:
        calls.append(target)
        if len(calls) == 2:
            # `Blobs.remove` deletes the same digest between our mkdir and our rename.
            os.rmdir(os.path.dirname(target))
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    blobs.put(b"x", digest)
    assert len(calls) == 3
    assert blobs.exists(digest)


def test_an_mtime_in_the_future_is_corrected(layout: Layout) -> None:
    clock = ManualClock()
    blobs, digest = Blobs(layout, False, clock), Digest.of(b"x")
    blobs.put(b"x", digest)
    os.utime(layout.blob(digest), (clock.now + 1e6, clock.now + 1e6))
    blob = blobs.open(digest)
    assert blob is not None
    blob.close()
    blob.close()
    assert [entry.last_used for entry in blobs.walk()] == [clock.now]


def test_walk_skips_foreign_files(layout: Layout) -> None:
    blobs, digest = Blobs(layout, False), Digest.of(b"x")
    assert list(blobs.walk()) == []
    blobs.put(b"x", digest)
    root = Path(layout.blobs)
    (root / "README").write_text("?")
    (root / "sha256" / "file").write_text("?")
    (root / "sha256" / digest.hex[:2] / "nohex").mkdir()
    (root / "sha256" / digest.hex[:2] / (digest.hex[:2] + "0" * 62)).mkdir()  # left by an interrupted removal
    (root / "sha256" / digest.hex[:2] / (digest.hex[:2] + "1" * 62)).write_text("?")
    (root / "sha256" / "zz" / digest.hex).mkdir(parents=True)
    assert [entry.key for entry in blobs.walk()] == [digest]


def test_walk_skips_blobs_removed_meanwhile(layout: Layout) -> None:
    blobs = Blobs(layout, False)
    digests = {Digest.of(bytes([number])) for number in range(20)}
    for number in range(20):
        blobs.put(bytes([number]), Digest.of(bytes([number])))
    entries = blobs.walk()
    seen = {next(entries).key}
    for digest in digests - seen:
        blobs.remove(digest)
    assert list(entries) == []


def test_reads_from_the_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 4096)
    fd = os.open(path, os.O_RDONLY)
    try:
        whole = os.pread(fd, 1 << 20, 0)  # read it into the page cache
        data = read_cached(fd, 1000, 5000)
        if data is None:
            pytest.skip("this file system does not support RWF_NOWAIT")
        assert bytes(data) == whole[1000:6000]
        assert bytes(read_cached(fd, (1 << 20) - 10, 5000) or b"") == whole[-10:]
        assert read_cached(fd, 1 << 20, 5000) == bytearray()
        buffer = bytearray(b"-" * 10)
        assert fill_cached(fd, memoryview(buffer)[2:5], 7) == 3
        assert buffer == b"--\x07\x08\x09-----"
    finally:
        os.close(fd)


def test_a_read_is_limited_to_the_blob_size(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"0123456789"
    blobs, digest = Blobs(layout, False), Digest.of(content)
    blobs.put(content, digest)
    sizes = []
    real = os.preadv

    def preadv(fd: int, buffers: list[bytearray], offset: int, flags: int) -> int:
        sizes.append(len(buffers[0]))
        return real(fd, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", preadv)
    blob = blobs.open(digest)
    assert blob is not None
    with blob:
        for offset in (2, 10, 11):
            assert blob.read_blocking(offset, 100) == content[offset:]
            assert blob.read(offset, 1 << 20) in (None, content[offset:])
    assert sizes == [8, 0, 0]
    assert blob.fd == -1


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EOPNOTSUPP, errno.ENOSYS])
def test_returns_none_if_not_in_page_cache_or_unsupported(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def preadv(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "preadv", preadv)
    assert read_cached(0, 0, 10) is None


def test_other_read_errors_propagate(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
    try:
        with pytest.raises(OSError, match="Bad file descriptor"):
            read_cached(fd, 0, 10)
    finally:
        os.close(fd)


def test_is_cached_samples_the_page_cache(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs, content = Blobs(layout, False), bytes(300_000)
    digest = Digest.of(content)
    blobs.put(content, digest)
    offsets: list[int] = []
    missing: set[int] = set()

    def fill(fd: int, buffer: bytearray, offset: int) -> int | None:
        offsets.append(offset)
        return None if offset in missing else 1

    monkeypatch.setattr("dockerproxy.store.blobs.fill_cached", fill)
    blob = blobs.open(digest)
    assert blob is not None
    with blob:
        assert blob.is_cached(1000, 270_000)
        assert offsets == [1000, 132_072, 263_144, 270_999]
        missing.add(263_144)
        assert not blob.is_cached(1000, 270_000)
        assert blob.is_cached(1000, 1)


def test_second_use_is_noted_in_the_file(layout: Layout) -> None:
    blobs, content = Blobs(layout, False), b"content"
    digest, other = Digest.of(content), Digest.of(b"other")
    blobs.put(content, digest)
    permissions = os.stat(layout.blob(digest)).st_mode & 0o777
    blobs.mark_used_again(other)  # it may have been evicted
    assert [entry.used_again for entry in blobs.walk()] == [False]
    blobs.mark_used_again(digest)
    assert [entry.used_again for entry in blobs.walk()] == [True]
    assert os.stat(layout.blob(digest)).st_mode & 0o777 == permissions
    blobs.touch(digest)
    assert [entry.used_again for entry in blobs.walk()] == [True]


def test_second_use_is_not_noted_in_another_file(layout: Layout, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"content")
    digest = Digest.of(b"content")
    path = Path(layout.blob(digest))
    path.parent.mkdir(parents=True)
    path.symlink_to(target)
    mode = target.stat().st_mode
    Blobs(layout, False).mark_used_again(digest)
    assert target.stat().st_mode == mode
