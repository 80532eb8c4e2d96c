from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.oci.names import Digest
from dockerproxy.store import tombstones as module
from dockerproxy.store.tombstones import MAX_DIGESTS, Tombstone, Tombstones, TombstoneService, format_idle
from tests.store.support.reactor import SteppedReactor

NOW = 1_794_614_400.0  # 2026-11-14

ONE, TWO = Digest.of(b"1"), Digest.of(b"2", "sha512")


def test_a_tombstone_says_when_and_after_how_long() -> None:
    tombstones = Tombstones()
    assert (tombstones.last_idle, tombstones.find(ONE)) == (None, None)
    tombstones.note_evicted([(ONE, 43 * 86400.5), (TWO, 7200.0)], NOW, made_room=True)
    assert str(tombstones.find(ONE)) == "evicted 2026-11-14 43d"
    assert str(tombstones.find(TWO)) == "evicted 2026-11-14 2h"
    assert tombstones.last_idle == 7200
    tombstones.note_evicted([(ONE, 0)], NOW, made_room=False)
    assert (tombstones.find(ONE), tombstones.last_idle) == (Tombstone(int(NOW), 0), 7200)
    tombstones.note_evicted([(ONE, -5.0)], NOW, made_room=True)  # the clock was set back
    assert tombstones.last_idle == 0


def test_only_a_repository_that_had_the_blob_is_told() -> None:
    tombstones = Tombstones()
    tombstones.note_unlinked("quay.io/a", ONE)  # it was not evicted
    tombstones.note_evicted([(ONE, 5.0)], NOW, made_room=True)
    assert tombstones.find_in("quay.io/a", ONE, is_linked=False) is None
    assert tombstones.find_in("quay.io/a", ONE, is_linked=True) is not None
    tombstones.note_unlinked("quay.io/a", ONE)
    assert tombstones.find_in("quay.io/a", ONE, is_linked=False) is not None
    assert tombstones.find_in("quay.io/b", ONE, is_linked=False) is None
    assert tombstones.find_in("quay.io/a", TWO, is_linked=True) is None


@given(st.lists(st.integers(0, 9), max_size=60), st.integers(1, 5))
def test_the_newest_are_kept(numbers: list[int], size: int) -> None:
    """A model: a ring of `size` in the order of first evictions. A later eviction of the same blob keeps its place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_DIGESTS", size)
        tombstones, model, digests = Tombstones(), OrderedDict[int, int](), [Digest.of(b"%d" % n) for n in range(10)]
        for when, number in enumerate(numbers):
            tombstones.note_evicted([(digests[number], number)], when, made_room=True)
            if number not in model and len(model) == size:
                model.popitem(last=False)
            model[number] = when
        found = {number: one.evicted_at for number in range(10) if (one := tombstones.find(digests[number]))}
        assert found == model


def test_there_is_a_bound() -> None:
    tombstones = Tombstones()
    digests = [Digest.of(b"%d" % number) for number in range(MAX_DIGESTS + 100)]
    tombstones.note_evicted(((digest, 1.0) for digest in digests), NOW, made_room=True)
    assert [tombstones.find(digest) is None for digest in digests[:101]] == [True] * 100 + [False]
    assert tombstones.find(digests[-1]) is not None


def test_the_middle_of_a_record_is_no_digest() -> None:
    tombstones = Tombstones()
    tombstones.note_evicted([(ONE, 5.0)], NOW, made_room=True)
    start, end, size = module._DIGESTS
    within = bytes(tombstones._memory[start + 3 : start + 19])
    assert tombstones._find(within, start, end, size) is None
    tombstones._memory[start + 2 * size : start + 2 * size + 16] = within
    assert tombstones._find(within, start, end, size) == start + 2 * size


def test_they_survive_a_restart(tmp_path: Path) -> None:
    path, tombstones = f"{tmp_path}/history/evicted", Tombstones()
    tombstones.load(path)
    tombstones.save(path)
    assert not os.path.exists(path), "nothing has changed"
    tombstones.note_evicted([(ONE, 5.0)], NOW, made_room=True)
    tombstones.note_unlinked("quay.io/a", ONE)
    tombstones.save(path)
    restarted = Tombstones()
    restarted.load(path)
    assert restarted.find_in("quay.io/a", ONE, is_linked=False) == Tombstone(int(NOW), 5)
    assert restarted.last_idle == 5
    assert os.stat(path).st_mode & 0o077 == 0


@pytest.mark.parametrize("damage", ["torn", "longer", "newer", "empty", "directory"])
def test_a_file_that_cannot_be_used_is_set_aside(tmp_path: Path, damage: str) -> None:
    path, tombstones = tmp_path / "evicted", Tombstones()
    tombstones.note_evicted([(ONE, 5.0)], NOW, made_room=True)
    tombstones.save(str(path))
    content = path.read_bytes()
    path.unlink()
    if damage == "directory":
        path.mkdir()
    else:
        changed = {
            "torn": content[:-1], "longer": content + b"x", "newer": content.replace(b"nes 1", b"nes 2"), "empty": b"",
        }[damage]  # fmt: skip
        path.write_bytes(changed)
    restarted = Tombstones()
    restarted.load(str(path))
    assert restarted.find(ONE) is None
    assert (tmp_path / "evicted.aside").exists() is (damage != "directory")


def test_what_a_full_disk_refused_is_saved_later(tmp_path: Path) -> None:
    tombstones, path = Tombstones(), f"{tmp_path}/history/evicted"
    tombstones.note_evicted([(Digest.of(b"1"), 60.0)], NOW, made_room=True)
    (tmp_path / "history").write_bytes(b"no directory")
    with pytest.raises(OSError):
        tombstones.save(path)
    (tmp_path / "history").unlink()
    tombstones.save(path)
    again = Tombstones()
    again.load(path)
    assert again.last_idle == 60


def test_the_service_saves_at_the_end_and_a_full_disk_fails_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    tombstones = Tombstones()
    tombstones.note_evicted([(ONE, 5.0)], NOW, made_room=True)
    for path in (f"{tmp_path}/file/evicted", f"{tmp_path}/history/evicted"):
        tombstones.note_evicted([(ONE, 5.0)], NOW, made_room=True)
        reactor = SteppedReactor()
        service = TombstoneService(reactor, tombstones, path)
        service.startService()
        reactor.run_one()
        tombstones.note_evicted([(TWO, 5.0)], NOW, made_room=True)
        service.stopService()
    restarted = Tombstones()
    restarted.load(f"{tmp_path}/history/evicted")
    assert restarted.find(TWO) is not None


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.9, "59s"), (60, "1m"), (3599, "59m"), (86399, "23h"), (86400 * 43.9, "43d")]
)
def test_idle_times(seconds: float, text: str) -> None:
    assert format_idle(seconds) == text
