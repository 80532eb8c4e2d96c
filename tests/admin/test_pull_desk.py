"""The way to the pulls for the administrator: what loads them, and what is known without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dockerproxy.admin.pull_desk import PULL_REQUESTS, PullDesk
from dockerproxy.admin.pulls import PullService
from dockerproxy.cache.image_budget import PullBudget
from dockerproxy.cache.pins import Pins, pin_records
from dockerproxy.cache.pull_counts import PullCounts
from dockerproxy.cache.rate_limits import RateLimits
from dockerproxy.oci.image_names import ImageName
from dockerproxy.oci.names import Digest
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.layout import Layout
from dockerproxy.store.records import Records
from tests.store.support.reactor import SteppedReactor


class PullsStub:
    """Counts what it is asked."""

    def __init__(self) -> None:
        self.fetches = self.cancellations = 0

    async def fetch_new_pins(self) -> None:
        self.fetches += 1

    def cancel_all(self) -> None:
        self.cancellations += 1


class RunningReactor(SteppedReactor):
    def callWhenRunning(self, function: Any, *args: Any) -> None:
        function(*args)


class World:
    def __init__(self, folder: Path) -> None:
        self.reactor, self.layout = RunningReactor(), Layout(folder)
        self.pins = Pins(self.reactor, pin_records(self.layout), lambda: 0.0, limit=1 << 30, cost=1)
        self.records = Records(folder / "records")
        limits = RateLimits(self.records, lambda: 0.0)
        self.budget = PullBudget(self.reactor, limits, PullCounts(lambda: 0.0), lambda: 0.0, 20)
        self.loads: list[PullsStub] = []

    def desk(self, pin_file: Path | None = None) -> PullDesk:
        return PullDesk(
            self.reactor, self.load, self.budget, self.pins, self.layout, self.records, lambda: 0.0, pin_file
        )

    def load(self, desk: PullDesk) -> Any:
        self.loads.append(PullsStub())
        return self.loads[-1]

    def settle(self) -> None:
        while self.reactor.jobs:
            self.reactor.run_one()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_nothing_is_loaded_if_nothing_is_pinned(world: World) -> None:
    desk = world.desk()
    desk.startService()
    desk.reconfigure(30, None)
    world.settle()
    assert world.reactor.run(desk.budget()) == {"reserve": 0.3, "limits": []}
    assert desk.count_pins() == (0, 0, 0)
    assert not desk.is_pinned("ghcr.io/acme/app")
    desk.stopService()
    assert world.loads == []


def test_pins_are_fetched_at_the_start(world: World) -> None:
    world.reactor.run(world.pins.set(ImageName.parse("ghcr.io/acme/app:1"), by_command=True))
    desk = world.desk()
    desk.startService()
    world.settle()
    [pulls] = world.loads
    assert (pulls.fetches, pulls.cancellations) == (1, 0)
    assert desk.is_pinned("ghcr.io/acme/app") and desk.is_pinned("ghcr.io/acme/app", "1")
    desk.stopService()
    assert pulls.cancellations == 1


def test_a_pin_file_is_read_at_the_start_and_after_a_reload(world: World, tmp_path: Path) -> None:
    desk = world.desk()
    desk.startService()
    world.settle()
    assert world.loads == []
    desk.reconfigure(20, tmp_path / "pins")
    world.settle()
    [pulls] = world.loads
    assert desk.pin_file == tmp_path / "pins" and pulls.fetches == 1
    desk.reconfigure(20, tmp_path / "other")
    world.settle()
    assert len(world.loads) == 1 and pulls.fetches == 2


def test_no_pull_begins_after_the_end(world: World, tmp_path: Path) -> None:
    desk = world.desk(tmp_path / "pins")
    desk.startService()
    desk.stopService()  # while they are being loaded
    world.settle()
    [pulls] = world.loads
    assert pulls.fetches == 0


def test_whole_and_incomplete_pins_are_counted(world: World) -> None:
    content = b"content"
    digest, missing = Digest.of(content), Digest.of(b"missing")
    Blobs(world.layout, durable=False).put(content, digest)
    for name, contents in (("whole", {digest: 7}), ("torn", {digest: 7, missing: 10}), ("new", {})):
        image = ImageName.parse(f"ghcr.io/acme/{name}:1")
        world.reactor.run(world.pins.set(image, by_command=True))
        if contents:
            world.reactor.run(world.pins.update(image, contents=contents, digest=digest))
    complete, incomplete, size = world.desk().count_pins()
    assert (complete, incomplete) == (1, 2)
    assert size == world.pins.bytes


def test_the_requests_are_those_of_the_pulls(world: World) -> None:
    unused: Any = None
    pulls = PullService(unused, unused, unused, world.layout, unused, unused, lambda: None)
    assert set(PULL_REQUESTS) == set(pulls.handlers)
    assert set(world.desk().handlers) == {*PULL_REQUESTS, ("GET", "/v1/budget")}
