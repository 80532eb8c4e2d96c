from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dockerproxy.errors import BlobUploadBusy, BlobUploadUnknown, DigestInvalid, RangeInvalid
from dockerproxy.oci.names import Digest
from dockerproxy.oci.uploads import declared_length, range_header
from dockerproxy.store import hashed_append_file
from dockerproxy.store import uploads as uploads_module
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.hosted_tree import HostedTree
from dockerproxy.store.layout import Layout
from dockerproxy.store.links import Links
from dockerproxy.store.uploads import Upload, Uploads

NAME = "some/where"
DAY = 86400.0


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path)


@pytest.fixture
def uploads(layout: Layout) -> Uploads:
    return Uploads(layout)


def start_upload(uploads: Uploads, data: bytes = b"", algorithm: str = "sha256") -> str:
    upload = uploads.start(NAME, algorithm)
    upload.append([data])
    uploads.suspend(upload)
    return upload.session


def sessions(layout: Layout) -> list[str]:
    try:
        return os.listdir(layout.uploads(NAME))
    except FileNotFoundError:
        return []


class UploadsMachine(RuleBasedStateMachine):
    """Compare a session with the expected bytes, through client requests and restarts of the daemon."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.layout = Layout(Path(self.folder.name))
        self.uploads = Uploads(self.layout)
        self.blobs = Blobs(self.layout, False)
        self.session = ""
        self.model: bytes | None = b""
        self.other = ""

    @initialize(algorithm=st.sampled_from(["sha256", "sha512"]))
    def start(self, algorithm: str) -> None:
        self.session = start_upload(self.uploads, algorithm=algorithm)
        self.other = start_upload(self.uploads, b"untouched")

    def resume(self) -> Upload | None:
        try:
            return self.uploads.resume(NAME, self.session)
        except BlobUploadUnknown:
            assert self.model is None
            return None

    @rule(chunk=st.binary(max_size=64), skip=st.integers(-3, 3), ranged=st.booleans())
    def patch(self, chunk: bytes, skip: int, ranged: bool) -> None:
        upload = self.resume()
        if upload is None:
            return
        assert self.model is not None
        start = max(0, upload.size + skip)
        field = f"{start}-{start + len(chunk) - 1}" if ranged and chunk else None
        try:
            declared_length(field, len(chunk), upload.size)
            assert field is None or start == len(self.model)
            upload.append([chunk])
            self.model += chunk
        except RangeInvalid:
            assert start != len(self.model)
        finally:
            self.uploads.suspend(upload)

    @precondition(lambda self: self.model)
    @rule(chunk=st.binary(min_size=1, max_size=64))
    def truncate(self, chunk: bytes) -> None:
        upload = self.resume()
        assert upload is not None and self.model is not None
        upload.append([chunk])
        upload.truncate(len(self.model))
        self.uploads.suspend(upload)

    @rule()
    def restart(self) -> None:
        self.uploads = Uploads(self.layout)

    @precondition(lambda self: self.model is not None)
    @rule()
    def check_exclusive(self) -> None:
        upload = self.resume()
        assert upload is not None
        with pytest.raises(BlobUploadBusy):
            self.uploads.resume(NAME, self.session)
        with pytest.raises(BlobUploadBusy):
            Uploads(self.layout).resume(NAME, self.session)
        self.uploads.suspend(upload)

    @precondition(lambda self: self.model is not None)
    @rule(algorithm=st.sampled_from(["sha256", "sha512"]), is_correct=st.booleans())
    def finish(self, algorithm: str, is_correct: bool) -> None:
        upload = self.resume()
        assert upload is not None and self.model is not None
        digest = Digest.of(self.model if is_correct else self.model + b"!", algorithm)
        assert upload.verify(digest) is is_correct
        if is_correct:
            upload.commit(self.blobs, digest)
            with open(self.layout.blob(digest), "rb") as file:
                assert file.read() == self.model
            self.model = None
        else:
            self.uploads.suspend(upload)

    @precondition(lambda self: self.model is not None)
    @rule()
    def cancel(self) -> None:
        upload = self.resume()
        assert upload is not None
        upload.cancel()
        self.model = None

    @invariant()
    def check_size(self) -> None:
        if not self.session:
            return
        if self.model is None:
            with pytest.raises(BlobUploadUnknown):
                self.uploads.size(NAME, self.session)
            assert sessions(self.layout) == [self.other]
        else:
            size = self.uploads.size(NAME, self.session)
            assert (size, range_header(size)) == (len(self.model), f"0-{max(0, len(self.model) - 1)}")
        assert self.uploads.size(NAME, self.other) == len(b"untouched")

    def teardown(self) -> None:
        self.folder.cleanup()


UploadsMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
TestUploads = UploadsMachine.TestCase


def test_session_layout_matches_distribution(layout: Layout) -> None:
    uploads = Uploads(layout, lambda: 1_750_000_000.0)
    session = start_upload(uploads, b"data")
    folder = Path(layout.repositories) / NAME / "_uploads" / session
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "data": b"data", "startedat": b"2025-06-15T15:06:40Z",
    }  # fmt: skip


def test_hashes_while_appending(uploads: Uploads, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = uploads.start(NAME, "sha512")
    for chunk in (b"one", b"two", b"three"):
        upload.append([chunk])
        uploads.suspend(upload)
        upload = uploads.resume(NAME, upload.session)
    monkeypatch.setattr(hashed_append_file.os, "preadv", None)  # type: ignore[attr-defined]
    digest = Digest.of(b"onetwothree", "sha512")
    assert upload.is_hashed("sha512") and not upload.is_hashed("sha256")
    assert upload.verify(digest)
    upload.commit(Blobs(layout, True), digest)


@pytest.mark.parametrize(
    "session", ["", "x", "..", "../../x", "0" * 36, "A" * 36, "00000000-0000-0000-0000-00000000000g"]
)
def test_an_invalid_session_id_is_unknown(uploads: Uploads, session: str) -> None:
    start_upload(uploads)
    with pytest.raises(BlobUploadUnknown):
        uploads.resume(NAME, session)
    with pytest.raises(BlobUploadUnknown):
        uploads.size(NAME, session)


def test_a_session_belongs_to_its_repository(uploads: Uploads) -> None:
    session = start_upload(uploads)
    with pytest.raises(BlobUploadUnknown):
        uploads.resume("some/where/else", session)


def test_resumes_the_session_of_a_killed_process(layout: Layout) -> None:
    code = (
        "import os, sys; from pathlib import Path; from dockerproxy.store.uploads import Uploads;"
        "from dockerproxy.store.layout import Layout; upload = Uploads(Layout(Path(sys.argv[1]))).start('some/where');"
        "upload.append([b'before']); print(upload.session, flush=True); os.kill(os.getpid(), 9)"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, str(layout.root)], capture_output=True, text=True, check=False
    )
    session = process.stdout.strip()
    uploads = Uploads(layout)
    assert uploads.size(NAME, session) == 6
    upload = uploads.resume(NAME, session)
    upload.append([b" and after"])
    digest = Digest.of(b"before and after")
    assert upload.verify(digest)
    upload.commit(Blobs(layout, True), digest)
    assert sessions(layout) == []


def test_purge_removes_idle_sessions(uploads: Uploads, layout: Layout) -> None:
    old, fresh, busy, torn = (start_upload(uploads, b"x") for _ in range(4))
    upload = uploads.resume(NAME, busy)
    folder = Path(layout.uploads(NAME))
    (folder / torn / "data").unlink()
    for session in (old, busy, torn):
        for path in (folder / session, *(folder / session).iterdir()):
            os.utime(path, (1000, 1000))
    (folder / "foreign").mkdir()
    assert uploads.purge(DAY) == 2
    assert set(sessions(layout)) == {fresh, busy, "foreign"}
    uploads.suspend(upload)
    assert uploads.purge(DAY) == 1
    assert set(sessions(layout)) == {fresh, "foreign"}


def test_purge_removes_repositories_without_content(uploads: Uploads, layout: Layout) -> None:
    start_upload(uploads, b"x")
    assert uploads.purge(time.time() + 1) == 1
    assert os.listdir(layout.repositories) == []
    Links(layout, False).link_layer(NAME, Digest.of(b"a"))
    session = start_upload(uploads, b"x")
    assert uploads.purge(time.time() + 1) == 1
    assert os.listdir(layout.repository(NAME)) == ["_layers"]
    with pytest.raises(BlobUploadUnknown):
        uploads.resume(NAME, session)


def test_resumes_a_session_of_distribution(uploads: Uploads, layout: Layout) -> None:
    session = "01234567-89ab-cdef-0123-456789abcdef"
    folder = Path(layout.uploads(NAME)) / session
    (folder / "hashstates" / "sha256").mkdir(parents=True)
    (folder / "hashstates" / "sha256" / "0").write_bytes(b"state")
    (folder / "data").write_bytes(b"theirs")
    (folder / "startedat").write_text("2025-06-15T15:06:40Z")
    upload = uploads.resume(NAME, session)
    upload.append([b" and ours"])
    assert upload.verify(Digest.of(b"theirs and ours"))
    upload.commit(Blobs(layout, True), Digest.of(b"theirs and ours"))
    assert sessions(layout) == []


def test_the_number_of_saved_hashers_is_bounded(uploads: Uploads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads_module, "_MAX_HASHERS", 2)
    first, *rest = (start_upload(uploads, b"some") for _ in range(3))
    assert not uploads.resume(NAME, first).is_hashed("sha256")
    assert all(uploads.resume(NAME, session).is_hashed("sha256") for session in rest)
    assert uploads.resume("some/where", start_upload(uploads, b"x")).verify(Digest.of(b"x"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True)
    if mount.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mount.stderr!r}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_truncates_a_partial_append(small_disk: Path) -> None:
    uploads = Uploads(Layout(small_disk))
    upload = uploads.start(NAME)
    upload.append([b"fits"])
    with pytest.raises(OSError) as caught:
        upload.append([bytes(512 * 1024)])
    assert caught.value.errno == errno.ENOSPC
    assert upload.size == uploads.size(NAME, upload.session) == 4
    upload.append([b" too"])
    assert upload.verify(Digest.of(b"fits too"))


def test_a_failed_start_leaves_no_session(small_disk: Path) -> None:
    layout = Layout(small_disk)
    uploads = Uploads(layout)
    start_upload(uploads)
    count = 0
    with pytest.raises(OSError):
        for count in range(1000):
            (small_disk / f"{count}").write_bytes(bytes(4096))
    before = len(sessions(layout))
    with pytest.raises(OSError):
        uploads.start(NAME)
    assert len(sessions(layout)) == before


def test_a_wrong_digest_is_not_committed(layout: Layout) -> None:
    store = HostedTree.from_layout(layout)
    upload = store.uploads.start(NAME)
    upload.append([b"content"])
    assert not upload.verify(Digest.of(b"another content"))
    with pytest.raises(DigestInvalid):
        store.blobs.put(b"content", Digest.of(b"another content"))
