from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dockerproxy.errors import DigestInvalid
from dockerproxy.oci.names import Digest
from dockerproxy.store import hashed_append_file
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.eviction import Entry
from dockerproxy.store.ingest import ForeignIngest, Ingest, ingests_of, remove_ingests_without_host, walk_ingests
from dockerproxy.store.layout import IngestKey, Layout
from dockerproxy.store.links import Links

CONTENT = bytes(range(256)) * 40
DIGEST = Digest.of(CONTENT)
HOST = "registry.example:5000"


def ingest_key(digest: Digest = DIGEST, host: str = HOST) -> IngestKey:
    return IngestKey(host, digest)


# Opens the ingest of the given digest, appends the given number of times, and waits until it is killed.
WRITER = """
import itertools, sys
from pathlib import Path
from dockerproxy.store.ingest import Ingest
from dockerproxy.store.layout import IngestKey, Layout
ingest = Ingest.open(Layout(Path(sys.argv[1])), IngestKey.parse(sys.argv[2]))
print(ingest is not None, flush=True)
ingest.rehash()
for _ in range(int(sys.argv[3])):
    ingest.append([bytes(range(256)) * 40])
    print(ingest.size, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path)


@pytest.fixture
def blobs(layout: Layout) -> Blobs:
    return Blobs(layout, False)


def open_ingest(layout: Layout, digest: Digest = DIGEST) -> Ingest:
    ingest = Ingest.open(layout, ingest_key(digest))
    assert ingest is not None
    return ingest


@contextmanager
def writer(layout: Layout, digest: Digest, times: int) -> Iterator[subprocess.Popen[str]]:
    """Run WRITER in a subprocess, and kill it at the end."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", WRITER, str(layout.root), str(ingest_key(digest)), str(times)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    with process:
        try:
            yield process
        finally:
            process.kill()


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_append_and_commit(layout: Layout, blobs: Blobs) -> None:
    ingest = open_ingest(layout)
    assert ingest.size == 0
    ingest.append([CONTENT[:10], b"", CONTENT[10:300]])
    assert not ingest.verify()
    trial = ingest.hasher_copy()
    trial.update(CONTENT[300:])
    assert trial.hexdigest() == DIGEST.hex
    ingest.append([CONTENT[300:]])
    assert (ingest.size, ingest.verify()) == (len(CONTENT), True)
    reader = ingest.reader()
    ingest.commit(blobs)
    ingest.release()
    assert os.pread(reader, 20_000, 0) == CONTENT
    os.close(reader)
    assert Path(layout.blob(DIGEST)).read_bytes() == CONTENT
    assert os.listdir(f"{layout.ingests}/{HOST}") == []


def test_an_unverified_ingest_is_not_committed(layout: Layout, blobs: Blobs) -> None:
    ingest = open_ingest(layout)
    ingest.append([CONTENT[:-1], b"!"])
    reader = ingest.reader()
    with pytest.raises(DigestInvalid):
        ingest.commit(blobs)
    assert not blobs.exists(DIGEST)
    ingest.discard()
    ingest.discard()
    assert os.pread(reader, 20_000, 0) == CONTENT[:-1] + b"!"
    os.close(reader)
    assert os.listdir(f"{layout.ingests}/{HOST}") == []


def test_commit_retains_a_blob_committed_concurrently(layout: Layout, blobs: Blobs) -> None:
    ingest = open_ingest(layout)
    ingest.append([CONTENT])
    blobs.put(CONTENT, DIGEST)
    inode = os.stat(layout.blob(DIGEST)).st_ino
    ingest.commit(blobs)
    assert os.stat(layout.blob(DIGEST)).st_ino == inode
    assert os.listdir(f"{layout.ingests}/{HOST}") == []


def test_resumes_a_released_ingest(layout: Layout, blobs: Blobs) -> None:
    first = open_ingest(layout)
    first.append([CONTENT[:1000]])
    first.release()
    second = open_ingest(layout)
    assert second.size == 1000
    for operation in (lambda: second.append([b"x"]), second.verify, second.hasher_copy, lambda: second.commit(blobs)):
        with pytest.raises(RuntimeError):
            operation()
    second.rehash()
    second.append([CONTENT[1000:]])
    second.commit(blobs)
    assert Path(layout.blob(DIGEST)).read_bytes() == CONTENT


def test_rehash_reads_the_file_in_chunks(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashed_append_file, "_CHUNK_SIZE", 1000)
    first = open_ingest(layout)
    first.append([CONTENT])
    first.release()
    second = open_ingest(layout)
    second.rehash()
    assert second.verify()
    second.release()


