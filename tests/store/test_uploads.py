from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dockerproxy.errors import (
    BlobUploadBusy,
    BlobUploadUnknown,
    DigestInvalid,
    RangeInvalid,
    ServiceOverloaded,
    TooManyRequests,
)
from dockerproxy.oci.names import Digest, parse_repository
from dockerproxy.oci.upload_ids import UploadIds
from dockerproxy.oci.uploads import declared_length, range_header
from dockerproxy.store import hashed_append_file
from dockerproxy.store import uploads as uploads_module
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.hosted_tree import HostedTree
from dockerproxy.store.layout import Layout
from dockerproxy.store.links import Links
from dockerproxy.store.uploads import Upload, UploadLimits, Uploads
from tests.support.examples import examples

NAME = "some/where"
DAY = 86400.0


IDS = UploadIds(b"secret")


def new_id(owner: str = "someone", repository: str = NAME) -> str:
    return IDS.make_offer(owner, parse_repository(repository), "sha256", 0)[:36]


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path)


@pytest.fixture
def uploads(layout: Layout) -> Uploads:
    return Uploads(layout)


def start_upload(uploads: Uploads, data: bytes = b"", algorithm: str = "sha256", session: str = "") -> str:
    upload = uploads.create(session or new_id(), algorithm)
    upload.append([data])
    uploads.suspend(upload)
    return upload.session


def sessions(layout: Layout) -> list[str]:
    try:
        return os.listdir(layout.sessions)
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
            return self.uploads.resume(self.session)
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
            self.uploads.resume(self.session)
        with pytest.raises(BlobUploadBusy):
            Uploads(self.layout).resume(self.session)
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
                self.uploads.size(self.session)
            assert sessions(self.layout) == [self.other]
        else:
            size = self.uploads.size(self.session)
            assert (size, range_header(size)) == (len(self.model), f"0-{max(0, len(self.model) - 1)}")
        assert self.uploads.size(self.other) == len(b"untouched")

    def teardown(self) -> None:
        self.folder.cleanup()


UploadsMachine.TestCase.settings = settings(max_examples=examples(60), stateful_step_count=20, deadline=None)
TestUploads = UploadsMachine.TestCase


def test_a_session_is_one_file(uploads: Uploads, layout: Layout) -> None:
    session = start_upload(uploads, b"data")
    assert [path for path in layout.root.rglob("*") if path.is_file()] == [Path(layout.sessions) / session]
    assert os.listdir(layout.root) == ["uploads"]


def test_a_session_is_created_once(uploads: Uploads) -> None:
    session = start_upload(uploads, b"data")
    with pytest.raises(BlobUploadBusy):
        uploads.create(session)
    assert uploads.size(session) == 4


def test_hashes_while_appending(uploads: Uploads, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = uploads.create(new_id(), "sha512")
    for chunk in (b"one", b"two", b"three"):
        upload.append([chunk])
        uploads.suspend(upload)
        upload = uploads.resume(upload.session)
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
        uploads.resume(session)
    with pytest.raises(BlobUploadUnknown):
        uploads.size(session)


def test_resumes_the_session_of_a_killed_process(layout: Layout) -> None:
    code = (
        "import os, sys; from pathlib import Path; from dockerproxy.store.uploads import Uploads;"
        "from dockerproxy.store.layout import Layout; upload = Uploads(Layout(Path(sys.argv[1]))).create(sys.argv[2]);"
        "upload.append([b'before']); print(upload.session, flush=True); os.kill(os.getpid(), 9)"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, str(layout.root), new_id()], capture_output=True, text=True, check=False
    )
    session = process.stdout.strip()
    uploads = Uploads(layout)
    assert uploads.size(session) == 6
    upload = uploads.resume(session)
    upload.append([b" and after"])
    digest = Digest.of(b"before and after")
    assert upload.verify(digest)
    upload.commit(Blobs(layout, True), digest)
    assert sessions(layout) == []


def age(layout: Layout, *sessions: str, at: float = 1000) -> None:
    for session in sessions:
        os.utime(f"{layout.sessions}/{session}", (at, at))


def test_purge_removes_idle_sessions(uploads: Uploads, layout: Layout) -> None:
    old, fresh, busy = (start_upload(uploads, b"x") for _ in range(3))
    upload = uploads.resume(busy)
    age(layout, old, busy)
    (Path(layout.sessions) / "foreign").mkdir()
    assert uploads.purge(DAY, dry_run=True) == 1
    assert set(sessions(layout)) == {old, fresh, busy, "foreign"}
    assert uploads.purge(DAY) == 1
    assert set(sessions(layout)) == {fresh, busy, "foreign"}
    uploads.suspend(upload)
    assert uploads.purge(DAY) == 1
    assert set(sessions(layout)) == {fresh, "foreign"}


