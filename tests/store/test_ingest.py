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
from dockerproxy.store import growing
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.ingest import Followed, Ingest, stale_ingests
from dockerproxy.store.layout import Layout
from dockerproxy.store.links import Links

CONTENT = bytes(range(256)) * 40
DIGEST = Digest.of(CONTENT)

# Takes the ingest of the digest given, appends as often as it is told, and stays until it is killed.
WRITER = """
import itertools, sys
from pathlib import Path
from dockerproxy.oci.names import Digest
from dockerproxy.store.ingest import Ingest
from dockerproxy.store.layout import Layout
ingest = Ingest.open(Layout(Path(sys.argv[1])), Digest.parse(sys.argv[2]))
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


def opened(layout: Layout, digest: Digest = DIGEST) -> Ingest:
    ingest = Ingest.open(layout, digest)
    assert ingest is not None
    return ingest


@contextmanager
def writer(layout: Layout, digest: Digest, times: int) -> Iterator[subprocess.Popen[str]]:
    """Run WRITER in a process of its own, killed at the end."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", WRITER, str(layout.root), str(digest), str(times)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    with process:
        try:
            yield process
        finally:
            process.kill()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_bytes_become_a_blob(layout: Layout, blobs: Blobs) -> None:
    ingest = opened(layout)
    assert ingest.size == 0
    ingest.append([CONTENT[:10], b"", CONTENT[10:300]])
    assert not ingest.verify()
    trial = ingest.hasher_copy()
    trial.update(CONTENT[300:])
    assert trial.hexdigest() == DIGEST.hex
    ingest.append([CONTENT[300:]])
    assert (ingest.size, ingest.verify()) == (len(CONTENT), True)
    reader = ingest.reader()
    ingest.publish(blobs)
    ingest.release()
    assert os.pread(reader, 20_000, 0) == CONTENT
    os.close(reader)
    assert Path(layout.blob(DIGEST)).read_bytes() == CONTENT
    assert os.listdir(layout.ingests) == []


def test_what_does_not_verify_is_not_published(layout: Layout, blobs: Blobs) -> None:
    ingest = opened(layout)
    ingest.append([CONTENT[:-1], b"!"])
    reader = ingest.reader()
    with pytest.raises(DigestInvalid):
        ingest.publish(blobs)
    assert not blobs.exists(DIGEST)
    ingest.discard()
    ingest.discard()
    assert os.pread(reader, 20_000, 0) == CONTENT[:-1] + b"!"
    os.close(reader)
    assert os.listdir(layout.ingests) == []


def test_a_blob_published_by_another_in_between_is_kept(layout: Layout, blobs: Blobs) -> None:
    ingest = opened(layout)
    ingest.append([CONTENT])
    blobs.put(CONTENT, DIGEST)
    inode = os.stat(layout.blob(DIGEST)).st_ino
    ingest.publish(blobs)
    assert os.stat(layout.blob(DIGEST)).st_ino == inode
    assert os.listdir(layout.ingests) == []


def test_resumes_what_an_earlier_run_left(layout: Layout, blobs: Blobs) -> None:
    first = opened(layout)
    first.append([CONTENT[:1000]])
    first.release()
    second = opened(layout)
    assert second.size == 1000
    for unprimed in (lambda: second.append([b"x"]), second.verify, second.hasher_copy, lambda: second.publish(blobs)):
        with pytest.raises(RuntimeError):
            unprimed()
    second.rehash()
    second.append([CONTENT[1000:]])
    second.publish(blobs)
    assert Path(layout.blob(DIGEST)).read_bytes() == CONTENT


def test_rehashes_pieces_larger_than_its_buffer(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing, "_PIECE", 1000)
    first = opened(layout)
    first.append([CONTENT])
    first.release()
    second = opened(layout)
    second.rehash()
    assert second.verify()
    second.release()


def test_only_one_holds_it(layout: Layout) -> None:
    first = opened(layout)
    assert Ingest.open(layout, DIGEST) is None
    reader = first.reader()
    first.release()
    second = opened(layout)  # although a reader of the first one is still there
    second.release()
    os.close(reader)
    opened(layout, Digest.of(CONTENT, "sha512")).release()


def test_only_one_process_holds_it(layout: Layout) -> None:
    with writer(layout, DIGEST, 0) as process:
        assert line(process) == "True"
        assert Ingest.open(layout, DIGEST) is None
        process.kill()
        process.wait()
        opened(layout).release()


def followed(layout: Layout) -> Followed:
    followed = Followed.open(layout, DIGEST)
    assert followed is not None
    return followed