def test_the_lock_is_exclusive(layout: Layout) -> None:
    first = open_ingest(layout)
    assert Ingest.open(layout, ingest_key()) is None
    reader = first.reader()
    first.release()
    second = open_ingest(layout)  # although a reader of the first ingest is still open
    second.release()
    os.close(reader)
    open_ingest(layout, Digest.of(CONTENT, "sha512")).release()


def test_the_lock_is_exclusive_between_processes(layout: Layout) -> None:
    with writer(layout, DIGEST, 0) as process:
        assert read_line(process) == "True"
        assert Ingest.open(layout, ingest_key()) is None
        process.kill()
        process.wait()
        open_ingest(layout).release()


def open_foreign_ingest(layout: Layout) -> ForeignIngest:
    ingest = ForeignIngest.open(layout, ingest_key())
    assert ingest is not None
    return ingest


def test_a_foreign_ingest_is_readable_until_commit(layout: Layout, blobs: Blobs) -> None:
    assert ForeignIngest.open(layout, ingest_key()) is None
    ingest = open_ingest(layout)
    foreign = open_foreign_ingest(layout)
    assert (foreign.size, foreign.in_progress) == (0, True)
    ingest.append([CONTENT])
    assert foreign.size == len(CONTENT)
    assert foreign.try_take_over() is None
    ingest.commit(blobs)
    assert not foreign.in_progress
    assert foreign.try_take_over() is None
    assert os.pread(foreign._fd, len(CONTENT), 0) == CONTENT
    foreign.close()


def test_a_discarded_ingest_cannot_be_taken_over(layout: Layout) -> None:
    ingest = open_ingest(layout)
    foreign = open_foreign_ingest(layout)
    ingest.discard()
    assert not foreign.in_progress
    assert foreign.try_take_over() is None
    open_ingest(layout).discard()
    foreign.close()


def test_takes_over_from_a_dead_writer(layout: Layout, blobs: Blobs) -> None:
    with writer(layout, DIGEST, 1) as process:
        assert read_line(process) == "True"
        size = int(read_line(process))
        foreign = open_foreign_ingest(layout)
        assert foreign.try_take_over() is None
        process.kill()
        process.wait()
    ingest = foreign.try_take_over()
    assert ingest is not None
    assert ingest.size == foreign.size >= size
    assert Ingest.open(layout, ingest_key()) is None
    ingest.rehash()
    ingest.append([CONTENT[ingest.size :]])
    ingest.commit(blobs)
    assert Path(layout.blob(DIGEST)).read_bytes() == CONTENT


def test_a_process_killed_during_append_leaves_a_prefix(layout: Layout, blobs: Blobs) -> None:
    whole = CONTENT * 400
    digest = Digest.of(whole)
    with writer(layout, digest, 400) as process:
        assert read_line(process) == "True"
        size = int([read_line(process) for _ in range(5)][-1])
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    ingest = open_ingest(layout, digest)
    assert size <= ingest.size <= len(whole)
    assert Path(layout.ingest(ingest_key(digest))).read_bytes() == whole[: ingest.size]
    ingest.rehash()
    ingest.append([whole[ingest.size :]])
    ingest.commit(blobs)
    assert Path(layout.blob(digest)).read_bytes() == whole


