from __future__ import annotations

import os
import stat
import tempfile
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dockerproxy.store import records as module
from dockerproxy.store.records import Records
from tests.support.examples import examples

KEYS = st.lists(st.text(max_size=200), min_size=1, max_size=3).map(tuple)
AWKWARD = ["", ".", "..", "a", "A", "a~.json", "a~", "~", "~staging", "%7E", "a/b", "é", "\ud800", "a" * 300, "a\0b"]


@settings(deadline=None, max_examples=examples(60))
@given(st.lists(st.tuples(KEYS, st.one_of(st.none(), st.integers())), max_size=12))
def test_get_returns_the_last_put(writes: list[tuple[tuple[str, ...], int | None]]) -> None:
    model: dict[tuple[str, ...], dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as directory:
        records, other = Records(Path(directory), max_cached=3), Records(Path(directory))
        for key, value in writes:
            other.get(*key)
            if value is None:
                records.remove(*key)
                model.pop(key, None)
            else:
                model[key] = {"value": value}
                records.put(model[key], *key)
            for written_key in {key for key, _ in writes}:
                assert records.get(*written_key) == other.get(*written_key) == model.get(written_key)


def test_awkward_keys_do_not_collide(tmp_path: Path) -> None:
    records = Records(tmp_path / "records")
    keys = [*((one,) for one in AWKWARD), *((one, two) for one in AWKWARD for two in AWKWARD)]
    for number, key in enumerate(keys):
        records.put({"number": number}, *key)
    fresh = Records(tmp_path / "records")
    assert [fresh.get(*key) for key in keys] == [{"number": number} for number in range(len(keys))]
    assert os.listdir(tmp_path) == ["records"]
    for directory, _, files in os.walk(tmp_path / "records"):
        assert stat.S_IMODE(os.stat(directory).st_mode) == 0o700
        for file in files:
            assert stat.S_IMODE(os.stat(f"{directory}/{file}").st_mode) == 0o600


def test_paths_are_human_readable(tmp_path: Path) -> None:
    Records(tmp_path).put({}, "tag", "registry-1.docker.io:443", "library/ubuntu", "latest")
    path = tmp_path / "tag" / "registry-1.docker.io:443" / "library%2Fubuntu" / "latest~.json"
    assert path.read_text() == ('{"key":["tag","registry-1.docker.io:443","library/ubuntu","latest"],"value":{}}')


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b'{"key":["b"],"value":{}}', b'{"key":["a"],"value":1}', b"1" * 5000]
)
def test_torn_or_foreign_files_count_as_absent(tmp_path: Path, content: bytes) -> None:
    records = Records(tmp_path)
    records.put({"x": 1}, "a")
    (tmp_path / "a~.json").write_bytes(content)
    assert records.get("a") is None
    records.put({"x": 2}, "a")
    assert records.get("a") == {"x": 2}


def test_only_short_records_stay_in_memory(tmp_path: Path) -> None:
    """A registry can make us remember long ones, such as the referrers of each of its images."""
    records = Records(tmp_path)
    for number in range(200):
        records.put({"text": "x" * 20_000}, "long", str(number))
    tracemalloc.start()
    try:
        for number in range(200):
            assert records.get("long", str(number)) == {"text": "x" * 20_000}
        assert tracemalloc.get_traced_memory()[0] < 1_000_000  # not 4 MB
    finally:
        tracemalloc.stop()
    records.put({"text": "short"}, "long", "1")
    assert records.get("long", "1") == {"text": "short"}


def test_a_cached_record_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = Records(tmp_path, max_cached=2)
    for key in "abc":
        records.put({"key": key}, key)
    loads = []
    real = module._load

    def load(path: str, key: tuple[str, ...], max_size: int) -> Any:
        loads.append("".join(key))
        return real(path, key, max_size)

    monkeypatch.setattr(module, "_load", load)
    for key in "aabacabx":
        assert (records.get(key) is None) == (key == "x")
    # Two records stay cached, and the least recently used one is dropped. Missing files are not read.
    assert loads == ["a", "b", "c", "b"]


def test_an_empty_key_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        Records(tmp_path).get()


def test_records_are_thread_safe(tmp_path: Path) -> None:
    records = Records(tmp_path, max_cached=2)
    errors: list[BaseException] = []

    def access(name: str) -> None:
        try:
            for number in range(200):
                records.put({"number": number}, name)
                assert records.get(name) == {"number": number}
                records.get(f"{number}")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=access, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


@pytest.mark.parametrize("kind", ["link", "FIFO", "directory", "large"])
def test_what_is_no_document_of_ours_is_absent_and_replaced(tmp_path: Path, kind: str) -> None:
    records, secret = Records(tmp_path / "records"), tmp_path / "secret"
    records.put({"value": 1}, "tag", "a")
    [entry] = records.walk("tag")
    path = Path(entry.path)
    content = path.read_bytes()
    path.unlink()
    if kind == "link":
        secret.write_bytes(content)
        path.symlink_to(secret)
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.write_bytes(content + b" " * 70_000)
    assert records.get("tag", "a") is None
    assert records.read(entry) is None
    if kind != "directory":
        records.put({"value": 2}, "tag", "a")
        assert records.get("tag", "a") == {"value": 2}
    assert not secret.exists() or secret.read_bytes() == content


def test_a_document_that_could_not_be_read_back_is_not_stored(tmp_path: Path) -> None:
    records = Records(tmp_path / "records")
    records.put({"value": "old"}, "tag", "a")
    records.put({"value": "x" * 70_000}, "tag", "a")
    assert records.get("tag", "a") is None
    assert list(records.walk("tag")) == []


def test_a_deeply_nested_document_is_torn(tmp_path: Path) -> None:
    records = Records(tmp_path / "records")
    records.put({"value": 1}, "tag", "a")
    [entry] = records.walk("tag")
    Path(entry.path).write_bytes(b"[" * 60_000)
    assert records.get("tag", "a") is None
    assert len(list(records.walk("tag"))) == 1