def test_it_is_followed_and_published(layout: Layout, blobs: Blobs) -> None:
    assert Followed.open(layout, DIGEST) is None
    ingest = opened(layout)
    other = followed(layout)
    assert (other.size, other.is_present) == (0, True)
    ingest.append([CONTENT])
    assert other.size == len(CONTENT)
    assert other.taken_over() is None
    ingest.publish(blobs)
    assert not other.is_present
    assert other.taken_over() is None
    assert os.pread(other.fd, len(CONTENT), 0) == CONTENT
    other.close()


def test_what_is_given_up_is_not_taken_over(layout: Layout) -> None:
    ingest = opened(layout)
    other = followed(layout)
    ingest.discard()
    assert not other.is_present
    assert other.taken_over() is None
    opened(layout).discard()
    other.close()


def test_a_writer_that_dies_is_followed_by_another(layout: Layout, blobs: Blobs) -> None:
    with writer(layout, DIGEST, 1) as process:
        assert line(process) == "True"
        told = int(line(process))
        other = followed(layout)
        assert other.taken_over() is None
        process.kill()
        process.wait()
    ingest = other.taken_over()
    assert ingest is not None
    assert ingest.size == other.size >= told
    assert Ingest.open(layout, DIGEST) is None
    ingest.rehash()
    ingest.append([CONTENT[ingest.size :]])
    ingest.publish(blobs)
    assert Path(layout.blob(DIGEST)).read_bytes() == CONTENT


def test_a_process_killed_while_it_appends_leaves_a_beginning(layout: Layout, blobs: Blobs) -> None:
    whole = CONTENT * 400
    digest = Digest.of(whole)
    with writer(layout, digest, 400) as process:
        assert line(process) == "True"
        told = int([line(process) for _ in range(5)][-1])
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    ingest = opened(layout, digest)
    assert told <= ingest.size <= len(whole)
    assert Path(layout.ingest(digest)).read_bytes() == whole[: ingest.size]
    ingest.rehash()
    ingest.append([whole[ingest.size :]])
    ingest.publish(blobs)
    assert Path(layout.blob(digest)).read_bytes() == whole


@pytest.mark.parametrize("end", ["publish", "discard", "discard and again"])
def test_a_file_that_is_renamed_before_the_lock_is_not_taken(
    layout: Layout, blobs: Blobs, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    first = opened(layout)
    first.append([CONTENT])
    later: list[Ingest] = []
    real = fcntl.flock

    def flock(fd: int, operation: int) -> None:
        if operation == fcntl.LOCK_EX | fcntl.LOCK_NB and not later:
            later.append(first)
            first.publish(blobs) if end == "publish" else first.discard()
            if end.endswith("again"):
                Path(layout.ingest(DIGEST)).write_bytes(b"another's")
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    second = opened(layout)
    assert later
    assert second.size == (len(b"another's") if end.endswith("again") else 0)
    reader = second.reader()
    assert os.path.samestat(os.fstat(reader), os.stat(layout.ingest(DIGEST)))
    os.close(reader)
    second.discard()
    assert blobs.exists(DIGEST) == (end == "publish")
    if end == "publish":
        assert Path(layout.blob(DIGEST)).read_bytes() == CONTENT


def test_no_descriptor_is_left_open(layout: Layout, blobs: Blobs) -> None:
    before = os.listdir("/proc/self/fd")
    held = opened(layout)
    assert Ingest.open(layout, DIGEST) is None
    held.append([CONTENT])
    held.publish(blobs)
    opened(layout).discard()
    opened(layout).release()
    assert os.listdir("/proc/self/fd") == before


def test_finds_the_stale_ones(layout: Layout) -> None:
    assert stale_ingests(layout, 1e12) == []
    for content, written in ((b"1", 100), (b"2", 200)):
        ingest = opened(layout, Digest.of(content))
        ingest.append([b"x"])
        ingest.release()
        os.utime(layout.ingest(Digest.of(content)), (written, written))
    (Path(layout.ingests) / "README").write_text("?")
    (Path(layout.ingests) / "sha256-12").write_text("?")
    assert stale_ingests(layout, 200) == [Digest.of(b"1")]
    assert set(stale_ingests(layout, 1e12)) == {Digest.of(b"1"), Digest.of(b"2")}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield tmp_path
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_full_disk_takes_nothing_and_loses_nothing(small_disk: Path) -> None:
    layout = Layout(small_disk)
    blobs = Blobs(layout, True)
    blobs.put(b"e" * 60_000, evicted := Digest.of(b"e" * 60_000))
    whole = CONTENT * 20
    digest = Digest.of(whole)
    ingest = opened(layout, digest)
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
    # To the last byte: what is there can still be evicted.
    with pytest.raises(OSError):
        Links(layout, True).link_layer("a", digest)
    assert blobs.remove(evicted)
    filler.unlink()
    ingest.append([whole[100_000:]])
    ingest.publish(blobs)
    assert Path(layout.blob(digest)).read_bytes() == whole
    os.close(reader)
