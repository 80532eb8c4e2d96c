from __future__ import annotations

import errno
import json
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.logger import LogEvent, globalLogPublisher

from dockerproxy.store import journal as journal_module
from dockerproxy.store.journal import BackgroundJournal, Journal, bounded
from tests.store.support.reactor import SteppedReactor


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(f"{tmp_path}/history/test.jsonl", "test", 4096)


@pytest.fixture
def logged() -> Iterator[list[str]]:
    lines: list[str] = []

    def observe(event: LogEvent) -> None:
        lines.append(event["log_format"].format(**event))

    globalLogPublisher.addObserver(observe)
    yield lines
    globalLogPublisher.removeObserver(observe)


def numbers(journal: Journal) -> list[int]:
    return [entry["n"] for entry in journal.read_backwards()]


def test_entries_are_read_the_newest_first(journal: Journal) -> None:
    assert numbers(journal) == []
    journal.append([{"n": 1}, {"n": 2}])
    journal.append([{"n": 3}])
    assert numbers(journal) == [3, 2, 1]
    assert [entry["n"] for entry in journal.read_backwards(lambda line: b"2" in line)] == [2]


def test_only_the_daemons_user_can_read_it(journal: Journal) -> None:
    journal.append([{"n": 1}])
    os.chmod(journal.path, 0o644)
    journal.append([{"n": 2}])
    assert stat.S_IMODE(os.stat(journal.path).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(os.path.dirname(journal.path)).st_mode) == 0o700


def test_it_is_bounded_and_keeps_the_newest(journal: Journal) -> None:
    for number in range(1000):
        journal.append([{"n": number, "text": "x" * 50}])
    assert max(os.stat(path).st_size for path in (journal.path, f"{journal.path}.1")) < 4096 + 100
    kept = numbers(journal)
    assert 40 < len(kept) < 200
    assert kept == list(range(999, 999 - len(kept), -1))


