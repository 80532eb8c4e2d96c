"""The numbers over time: ring files that survive restarts, clocks that jump, full disks, and whatever is in them."""

from __future__ import annotations

import errno
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.logger import LogEvent, formatEvent, globalLogPublisher

from dockerproxy.daemon.history import ALL, RANGES, History, Numbers, _decode_count, _encode_count
from dockerproxy.daemon.metrics import BUCKETS, Metrics
from dockerproxy.daemon.rings import VALUES, RingFile

NOW = 1_800_000_000.0
HUB = "docker.io"


class World:
    """A history in `folder`, whose clock the test sets. `restart` makes a new one with counters that begin at 0."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "history"
        self.now = NOW
        self.restart()

    def restart(self) -> None:
        self.metrics = Metrics.make(1, [HUB, "quay.io"]).for_process(0)
        self.history = History(str(self.folder), self.metrics, lambda: self.now)

    def serve(self, size: int, *, downloaded: int = 0, registry: str = HUB, seconds: float = 0.0) -> None:
        """Serve a blob of `size` bytes, of which so many are downloaded. `seconds` later the counters are sampled."""
        self.metrics.count_request(registry, "blob", "HIT", 200, size, 0.001)
        if downloaded:
            self.metrics.count_received(registry, downloaded)
        self.now += seconds
        self.history.sample()

    def ring(self, name: str = "5min") -> Path:
        return self.folder / f"{name}.ring"


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def log_lines() -> Iterator[list[str]]:
    lines: list[str] = []

    def observe(event: LogEvent) -> None:
        lines.append(str(formatEvent(event)))

    globalLogPublisher.addObserver(observe)
    yield lines
    globalLogPublisher.removeObserver(observe)


def served(world: World, range_name: str = "24h", registry: str = ALL) -> int:
    return sum(numbers.served for numbers in world.history.series(range_name, registry).bins)


@pytest.mark.parametrize("range_name", list(RANGES))
def test_every_range_has_what_was_served(world: World, range_name: str) -> None:
    world.serve(1000, downloaded=400)
    world.serve(500)
    series = world.history.series(range_name)
    assert len(series.bins) * series.step == RANGES[range_name].seconds
    assert series.start + len(series.bins) * series.step > world.now
    assert series.bins[-1].served == 1500
    assert series.bins[-1].downloaded == 400
    assert series.bins[-1].requests == 2
    assert served(world, range_name, HUB) == 1500
    assert served(world, range_name, "quay.io") == 0


def test_the_numbers_are_in_the_bin_of_their_time(world: World) -> None:
    for size in (1, 2, 4):
        world.serve(size)
        world.now += 300
    sizes = [numbers.served for numbers in world.history.series("24h").bins]
    assert sizes[-4:] == [1, 2, 4, 0]
    assert not any(sizes[:-4])


def test_a_restart_continues_the_row_in_progress(world: World) -> None:
    world.serve(1000)
    world.restart()
    world.serve(10)
    assert world.history.series("24h").bins[-1].served == 1010
    total, since = world.history.total()
    assert total.served == 1010
    assert since is not None and NOW - 3600 < since <= NOW


def test_an_idle_daemon_writes_nothing(world: World) -> None:
    world.serve(1)
    before = world.ring().stat().st_mtime_ns
    for _ in range(10):
        world.now += 10
        world.history.sample()
    assert world.ring().stat().st_mtime_ns == before


def test_pages_of_our_own_do_not_count(world: World) -> None:
    world.serve(1000, registry="own")
    assert served(world) == 0
    assert not world.folder.exists()


def test_the_oldest_numbers_are_overwritten(world: World) -> None:
    world.serve(7)
    first = world.now
    world.now += 6 * 3600  # the 10 s ring has come round: the same row
    world.serve(1)
    assert served(world, "6h") == 1
    assert served(world) == 8
    world.now = first + 2 * 365 * 86400
    world.now += 20  # sums are kept for some seconds
    world.serve(2)
    assert world.history.total()[0].served == 3  # the hour of the 7 bytes was overwritten


@pytest.mark.parametrize("jump", [-3 * 365 * 86400, -86400, -7, 86400, 50 * 365 * 86400])
def test_a_clock_that_jumps_does_no_harm(world: World, jump: float) -> None:
    world.serve(100)
    world.now += jump
    world.serve(10)
    for range_name in RANGES:
        assert served(world, range_name) >= 10
    world.now -= jump
    world.serve(1)
    assert served(world) >= 101
    world.history.total()


@given(st.lists(st.tuples(st.integers(-(10**9), 4 * 10**9), st.integers(0, 2**40)), max_size=8))
def test_no_clock_and_no_number_raises(tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, int]]) -> None:
    world = World(tmp_path_factory.mktemp("jumps"))
    for now, size in steps:
        world.now = now
        world.serve(size)
        for range_name in RANGES:
            world.history.series(range_name)
        world.history.total()


def header(version: int = 1, step: int = 300, rows: int = 4032) -> bytes:
    return struct.pack("<8sIIII40x", b"drp-ring", version, step, rows, 8)


SIZE = 64 + 64 * 4032
BROKEN = {
    "torn head": b"drp-ri",
    "zeros after a power cut": b"\0" * SIZE,
    "text": b"hello\n" * 100,
    "cut off": header() + b"\0" * 640,
    "head only": header(),
    "too long": header() + b"\0" * (SIZE + 64),
    "newer version": header(version=2) + b"\0" * (SIZE - 64),
    "other step": header(step=60) + b"\0" * (SIZE - 64),
}


@pytest.mark.parametrize("name", list(BROKEN))
def test_an_unusable_file_is_set_aside_with_a_line(world: World, log_lines: list[str], name: str) -> None:
    world.folder.mkdir()
    world.ring().write_bytes(BROKEN[name])
    world.serve(100)
    assert served(world) == 100
    assert Path(f"{world.ring()}.set-aside").read_bytes() == BROKEN[name]
    [line] = [line for line in log_lines if "set-aside" in line]
    assert str(world.ring()) in line
    if name == "newer version":
        assert "version 2" in line and "version 1" in line


def test_an_unusable_file_is_set_aside_when_it_is_read(world: World) -> None:
    world.folder.mkdir()
    world.ring().write_bytes(b"hello")
    assert served(world) == 0
    assert Path(f"{world.ring()}.set-aside").exists()


@pytest.mark.parametrize("kind", ["link", "dangling", "fifo", "directory"])
def test_what_is_no_regular_file_is_not_opened(world: World, tmp_path: Path, kind: str) -> None:
    world.folder.mkdir()
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    match kind:
        case "link":
            world.ring().symlink_to(victim)
        case "dangling":
            world.ring().symlink_to(tmp_path / "nowhere")
        case "fifo":
            os.mkfifo(world.ring())
        case "directory":
            world.ring().mkdir()
    world.serve(100)
    assert victim.read_bytes() == b"mine"
    assert not (tmp_path / "nowhere").exists()
    assert served(world) == 100


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT])
def test_a_full_disk_costs_one_line(
    world: World, log_lines: list[str], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(*_: Any) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail)
        for _ in range(20):
            world.serve(1, seconds=10)
            world.history.series("1h")
        assert len(log_lines) == 1 and "cannot write" in log_lines[0]
    assert not [name for name in os.listdir(world.folder) if name.endswith(".set-aside")]
    world.serve(1)
    assert served(world, "24h") >= 1  # the row in progress is written with all that it lacks
    assert world.history.series("24h").bins[-1].requests >= 1


def test_a_directory_that_cannot_be_made_costs_one_line(world: World, log_lines: list[str]) -> None:
    world.folder.write_bytes(b"a file")
    world.serve(1)
    world.serve(1)
    assert len([line for line in log_lines if "cannot write" in line]) == 1
    assert served(world) == 0


@given(content=st.binary(max_size=64 * 40), offset=st.integers(0, 64 * 40))
def test_any_rows_are_read(tmp_path_factory: pytest.TempPathFactory, content: bytes, offset: int) -> None:
    world = World(tmp_path_factory.mktemp("rows"))
    world.serve(1)
    with world.ring().open("r+b") as file:
        file.seek(64 + offset)
        file.write(content)
    size = 64 + 64 * 4032
    os.truncate(world.ring(), size)
    for range_name in RANGES:
        world.history.series(range_name)


def test_only_the_user_of_the_daemon_reads_the_files(world: World) -> None:
    world.serve(1)
    for path in (world.folder, *world.folder.iterdir()):
        assert path.stat().st_mode & 0o077 == 0


def test_files_have_a_fixed_size_and_few_blocks(world: World) -> None:
    world.serve(1)
    names = {path.name for path in world.folder.iterdir()}
    assert names == {"10s.ring", "5min.ring", "1h.ring", "docker.io.5min.ring", "docker.io.1h.ring"}
    assert sum(path.stat().st_size for path in world.folder.iterdir() if path.name.count(".") == 1) < 1.6e6


@given(st.integers(0, 2**60))
def test_counts_in_eight_bits_are_near(count: int) -> None:
    code = _encode_count(count)
    assert 0 <= code <= 255
    if count < 15 << 30:
        assert abs(_decode_count(code) - count) <= count / 16


@given(st.lists(st.integers(0, 10**6), min_size=len(BUCKETS) + 1, max_size=len(BUCKETS) + 1), st.integers(0, 2**64 - 1))
def test_numbers_are_restored_from_a_row(latencies: list[int], size: int) -> None:
    numbers = Numbers(3, size, 5, 7, 11, latencies)
    restored = Numbers.from_row(numbers.row())
    assert len(numbers.row()) == VALUES
    assert (restored.requests, restored.served, restored.downloaded) == (3, size, 5)
    assert (restored.errors, restored.stale) == (7, 11)
    for part in (0.5, 0.95):
        exact, near = numbers.percentile(part), restored.percentile(part)
        assert (exact is None) == (near is None)


def test_percentiles_lie_in_the_bucket_of_their_request(world: World) -> None:
    for seconds in [0.02] * 90 + [3.0] * 10:
        world.metrics.count_upstream(HUB, "blob", "GET", 200, seconds)
    world.history.sample()
    numbers = world.history.summaries("24h")[HUB].numbers
    assert 0.01 <= (numbers.percentile(0.5) or 0) <= 0.025
    assert 2.5 <= (numbers.percentile(0.95) or 0) <= 5.0
    assert Numbers().percentile(0.5) is None


def test_failures_and_server_errors_are_errors(world: World) -> None:
    world.metrics.count_failure(HUB, "timeout")
    world.metrics.count_upstream(HUB, "blob", "GET", 503, 0.1)
    world.metrics.count_upstream(HUB, "blob", "GET", 404, 0.1)
    world.metrics.count_request("hosted", "blob", "-", 507, 0, 0.1)
    world.history.sample()
    summaries = world.history.summaries("24h")
    assert summaries[HUB].numbers.errors == 2
    assert summaries["hosted"].numbers.errors == 1


def test_a_registry_with_a_strange_name_has_files_of_its_own(tmp_path: Path) -> None:
    metrics = Metrics.make(1, ["[2001:db8::1]:5000", "localhost:5000"]).for_process(0)
    history = History(str(tmp_path), metrics, lambda: NOW)
    for name in ("[2001:db8::1]:5000", "localhost:5000"):
        metrics.count_request(name, "blob", "HIT", 200, 5, 0.1)
    history.sample()
    assert sum(numbers.served for numbers in history.series("7d", "localhost:5000").bins) == 5
    assert all(path.parent == tmp_path for path in tmp_path.rglob("*"))


def test_a_ring_keeps_rows_across_its_end(tmp_path: Path) -> None:
    ring = RingFile(str(tmp_path / "r"), 10, 5)
    for period in range(3, 12):
        ring.write(period, [period] * VALUES)
    assert [period for period, _ in ring.read(0, 100)] == []
    assert [(period, values[0]) for period, values in ring.read(6, 11)] == [(n, n) for n in range(7, 12)]
    assert [period for period, _ in ring.read(9, 10)] == [9, 10]


@pytest.mark.slow
def test_a_full_history_is_read_fast(tmp_path: Path) -> None:
    """Two years of 20 registries: what the overview needs of them takes less than the seconds for which it is kept."""
    names = [f"registry{number}.example" for number in range(20)]
    metrics = Metrics.make(1, names).for_process(0)
    history = History(str(tmp_path), metrics, lambda: NOW)
    row = Numbers(10, 1000, 100, 1, 1, [5] * (len(BUCKETS) + 1)).row()
    for name, step, rows in (("5min", 300, 4032), ("1h", 3600, 17520)):
        last = int(NOW // step)
        ring = RingFile(str(tmp_path / f"{name}.ring"), step, rows)
        ring.write(last, row)
        periods = sorted(range(last - rows + 1, last + 1), key=lambda period: period % rows)
        with open(ring.path, "r+b") as file:
            file.seek(64)
            file.write(b"".join(struct.pack(f"<{1 + VALUES}Q", period, *row) for period in periods))
        for registry in names:
            os.link(ring.path, tmp_path / f"{registry}.{name}.ring")
    started = time.process_time()
    assert history.total()[0].served == 17520 * 1000
    assert history.summaries("24h")["registry7.example"].numbers.served == 288 * 1000
    assert history.summaries("1y")["registry7.example"].numbers.served >= 364 * 24 * 1000
    assert sum(history.summaries("24h")[ALL].bars) == 288 * 1000
    assert time.process_time() - started < 10  # usually 0.5
    started = time.process_time()
    for _ in range(100):
        history.summaries("1y"), history.summaries("24h"), history.total()
    assert time.process_time() - started < 0.5
