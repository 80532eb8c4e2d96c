"""The file by which the daemons of several machines notice each other in a shared directory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from attrs import define, field

from dockerproxy.store.directory_owner import (
    OWNER_FILE,
    OWNER_SIZE,
    DirectoryInUse,
    DirectoryOwner,
    OwnerRecord,
    OwnerService,
    SharedPlace,
)
from dockerproxy.store.tree_reader import UnsafeFile

REMEDY = "set REGISTRY_STORE"


@define
class Network:
    """A shared directory, and the time that passes while a daemon waits. `events` happen at its seconds."""

    root: Path
    seconds: float = 0.0
    events: dict[float, Callable[[], object]] = field(factory=dict)
    delay: float = 0.0

    @property
    def shared(self) -> Path:
        return self.root / "shared"

    def machine(self, name: str | None = None) -> DirectoryOwner:
        """Return a daemon, with the local disk of the machine `name`, if that has one."""
        place = SharedPlace("REGISTRY_DIR", str(self.shared), "nfs4", REMEDY)
        if name is None:
            return DirectoryOwner(place, None)
        (self.root / name).mkdir(exist_ok=True)
        return DirectoryOwner(place, f"{self.root}/{name}/witness")

    def claim(self, owner: DirectoryOwner) -> float:
        """Claim the directory, and return the seconds that it took."""
        started = self.seconds
        owner.claim(self.sleep, lambda: self.seconds)
        return self.seconds - started

    def sleep(self, seconds: float) -> None:
        end = self.seconds + seconds + self.delay
        for moment in sorted(one for one in self.events if self.seconds < one <= end):
            self.events.pop(moment)()
        self.seconds = end

    def record(self) -> OwnerRecord | None:
        return OwnerRecord.parse((self.shared / OWNER_FILE).read_bytes()[:OWNER_SIZE])


@pytest.fixture
def network(tmp_path: Path) -> Network:
    (tmp_path / "shared").mkdir()
    return Network(tmp_path)


def test_the_first_daemon_does_not_wait(network: Network) -> None:
    owner = network.machine("a")
    assert network.claim(owner) == 0
    for _ in range(3):
        owner.beat()
    record = network.record()
    assert record is not None and (record.beat, record.pid) == (4, os.getpid())
    assert (network.shared / OWNER_FILE).stat().st_size == OWNER_SIZE


def test_a_second_machine_is_refused_with_the_reason(network: Network) -> None:
    first, second = network.machine("a"), network.machine("b")
    network.claim(first)
    for number in range(10):
        network.events[3.0 * number] = first.beat
    with pytest.raises(DirectoryInUse) as raised:
        network.claim(second)
    text = str(raised.value)
    assert text.startswith(f"REGISTRY_DIR is {network.shared}, which is on nfs4 and in use by the daemon on ")
    assert f"(process ID {os.getpid()})" in text and text.endswith(REMEDY)
    assert network.seconds <= 4
    first.beat()  # it has noticed nothing


def test_a_daemon_that_stopped_leaves_the_directory_at_once(network: Network) -> None:
    first = network.machine("a")
    network.claim(first)
    first.release()
    assert network.claim(network.machine("b")) == 0
    first.release()  # which is not its own any more
    assert (network.shared / OWNER_FILE).exists()


def test_a_daemon_that_stops_meanwhile(network: Network) -> None:
    first = network.machine("a")
    network.claim(first)
    network.events[2.5] = first.release
    assert network.claim(network.machine("b")) == 3


def test_after_a_crash_or_a_reboot_the_same_machine_does_not_wait(network: Network) -> None:
    network.claim(network.machine("a"))
    assert network.claim(network.machine("a")) == 0


def test_after_a_crash_another_machine_waits_until_the_owner_is_surely_dead(network: Network) -> None:
    network.claim(network.machine("a"))
    assert 10 <= network.claim(network.machine("b")) <= 20
    # The first machine comes back, and knows that the file is not its own.
    first = network.machine("a")
    network.events[network.seconds + 2.0] = lambda: (network.shared / OWNER_FILE).write_bytes(b"y" * OWNER_SIZE)
    with pytest.raises(DirectoryInUse):
        network.claim(first)


def test_without_a_local_disk_a_daemon_waits_for_its_own_file_too(network: Network) -> None:
    network.claim(network.machine())
    assert network.claim(network.machine()) >= 10


def test_a_slow_file_system_does_not_make_an_owner_dead(network: Network) -> None:
    """It may have kept the owner from writing."""
    first, second = network.machine("a"), network.machine("b")
    network.claim(first)
    network.delay = 10.0
    network.events[150.0] = first.beat
    with pytest.raises(DirectoryInUse):
        network.claim(second)
    network.events[network.seconds + 400.0] = lambda: setattr(network, "delay", 0.0)
    assert network.claim(second) >= 400


def test_a_file_system_that_stays_slow_ends_the_start(network: Network) -> None:
    network.claim(network.machine("a"))
    network.delay = 10.0
    with pytest.raises(TimeoutError, match="nfs4 is too slow"):
        network.claim(network.machine("b"))


def test_clocks_that_differ_do_not_matter(network: Network) -> None:
    first, second = network.machine("a"), network.machine("b")
    network.claim(first)
    for date in (0, 1 << 33):  # 1970, 2242
        os.utime(network.shared / OWNER_FILE, (date, date))
        network.events[network.seconds + 1.5] = first.beat
        with pytest.raises(DirectoryInUse):
            network.claim(second)


def test_a_machine_that_stood_still_stops(network: Network) -> None:
    """A virtual machine was paused, and another one took over."""
    first, second = network.machine("a"), network.machine("b")
    network.claim(first)
    network.claim(second)
    with pytest.raises(DirectoryInUse, match="in use by the daemon on"):
        first.beat()
    second.beat()
    first.release()
    second.beat()
    assert network.record() is not None


def test_two_that_take_over_at_once_do_not_both_stay(network: Network) -> None:
    network.claim(network.machine("gone"))
    first, second = network.machine("a"), network.machine("b")
    lost = []
    for owner in (first, second):  # both have seen the same
        (network.shared / OWNER_FILE).unlink()
        assert owner._create()
    for owner in (first, second, first, second):
        try:
            owner.beat()
        except DirectoryInUse:
            lost.append(owner)
    assert len(set(map(id, lost))) == 1


@pytest.mark.parametrize(
    "content", [b"", b"x", b"torn 1", b"\xff" * 300, b"\0" * OWNER_SIZE, b"0" * 32 + b" 0000000001 1 a b\n"],
    ids=["empty", "short", "torn", "binary", "zeros", "two-hosts"],
)  # fmt: skip
def test_a_file_that_cannot_be_read_counts_as_an_owner_until_it_is_quiet(network: Network, content: bytes) -> None:
    path = network.shared / OWNER_FILE
    path.write_bytes(content)
    network.events[1.5] = lambda: path.write_bytes(content + b"+" if len(content) < OWNER_SIZE else b"+" * 256)
    with pytest.raises(DirectoryInUse, match="in use by another daemon"):
        network.claim(network.machine("a"))
    owner = network.machine("a")
    assert network.claim(owner) >= 10
    path.write_bytes(content)
    owner.beat()
    assert network.record() is not None


def test_a_file_that_was_deleted_is_made_again(network: Network) -> None:
    owner = network.machine("a")
    network.claim(owner)
    (network.shared / OWNER_FILE).unlink()
    owner.beat()
    assert network.record() is not None


@pytest.mark.parametrize("kind", ["link", "directory", "FIFO"])
def test_something_else_in_its_place_is_not_followed(network: Network, kind: str) -> None:
    path, victim = network.shared / OWNER_FILE, network.root / "victim"
    victim.write_text("precious")
    if kind == "link":
        path.symlink_to(victim)
    elif kind == "directory":
        path.mkdir()
    else:
        os.mkfifo(path)
    with pytest.raises(UnsafeFile, match=str(path)):
        network.claim(network.machine("a"))
    assert victim.read_text() == "precious"


def test_a_file_of_another_user_that_cannot_be_written_can_be_replaced(network: Network) -> None:
    """A lock that only its owner may write, and that a crash has left."""
    network.claim(network.machine("a"))
    (network.shared / OWNER_FILE).chmod(0o444)
    assert network.claim(network.machine("b")) >= 10


def test_the_service_beats_and_releases(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dockerproxy.store.directory_owner.BEAT_INTERVAL", 0.01)
    owner, lost = network.machine("a"), []
    network.claim(owner)

    class Reactor:
        def callFromThread(self, function: Callable[..., object], *arguments: object, **named: object) -> None:
            function(*arguments, **named)

    service = OwnerService(Reactor(), owner, lost.append)
    service.startService()
    wait_for(lambda: (record := network.record()) is not None and record.beat > 3)
    service.release()
    assert not (network.shared / OWNER_FILE).exists() and lost == []

    owner = network.machine("a")
    network.claim(owner)
    service = OwnerService(Reactor(), owner, lost.append)
    service.startService()

    def take_over() -> bool:
        other = network.shared / "new"
        other.write_bytes(bytes(OwnerRecord("0" * 32, 1, 1, "other")))
        other.rename(network.shared / OWNER_FILE)
        return bool(lost)

    wait_for(take_over)
    assert "in use by the daemon on other (process ID 1)" in lost[0]
    service.release()


def wait_for(condition: Callable[[], bool]) -> None:
    import time

    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