@pytest.mark.parametrize("end", ["commit", "discard", "discard and recreate"])
def test_a_file_renamed_before_the_lock_is_not_acquired(
    layout: Layout, blobs: Blobs, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    first = open_ingest(layout)
    first.append([CONTENT])
    finished: list[Ingest] = []
    real = fcntl.flock

    def flock(fd: int, operation: int) -> None:
        if operation == fcntl.LOCK_EX | fcntl.LOCK_NB and not finished:
            finished.append(first)
            first.commit(blobs) if end == "commit" else first.discard()
            if end.endswith("recreate"):
                Path(layout.ingest(ingest_key())).write_bytes(b"another's")
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    second = open_ingest(layout)
    assert finished
    assert second.size == (len(b"another's") if end.endswith("recreate") else 0)
    reader = second.reader()
    assert os.path.samestat(os.fstat(reader), os.stat(layout.ingest(ingest_key())))
    os.close(reader)
    second.discard()
    assert blobs.exists(DIGEST) == (end == "commit")
    if end == "commit":
        assert Path(layout.blob(DIGEST)).read_bytes() == CONTENT


def test_no_descriptor_is_left_open(layout: Layout, blobs: Blobs) -> None:
    before = os.listdir("/proc/self/fd")
    ingest = open_ingest(layout)
    assert Ingest.open(layout, ingest_key()) is None
    ingest.append([CONTENT])
    ingest.commit(blobs)
    open_ingest(layout).discard()
    open_ingest(layout).release()
    assert os.listdir("/proc/self/fd") == before


def test_walk_yields_all_ingests(layout: Layout) -> None:
    assert list(walk_ingests(layout)) == []
    keys = [ingest_key(Digest.of(b"1")), ingest_key(Digest.of(b"2")), ingest_key(Digest.of(b"1"), "other.example")]
    for number, key in enumerate(keys):
        ingest = Ingest.open(layout, key)
        assert ingest is not None
        ingest.append([b"x" * number])
        ingest.release()
        os.utime(layout.ingest(key), (number, number))
    (Path(layout.ingests) / "README").write_text("?")
    (Path(layout.ingests) / HOST / "sha256-12").write_text("?")
    (Path(layout.ingests) / ".hidden").mkdir()
    (Path(layout.ingests) / ".hidden" / f"sha256-{DIGEST.hex}").write_text("?")
    entries = sorted(walk_ingests(layout), key=lambda entry: entry.size)
    assert entries == [Entry(key, number, number) for number, key in enumerate(keys)]
    assert set(ingests_of(layout, Digest.of(b"1"))) == {keys[0], keys[2]}
    assert ingests_of(layout, DIGEST) == []


def test_registries_have_separate_ingests(layout: Layout) -> None:
    first, second = open_ingest(layout), Ingest.open(layout, ingest_key(host="other.example"))
    assert second is not None
    first.append([CONTENT[:10]])
    assert os.path.getsize(layout.ingest(second.key)) == 0
    first.discard()
    assert os.path.exists(layout.ingest(second.key))
    second.release()


def test_ingests_of_earlier_versions_are_removed(layout: Layout) -> None:
    """Their names had no host, so it is unknown which registry sent them."""
    open_ingest(layout).release()
    old = Path(layout.ingests) / f"sha256-{DIGEST.hex}"
    old.write_bytes(CONTENT)
    other = Path(layout.ingests) / "unrelated-file"
    other.write_text("x")
    remove_ingests_without_host(layout)
    assert not old.exists() and other.exists() and os.path.exists(layout.ingest(ingest_key()))


def test_only_the_committed_file_was_committed(layout: Layout, blobs: Blobs) -> None:
    """A blob of another registry does not make a discarded file a committed one."""
    ingest = open_ingest(layout)
    foreign = open_foreign_ingest(layout)
    ingest.append([b"wrong"])
    blobs.put(CONTENT, DIGEST)
    assert not foreign.was_committed(layout)
    ingest.discard()
    assert not foreign.was_committed(layout)
    foreign.close()
    blobs.remove(DIGEST)
    ingest = open_ingest(layout)
    foreign = open_foreign_ingest(layout)
    ingest.append([CONTENT])
    ingest.commit(blobs)
    assert foreign.was_committed(layout)
    foreign.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mount.stderr.strip()}")
    try:
        yield tmp_path
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_full_disk_loses_nothing(small_disk: Path) -> None:
    layout = Layout(small_disk)
    blobs = Blobs(layout, True)
    blobs.put(b"e" * 60_000, evicted := Digest.of(b"e" * 60_000))
    whole = CONTENT * 20
    digest = Digest.of(whole)
    ingest = open_ingest(layout, digest)
    ingest.append([whole[:100_000]])
    reader = ingest.reader()
    with pytest.raises(OSError) as caught:
        ingest.append([whole[100_000:150_000], whole[150_000:], b"x" * 200_000])
    assert caught.value.errno == errno.ENOSPC
    assert ingest.size == os.fstat(reader).st_size == 100_000
    assert os.pread(reader, 1_000_000, 0) == whole[:100_000]
    with pytest.raises(OSError):
        blobs.put(b"p" * 200_000, Digest.of(b"p" * 200_000))
    assert not blobs.exists(Digest.of(b"p" * 200_000))
    assert os.listdir(layout.staging) == []
    filler = small_disk / "filler"
    with pytest.raises(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(b"f" * 4096)
    # Even if the disk is full to the last byte, blobs can be evicted.
    with pytest.raises(OSError):
        Links(layout, True).link_layer("a", digest)
    assert blobs.remove(evicted)
    filler.unlink()
    ingest.append([whole[100_000:]])
    ingest.commit(blobs)
    assert Path(layout.blob(digest)).read_bytes() == whole
    os.close(reader)