@given(st.text(max_size=100))
def test_an_entry_is_one_line_whatever_is_in_it(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    journal = Journal(f"{tmp_path_factory.mktemp('journal')}/test.jsonl", "test", 1 << 20)
    journal.append([{"text": text}])
    content = Path(journal.path).read_bytes()
    assert content.count(b"\n") == 2
    assert all(character in b"\n" or 32 <= character < 127 for character in content)
    assert [entry["text"] for entry in journal.read_backwards()] == [text]


def test_a_torn_line_costs_only_itself(journal: Journal) -> None:
    journal.append([{"n": 1}])
    with open(journal.path, "ab") as file:
        file.write(b'{"n": 2, "te')
    journal.append([{"n": 3}])
    assert numbers(journal) == [3, 1]


@pytest.mark.parametrize(
    "content",
    [
        b"\x00\xff\x00",
        b"not ours\n",
        b"[1]\n",
        b'{"journal":"other","version":1}\n',
        b'{"journal":"test","version":2}\n',
    ],
    ids=["binary", "text", "list", "other-kind", "newer-version"],
)
def test_a_file_of_another_form_is_set_aside(journal: Journal, content: bytes, logged: list[str]) -> None:
    os.makedirs(os.path.dirname(journal.path))
    Path(journal.path).write_bytes(content)
    assert numbers(journal) == []
    journal.append([{"n": 1}])
    assert numbers(journal) == [1]
    assert Path(f"{journal.path}.aside").read_bytes() == content
    assert [line for line in logged if "it is set aside as" in line]


def test_a_file_that_is_too_large_to_be_ours_is_set_aside(journal: Journal) -> None:
    journal.append([{"n": 1}])
    os.truncate(journal.path, 1 << 40)
    assert numbers(journal) == []
    journal.append([{"n": 2}])
    assert numbers(journal) == [2]


@pytest.mark.parametrize("kind", ["directory", "link", "fifo"])
def test_what_is_no_file_is_an_error(journal: Journal, kind: str, tmp_path: Path) -> None:
    os.makedirs(os.path.dirname(journal.path))
    target = tmp_path / "target"
    {
        "directory": lambda: os.mkdir(journal.path),
        "link": lambda: os.symlink(target, journal.path),
        "fifo": lambda: os.mkfifo(journal.path),
    }[kind]()
    with pytest.raises(OSError):
        journal.append([{"n": 1}])
    assert not target.exists()
    assert numbers(journal) == []


def test_a_full_disk_leaves_no_torn_line(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    journal.append([{"n": 1}])
    write = os.write

    def fill_up(fd: int, data: Any) -> int:
        if len(data) > 5:
            return write(fd, data[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fill_up)
        with pytest.raises(OSError):
            journal.append([{"n": 2}])
    journal.append([{"n": 3}])
    assert numbers(journal) == [3, 1]
    assert Path(journal.path).read_bytes().count(b"\n") == 3


def test_processes_append_and_rotate_at_the_same_time(tmp_path: Path) -> None:
    def write(name: int) -> None:
        journal = Journal(f"{tmp_path}/test.jsonl", "test", 10_000)
        for number in range(200):
            journal.append([{"n": number, "name": name}])

    threads = [threading.Thread(target=write, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    entries = list(Journal(f"{tmp_path}/test.jsonl", "test", 10_000).read_backwards())
    for name in range(4):
        own = [entry["n"] for entry in entries if entry["name"] == name]
        assert own == list(range(199, 199 - len(own), -1))
    assert len(entries) > 300


def test_old_entries_are_dropped(journal: Journal) -> None:
    for number in range(150):
        journal.append([{"n": number, "text": "x" * 50}])
    first = numbers(journal)[-1]
    journal.drop(lambda entry: entry["n"] < first)
    assert numbers(journal)[-1] == first
    journal.drop(lambda entry: entry["n"] < 145)
    assert numbers(journal) == [149, 148, 147, 146, 145]
    assert not os.path.exists(f"{journal.path}.1")
    journal.append([{"n": 150}])
    assert numbers(journal)[0] == 150
    assert journal.remove() and not journal.remove()
    assert numbers(journal) == []


def test_old_entries_between_newer_ones_are_dropped_alone(journal: Journal) -> None:
    """The clock of a machine without a battery is wrong after each start."""
    journal.append([{"n": 5}, {"n": 1}, {"n": 6}])
    journal.drop(lambda entry: entry["n"] < 5)
    assert numbers(journal) == [6, 5]


def test_entries_come_once_if_the_file_is_rotated_meanwhile(journal: Journal) -> None:
    journal.append([{"n": 1}, {"n": 2}])
    reading = journal.read_backwards()
    assert next(reading)["n"] == 2
    os.replace(journal.path, f"{journal.path}.1")
    journal.append([{"n": 3}])
    assert [entry["n"] for entry in reading] == [1]
    assert numbers(journal) == [3, 2, 1]


def test_a_rotation_between_two_steps_shows_no_entry_twice(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    journal.append([{"n": 1}])
    open_regular = journal_module.open_regular

    def rotate_after(path: str) -> int:
        fd = open_regular(path)
        if path == journal.path:
            os.replace(path, f"{path}.1")
        return fd

    monkeypatch.setattr(journal_module, "open_regular", rotate_after)
    assert numbers(journal) == [1]


def test_a_full_disk_keeps_all_entries_when_old_ones_are_dropped(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal.append([{"n": 1}, {"n": 2}])

    def refuse(fd: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", refuse)
        with pytest.raises(OSError):
            journal.drop(lambda entry: entry["n"] < 2)
    assert os.listdir(os.path.dirname(journal.path)) == ["test.jsonl"]
    assert numbers(journal) == [2, 1]


def test_all_of_a_journal_is_removed(journal: Journal) -> None:
    journal.append([{"n": 1}])
    for suffix in (".1", ".new", ".aside"):
        Path(f"{journal.path}{suffix}").write_bytes(b"192.0.2.1")
    assert journal.remove() and not journal.remove()
    assert os.listdir(os.path.dirname(journal.path)) == []


def test_the_background_journal_waits_for_no_disk(journal: Journal) -> None:
    reactor = SteppedReactor()
    background = BackgroundJournal(reactor, journal)
    for number in range(3):
        background.append({"n": number})
    assert numbers(journal) == [] and len(reactor.jobs) == 1
    reactor.run_one()
    assert numbers(journal) == [2, 1, 0] and not reactor.jobs
    background.append({"n": 3})
    background.flush()  # the process ends before a thread was free
    reactor.run_one()
    assert numbers(journal) == [3, 2, 1, 0]


def test_a_disk_that_cannot_be_written_is_logged_once(
    journal: Journal, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reactor = SteppedReactor()
    background = BackgroundJournal(reactor, journal)

    def refuse(fd: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", refuse)
        for number in range(5):
            background.append({"n": number})
            reactor.run_one()
    assert [line for line in logged if "test.jsonl" in line] == [
        f"{journal.path} cannot be written, its entries are lost: No space left on device"
    ]
    background.append({"n": 9})
    reactor.run_one()
    assert numbers(journal) == [9]
    assert logged[-1] == f"{journal.path} is written again; 5 entries are lost"


def test_what_waits_is_bounded(journal: Journal, logged: list[str]) -> None:
    background = BackgroundJournal(SteppedReactor(), journal)
    for number in range(10_100):
        background.append({"n": number})
    background.flush()
    assert sum("does not keep up" in line for line in logged) == 1
    with open(f"{journal.path}.1") as file:
        assert json.loads(file.readline())["journal"] == "test"


def test_bounded_texts() -> None:
    assert bounded("x" * 512) == "x" * 512
    assert bounded("x" * 513) == "x" * 511 + "…"
