"""The output of `ls` and `rm`, for people and for scripts."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.commands.conftest import NOW, ControlSocketStub, Run

DIGESTS = [f"sha256:{digit * 64}" for digit in "0123"]


def repository(name: str, where: str = "cached", **fields: Any) -> dict[str, Any]:
    row = {"tags": 1, "manifests": 1, "platforms": ["linux/amd64"], "size": 1000, "last_used": NOW - 60, "pulls": 7}
    return {"event": "repository", "name": name, "where": where, **row, **fields}


def manifest(tag: str | None, digest: str, **fields: Any) -> dict[str, Any]:
    row = {"needed_by": None, "media_type": "a/b", "platforms": [], "size": 10_000, "last_used": NOW - 3600}
    return {"event": "manifest", "tag": tag, "digest": digest, **row, **fields}


REPOSITORIES = [
    repository("acme/shop", "hosted", tags=2, size=123_456_789, pulls=None),
    repository(
        "docker.io/library/nginx", tags=12, size=2_000_000_000, last_used=NOW - 5, pulls=18230,
        platforms=["linux/amd64", "linux/arm64", "linux/s390x"],
    ),
    repository("ghcr.io/acme/tool", platforms=[], last_used=None),
]  # fmt: skip


@pytest.fixture
def repositories(daemon: ControlSocketStub) -> None:
    daemon.answers["GET /v1/repositories"] = [*REPOSITORIES, {"event": "result"}]


LS = """\
REPOSITORY               KIND    TAGS  PLATFORMS                         SIZE    PULLS  LAST USED
acme/shop                hosted  2     linux/amd64                       123 MB  -      1 minute ago
docker.io/library/nginx  cached  12    linux/amd64, linux/arm64, 1 more  2 GB    18230  5 seconds ago
ghcr.io/acme/tool        cached  1     -                                 1 kB    7      -
3 repositories, 2.12 GB
"""


def test_ls(repositories: None, run: Run) -> None:
    assert run("ls") == (0, LS, "")


def test_ls_without_repositories(daemon: ControlSocketStub, run: Run) -> None:
    daemon.answers["GET /v1/repositories"] = [{"event": "result"}]
    header = "REPOSITORY  KIND  TAGS  PLATFORMS  SIZE  PULLS  LAST USED\n"
    assert run("ls", "nothing*") == (0, f"{header}0 repositories, 0 B\n", "")
    assert run("ls", "-q") == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "order"),
    [
        ((), [0, 1, 2]),
        (("--reverse",), [2, 1, 0]),
        (("--sort", "name"), [0, 1, 2]),
        (("--sort", "size"), [1, 0, 2]),
        (("--sort", "used"), [1, 0, 2]),
        (("--sort", "pulls"), [1, 2, 0]),
        (("--sort", "size", "--reverse"), [2, 0, 1]),
        (("--sort", "size", "--limit", "1"), [1]),
    ],
)
def test_order(repositories: None, run: Run, arguments: tuple[str, ...], order: list[int]) -> None:
    names = [REPOSITORIES[index]["name"] for index in order]
    assert run("ls", "-q", *arguments) == (0, "".join(f"{name}\n" for name in names), "")
    assert [row["name"] for row in json.loads(run("--json", "ls", *arguments)[1])["repositories"]] == names


def test_a_limit_is_told(repositories: None, run: Run) -> None:
    assert run("ls", "--limit", "2")[1].splitlines()[-1] == "3 repositories, 2.12 GB; 2 shown"


def test_all_platforms(repositories: None, run: Run) -> None:
    assert "linux/amd64, linux/arm64, linux/s390x  2 GB" in run("ls", "--platforms")[1]


@pytest.mark.parametrize(
    ("name", "query"),
    [
        ("*/nginx", "match=%2A%2Fnginx"),
        ("ngin?", "match=ngin%3F"),
        ("n[ao]*", "match=n%5Bao%5D%2A"),
        ("nginx:1", "name=nginx%3A1"),
    ],
)
def test_a_pattern_is_sent_as_such(daemon: ControlSocketStub, run: Run, name: str, query: str) -> None:
    run("ls", name, "--cached")
    assert daemon.requests == [(f"GET /v1/repositories?{query}&where=cached", None)]


LS_NAME = """\
docker.io/library/nginx (cached)
TAG      DIGEST               PLATFORMS                 SIZE   LAST USED
1.29     sha256:000000000000  linux/amd64, linux/arm64  10 kB  1 hour ago
latest   sha256:000000000000  linux/amd64, linux/arm64  10 kB  1 hour ago
of 1.29  sha256:111111111111  linux/arm64               10 kB  1 hour ago
-        sha256:222222222222  -                         10 kB  -
2 tags, 3 manifests
"""


@pytest.fixture
def nginx(daemon: ControlSocketStub) -> None:
    daemon.answers["GET /v1/repositories"] = [
        manifest("1.29", DIGESTS[0], platforms=["linux/amd64", "linux/arm64"]),
        manifest("latest", DIGESTS[0], platforms=["linux/amd64", "linux/arm64"]),
        manifest(None, DIGESTS[1], platforms=["linux/arm64"], needed_by="of 1.29"),
        manifest(None, DIGESTS[2], last_used=None),
        {"event": "result", "name": "docker.io/library/nginx", "where": "cached"},
    ]


def test_ls_of_a_repository(nginx: None, run: Run) -> None:
    assert run("ls", "nginx") == (0, LS_NAME, "")
    assert f"  {DIGESTS[1]}  " in run("ls", "nginx", "--digests")[1]


def test_names_of_images_for_scripts(nginx: None, run: Run) -> None:
    name = "docker.io/library/nginx"
    names = [f"{name}:1.29", f"{name}:latest", f"{name}@{DIGESTS[1]}", f"{name}@{DIGESTS[2]}"]
    assert run("ls", "-q", "nginx") == (0, "".join(f"{text}\n" for text in names), "")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--digests",), "--digests needs the NAME of one repository"),
        (("--digests", "n*"), "--digests needs the NAME of one repository"),
        (("nginx", "--sort", "pulls"), "the pulls of a tag are not counted"),
        (("--sort", "age"), "invalid choice: 'age'"),
        (("--limit", "0"), "'0' is not a number from 1"),
        (("--limit", "-1"), "'-1' is not a number from 1"),
        (("--limit", "9" * 5000), "is not a number from 1"),
        (("--limit", "\u0663"), "is not a number from 1"),
    ],
)
def test_wrong_usage(daemon: ControlSocketStub, run: Run, arguments: tuple[str, ...], sentence: str) -> None:
    status, output, errors = run("ls", *arguments)
    assert (status, output) == (2, "")
    assert sentence in errors
    assert daemon.requests == []


def test_names_of_strangers_are_shown_and_not_obeyed(daemon: ControlSocketStub, run: Run) -> None:
    row = repository("evil\x1b]0;x\x07\u202e", platforms=["linux/\x1b[2J"])
    daemon.answers["GET /v1/repositories"] = [row, {"event": "result"}]
    for arguments in ((), ("-q",)):
        output = run("ls", *arguments)[1]
        assert "evil\\x1b]0;x\\x07\\u202e" in output
        assert "\x1b" not in output and "\u202e" not in output


def test_an_older_daemon_is_one_sentence(daemon: ControlSocketStub, run: Run) -> None:
    daemon.answers["GET /v1/repositories"] = [{"event": "repository", "name": "x"}, {"event": "result"}]
    status, _, errors = run("ls")
    assert (status, len(errors.splitlines())) == (7, 1)
    assert "of another version" in errors
