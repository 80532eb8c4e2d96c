"""The commands `why` and `history`: rows for people, whatever strangers wrote into them."""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import pytest

from dockerproxy.commands.history import print_rows, why

ROW: dict[str, Any] = {
    "time": "2027-01-15T08:00:00Z", "client": "192.0.2.1", "user": None, "user_agent": None, "where": "cached",
    "repository": "docker.io/library/nginx", "kind": "manifest", "reference": "1.29", "status": 200, "verdict": "HIT",
    "because": "", "bytes": 10, "requests": 1, "pulls": 1, "explanation": "it was here, and the client may have it",
}  # fmt: skip
DIGEST = f"sha256:{'a' * 64}"


@pytest.mark.parametrize(
    ("fields", "cells"),
    [
        ({}, ["2027-01-15 08:00:00", "192.0.2.1", "docker.io/library/nginx:1.29", "HIT", ROW["explanation"]]),
        ({"user": "alice", "requests": 3}, ["alice at 192.0.2.1", "docker.io/library/nginx:1.29 (3 times)"]),
        ({"reference": DIGEST}, [f"docker.io/library/nginx@sha256:{'a' * 12}  HIT"]),
        ({"status": 502, "verdict": "-"}, ["502"]),
        ({"kind": "blob", "blobs": 2, "requests": 5}, ["docker.io/library/nginx: 2 blobs, 10 B  HIT"]),
    ],
    ids=["tag", "user", "digest", "failure", "blobs"],
)
def test_a_row(fields: dict[str, Any], cells: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    print_rows([{**ROW, **fields}], with_repository=True)
    header, line = capsys.readouterr().out.splitlines()
    assert header.split() == ["WHEN", "CLIENT", "IMAGE", "RESULT", "REASON"]
    for cell in cells:
        assert cell in line


@pytest.mark.parametrize("name", ["client", "user", "repository", "reference", "verdict", "time", "explanation"])
def test_a_strangers_text_is_printable(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An escape sequence would change the title of the terminal, or worse."""
    print_rows([{**ROW, name: "a\x1b]0;title\x07\r\nb\u202e"}], with_repository=True)
    output = capsys.readouterr().out
    assert len(output.splitlines()) == 2
    assert all(character.isprintable() or character == "\n" for character in output)


def test_an_image_that_nobody_has_pulled(capsys: pytest.CaptureFixture[str]) -> None:
    readers = {"public": False, "at": None, "sentence": "clients that docker.io admits: it is asked about each of them"}
    answer = {
        "name": "docker.io/library/nginx", "where": "cached", "known": False, "tags": [], "contents": [],
        "refused_until": None, "readers": readers, "pulls": {"pulls": 0, "hosts": 0, "days": 30}, "happened": [],
    }  # fmt: skip
    client: Any = SimpleNamespace(call=lambda *_: answer)
    terminal: Any = SimpleNamespace(as_json=False)
    assert why(client, argparse.Namespace(name="nginx", platform=None), terminal) == 0
    first, *others = capsys.readouterr().out.splitlines()
    assert first == "docker.io/library/nginx (nothing of it is here)"
    assert "  no tag of it is known here: docker.io is asked by GET, which counts as a pull" in others