def test_a_session_that_is_no_file_is_left_alone(uploads: Uploads, layout: Layout, tmp_path: Path) -> None:
    start_upload(uploads)
    linked, directory = new_id(), new_id()
    (tmp_path / "precious").write_bytes(b"precious")
    os.symlink(tmp_path / "precious", f"{layout.sessions}/{linked}")
    os.mkdir(f"{layout.sessions}/{directory}")
    for session in (linked, directory):
        with pytest.raises((OSError, BlobUploadUnknown)):
            uploads.resume(session)
    assert (tmp_path / "precious").read_bytes() == b"precious"


def test_purge_removes_sessions_of_distribution(uploads: Uploads, layout: Layout) -> None:
    """Another registry that had the tree before may have left its own sessions, in the repositories' directories."""
    old, new = "01234567-89ab-cdef-0123-456789abcdef", "11234567-89ab-cdef-0123-456789abcdef"
    Links(layout, False).link_layer(NAME, Digest.of(b"a"))
    for session, at in ((old, 1000), (new, 2 * DAY)):
        folder = Path(layout.foreign_uploads(NAME)) / session
        folder.mkdir(parents=True)
        (folder / "data").write_bytes(b"theirs")
        for path in (folder / "data", folder):
            os.utime(path, (at, at))
    assert uploads.purge(DAY, dry_run=True) == 1
    assert uploads.purge(DAY) == 1
    assert os.listdir(layout.foreign_uploads(NAME)) == [new]
    assert uploads.purge(time.time() + 1) == 1
    assert os.listdir(layout.repository(NAME)) == ["_layers"]


# bounds


def bounded(layout: Layout, total: int, per_client: int, clock: Any = time.time) -> Uploads:
    return Uploads(layout, clock, limits=UploadLimits(total, per_client))


def test_one_client_has_a_share(layout: Layout) -> None:
    uploads = bounded(layout, 20, 3)
    for _ in range(3):
        start_upload(uploads, session=new_id("hog"))
    with pytest.raises(TooManyRequests, match=r"3 unfinished uploads.*MAX_UPLOADS_PER_CLIENT") as caught:
        start_upload(uploads, session=new_id("hog"))
    assert dict(caught.value.headers)["Retry-After"] == "60"
    start_upload(uploads, session=new_id("another"))
    # All processes count the same, also after a restart.
    with pytest.raises(TooManyRequests):
        start_upload(bounded(layout, 20, 3), session=new_id("hog"))
    report = uploads.report()
    assert (report["used"], report["limit"], report["share"], report["refused"]) == (4, 20, 3, 1)
    assert list(report["clients"].values()) == [3, 1]


def test_one_repository_has_half(layout: Layout) -> None:
    uploads = bounded(layout, 6, 6)
    for number in range(3):
        start_upload(uploads, session=new_id(f"client {number}"))
    with pytest.raises(TooManyRequests, match="repository has 3"):
        start_upload(uploads, session=new_id("client 4"))
    start_upload(uploads, session=new_id("client 4", "an/other"))


def test_there_is_a_bound_for_all(layout: Layout) -> None:
    uploads = bounded(layout, 4, 4)
    for number in range(4):
        start_upload(uploads, session=new_id(f"client {number}", f"repository/r{number}"))
    with pytest.raises(ServiceOverloaded, match=r"4 of the 4 unfinished uploads.*MAX_UPLOADS"):
        start_upload(uploads, session=new_id("client 5", "r5"))
    assert len(sessions(layout)) == 4


def test_uploads_that_were_given_up_make_room(layout: Layout) -> None:
    now = time.time()
    uploads = bounded(layout, 20, 2, lambda: now)
    given_up, running = (start_upload(uploads, session=new_id("hog")) for _ in range(2))
    age(layout, given_up, at=now - 601)
    age(layout, running, at=now - 599)
    third = start_upload(uploads, session=new_id("hog"))
    assert set(sessions(layout)) == {running, third}
    with pytest.raises(TooManyRequests):
        start_upload(uploads, session=new_id("hog"))


def test_the_number_of_saved_hashers_is_bounded(uploads: Uploads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads_module, "_MAX_HASHERS", 2)
    first, *rest = (start_upload(uploads, b"some") for _ in range(3))
    assert not uploads.resume(first).is_hashed("sha256")
    assert all(uploads.resume(session).is_hashed("sha256") for session in rest)
    assert uploads.resume(start_upload(uploads, b"x")).verify(Digest.of(b"x"))


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
    upload = uploads.create(new_id())
    upload.append([b"fits"])
    with pytest.raises(OSError) as caught:
        upload.append([bytes(512 * 1024)])
    assert caught.value.errno == errno.ENOSPC
    assert upload.size == uploads.size(upload.session) == 4
    upload.append([b" too"])
    assert upload.verify(Digest.of(b"fits too"))


def test_a_wrong_digest_is_not_committed(layout: Layout) -> None:
    store = HostedTree.from_layout(layout)
    upload = store.uploads.create(new_id())
    upload.append([b"content"])
    assert not upload.verify(Digest.of(b"another content"))
    with pytest.raises(DigestInvalid):
        store.blobs.put(b"content", Digest.of(b"another content"))
