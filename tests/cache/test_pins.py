"""Pins: their records, their room, and the contents that stay; PIN_FILE; counts of pulls."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred

from dockerproxy.cache import pull_counts
from dockerproxy.cache.pin_file import MAX_PINS, PinFile
from dockerproxy.cache.pins import Pin, PinnedContent, Pins, pin_records
from dockerproxy.cache.pull_counts import HOUR, PullCounts
from dockerproxy.errors import Denied
from dockerproxy.oci.image_names import ImageName
from dockerproxy.oci.names import Digest
from dockerproxy.store.layout import Layout
from tests.cache.support.reactor import ManualReactor
from tests.support.examples import examples

NGINX, REDIS = ImageName.parse("nginx:1.29"), ImageName.parse("quay.io/a/redis@sha256:" + "b" * 64)
HUB_KEY = "registry-1.docker.io/library/nginx"


def digest(number: int) -> Digest:
    return Digest("sha256", f"{number:064x}")


class PinsHarness:
    """Pins with a limit of 1000 bytes, of which they may take 800, and the contents that they keep."""

    def __init__(self, root: Path) -> None:
        self.reactor = ManualReactor()
        self.layout = Layout(root)
        self.kept: set[Digest] = set()
        self.pins = self.open()

    def open(self) -> Pins:
        self.kept.clear()
        pins = Pins(self.reactor, pin_records(self.layout), lambda: 1000.0, limit=1000, cost=10)
        pins.subscribe(self.keep, self.stop_keeping)
        pins.load()
        return pins

    def keep(self, digests: Iterable[Digest]) -> None:
        added = set(digests)
        assert not added & self.kept
        self.kept |= added

    def stop_keeping(self, digests: Iterable[Digest]) -> None:
        removed = set(digests)
        assert removed <= self.kept
        self.kept -= removed

    def run(self, work: Any) -> Any:
        results: list[Any] = []
        Deferred.fromCoroutine(work).addBoth(results.append)
        self.reactor.run_due_calls()
        (result,) = results
        if hasattr(result, "raiseException"):
            result.raiseException()
        return result

    def set(self, image: ImageName, *contents: int, **changes: Any) -> Any:
        return self.run(self.pins.set(image, contents={digest(number): 90 for number in contents}, **changes))


@pytest.fixture
def harness(tmp_path: Path) -> PinsHarness:
    return PinsHarness(tmp_path)


def test_pins_survive_a_restart(harness: PinsHarness) -> None:
    harness.set(NGINX, 1, 2, by_command=True, platforms=("linux/arm64",), refreshed=900.0, digest=digest(1))
    harness.set(REDIS, 2, 3, in_file=True, error="it is gone")
    before = {pin.image: pin for pin in harness.pins}
    again = harness.open()
    assert {pin.image: pin for pin in again} == before
    assert harness.kept == {digest(1), digest(2), digest(3)}
    assert again.bytes == 300
    assert again.is_pinned(HUB_KEY) and again.is_pinned(HUB_KEY, "1.29") and again.is_pinned(HUB_KEY, str(digest(2)))
    assert not again.is_pinned(HUB_KEY, "1.28") and not again.is_pinned("quay.io/a/other")


def test_an_update_of_a_pin_that_is_being_removed(harness: PinsHarness) -> None:
    """A pull of it ends at the same moment. Nobody would own what it left."""
    harness.set(NGINX, 1, by_command=True)
    removing = Deferred.fromCoroutine(harness.pins.remove(NGINX))
    updating = Deferred.fromCoroutine(harness.pins.update(NGINX, contents={digest(2): 90}))
    harness.reactor.run_due_calls()
    assert removing.called and updating.called
    assert len(harness.pins) == len(harness.open()) == 0
    assert harness.kept == set() and harness.pins.bytes == 0


def test_other_processes_know_the_pins(harness: PinsHarness) -> None:
    harness.set(NGINX, 1)
    harness.set(REDIS, 2)
    content = PinnedContent(pin_records(harness.layout))
    assert content.has_tag(HUB_KEY, NGINX.reference) and content.has(HUB_KEY, digest(1))
    assert not content.has(HUB_KEY, digest(2)) and not content.has("quay.io/other", digest(2))
    harness.run(harness.pins.remove(NGINX))
    assert not content.has_tag(HUB_KEY, NGINX.reference) and not content.has(HUB_KEY, digest(1))


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff" * 100, b"[]", b'{"key": ["pin"], "value": {}}', b"x" * 2_000_000]
)
def test_a_torn_record_leaves_the_others(harness: PinsHarness, content: bytes) -> None:
    harness.set(NGINX, 1)
    harness.set(REDIS, 2)
    (path,) = (harness.layout.root / "pins/pin").rglob("1.29~.json")
    path.write_bytes(content)
    pins = harness.open()
    assert harness.kept == {digest(2)}
    damaged = pins.get(NGINX)
    assert damaged is not None and damaged.is_due(1000.0) and damaged.error == "its record was damaged"


def test_a_directory_that_cannot_be_read(harness: PinsHarness) -> None:
    """The daemon starts all the same."""
    directory = harness.layout.root / "pins/pin"
    (directory / "quay.io%2Fa").mkdir(parents=True)
    (directory / "loop").symlink_to("loop")
    (directory / "a~.json").mkdir()
    (directory / "b~.json").write_text("{}")
    (directory / "quay.io%2Fa/c~.json").symlink_to("/dev/zero")
    (directory / "quay.io%2Fa/~hash~.json").write_text("{}")
    assert len(harness.open()) == 0


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3)
    )
)
def test_odd_values_are_no_pin(value: Any) -> None:
    record = Pin(NGINX, contents={digest(1): 5}).to_record()
    assert Pin.from_record(record) == Pin(NGINX, contents={digest(1): 5})
    for name in record:
        try:
            Pin.from_record({**record, name: value})
        except ValueError:
            continue


def test_pins_may_take_four_fifths(harness: PinsHarness) -> None:
    harness.set(NGINX, *range(5))
    harness.set(REDIS, *range(8))  # 800 bytes with those that both have
    with pytest.raises(Denied, match="needs 100 more bytes, and the pinned images have 800 of the 800"):
        harness.set(REDIS, *range(9))
    harness.set(NGINX, 6, 7)  # smaller
    harness.run(harness.pins.remove(REDIS))
    assert (harness.pins.bytes, harness.kept) == (200, {digest(6), digest(7)})


def test_a_size_that_was_too_small(harness: PinsHarness) -> None:
    """The manifest had said that there was room, and the download showed otherwise."""
    harness.run(harness.pins.set(NGINX, contents={digest(1): 0, digest(2): 90}))
    assert harness.pins.bytes == 110
    with pytest.raises(Denied, match="needs 790 more bytes"):
        harness.run(harness.pins.set(NGINX, contents={digest(1): 790, digest(2): 90}))
    harness.run(harness.pins.set(REDIS, contents={digest(1): 590}))
    assert harness.pins.bytes == 700
    harness.run(harness.pins.remove(REDIS))
    harness.run(harness.pins.remove(NGINX))
    assert harness.pins.bytes == 0


@settings(max_examples=examples(30), deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.sets(st.integers(0, 5)), st.integers(0, 90)), max_size=10))
def test_what_is_kept_is_what_pins_consist_of(tmp_path_factory: pytest.TempPathFactory, steps: list[Any]) -> None:
    """Also if pins share contents, and registries lie about sizes."""
    harness = PinsHarness(tmp_path_factory.mktemp("pins"))
    names = [NGINX, REDIS, ImageName.parse("alpine")]
    for number, contents, size in steps:
        if contents:
            sizes = {digest(one): size for one in contents}
            harness.run(harness.pins.set(names[number], contents=sizes))
        else:
            harness.run(harness.pins.remove(names[number]))
        assert harness.kept == {one for pin in harness.pins for one in pin.contents}
        assert harness.pins.bytes >= 10 * len(harness.kept)
    if not len(harness.pins):
        assert harness.pins.bytes == 0


def test_the_number_of_pins_is_bounded(harness: PinsHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dockerproxy.cache.pins.MAX_PINS", 3)
    for number in range(3):
        harness.set(ImageName.parse(f"app-{number}"))
    with pytest.raises(Denied, match="3 images are pinned already"):
        harness.set(NGINX)
    harness.set(ImageName.parse("app-0"), 1)


def test_the_parts_of_a_pin_are_bounded(harness: PinsHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dockerproxy.cache.pins.MAX_CONTENTS", 3)
    harness.set(NGINX, 1, 2, 3)
    with pytest.raises(Denied, match="consists of 4 parts; a pin may have 3"):
        harness.set(NGINX, 1, 2, 3, 4)
    assert harness.kept == {digest(1), digest(2), digest(3)}


@pytest.mark.parametrize(
    ("refreshed", "error", "is_due"),
    [
        (None, "", True), (1000.0, "", False), (901.0, "", False), (900.0, "", True), (1000.0, "it failed", True),
        (1001.0, "", True),  # by a clock that was wrong
    ],
    ids=["never", "now", "lately", "long-ago", "failed", "later"],
)  # fmt: skip
def test_when_a_pin_is_due(refreshed: float | None, error: str, is_due: bool) -> None:
    assert Pin(NGINX, refresh=100.0, refreshed=refreshed, error=error).is_due(1000.0) is is_due


# PIN_FILE


def test_a_pin_file() -> None:
    file = PinFile.parse(
        b"# ours\n\nnginx:1.29\t# web\n  ghcr.io/a/b:main   linux/amd64,linux/arm64/v8\nx y z\n"
        b"\xff\xfe\nredis linux\r\nnginx:1.29 all\n"
    )
    assert [(str(line.image), line.platforms) for line in file.lines] == [
        ("docker.io/library/nginx:1.29", ("all",)),
        ("ghcr.io/a/b:main", ("linux/amd64", "linux/arm64")),
    ]
    assert [problem.partition(":")[0] for problem in file.problems] == ["line 5", "line 6 is not UTF-8 text", "line 7"]


def test_a_long_pin_file() -> None:
    file = PinFile.parse(b"\n".join(b"app-%d" % number for number in range(MAX_PINS + 5)))
    assert len(file.lines) == MAX_PINS
    assert file.problems == (
        f"line {MAX_PINS + 1} and all after it are left out, because {MAX_PINS} images are before",
    )
    assert len(PinFile.parse(b"a b c\n" * 5000).problems) == 21


@given(st.binary())
def test_any_pin_file(content: bytes) -> None:
    PinFile.parse(content)


# counts


def test_counts_of_pulls(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1_000_000.0]
    counts = PullCounts(lambda: now[0])
    for _ in range(3):
        counts.add("hub", "library/nginx")
    counts.add("quay.io", "a/b")
    now[0] += 1800
    counts.add("hub", "library/redis")
    assert counts.by_repository("hub", HOUR) == {"library/nginx": 3, "library/redis": 1}
    now[0] += 2400
    assert counts.by_repository("hub", HOUR) == {"library/redis": 1}
    assert counts.by_repository("hub", 21600).most_common(1) == [("library/nginx", 3)]
    monkeypatch.setattr(pull_counts, "_MAX_COUNTS", 10)
    for number in random.Random(1).sample(range(1000), 100):
        counts.add("hub", f"app-{number}")
    assert counts.by_repository("hub", 1e6).total() == 10
