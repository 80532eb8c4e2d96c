"""The parts of the client matrix that need no client: the rules for a red cell, the table, and the document."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.clients.matrix import COLD, DIRECT, HOSTED, HOSTED_PUSH, OFF, PUSH, WARM, MatrixRow, Outcome, Verdict
from tests.clients.matrix_clients import (
    ABSENT_CLIENTS,
    CLIENTS,
    BuildxClient,
    MatrixClient,
    MirroredDockerClient,
    SkopeoClient,
)
from tests.clients.table import RED, describe, render
from tests.e2e.harness.clients import Machine

DOCUMENT = Path(__file__).resolve().parents[2] / "docs/clients.md"
GOOD, FAILED, AGAIN = (Outcome(verdict, "a | b") for verdict in Verdict)


def make_row(outcomes: dict[tuple[str, str], Outcome], client: type[MatrixClient] = SkopeoClient) -> MatrixRow:
    return MatrixRow(0, client, Machine(), "trixie", "1.2", outcomes)


@pytest.mark.parametrize(
    ("outcomes", "red"),
    [
        ({("hub", DIRECT): GOOD, ("hub", COLD): GOOD}, []),
        ({("hub", DIRECT): GOOD, ("hub", COLD): FAILED}, [("hub", COLD)]),
        ({("hub", DIRECT): FAILED, ("hub", COLD): FAILED}, []),
        ({("hub", DIRECT): FAILED, ("basic", DIRECT): GOOD, ("basic", COLD): FAILED}, [("basic", COLD)]),
        ({("hub", COLD): FAILED}, [("hub", COLD)]),  # nothing shows that it fails directly too
        ({("hub", DIRECT): FAILED, ("hub", WARM): AGAIN}, [("hub", WARM)]),
        ({("hub", DIRECT): GOOD, ("hub", OFF): FAILED}, [("hub", OFF)]),
        ({(PUSH, DIRECT): GOOD, (HOSTED, HOSTED_PUSH): FAILED}, [(HOSTED, HOSTED_PUSH)]),
        ({(PUSH, DIRECT): FAILED, (HOSTED, HOSTED_PUSH): FAILED}, []),
    ],
)
def test_a_step_is_red_if_only_the_proxy_fails(
    outcomes: dict[tuple[str, str], Outcome], red: list[tuple[str, str]]
) -> None:
    assert make_row(outcomes).red_steps == red


def test_a_command_that_fetches_tokens_itself_cannot_do_so_while_the_token_server_is_down() -> None:
    outcomes = {(source, step): FAILED for source in ("listed", "basic") for step in (COLD, OFF)}
    assert make_row(outcomes, BuildxClient).red_steps == [("listed", COLD), ("basic", COLD), ("basic", OFF)]
    assert make_row(outcomes).red_steps == list(outcomes)


def test_the_proxy_is_no_token_server_for_logins_that_it_has_not_seen() -> None:
    outcomes = {("token", step): FAILED for step in (COLD, OFF)}
    assert make_row(outcomes).red_steps == [("token", COLD)]
    assert len(list(describe([make_row(outcomes)]))) == 2
    assert len(list(describe([make_row(outcomes)], explained=False))) == 1


def test_sources_of_a_mirror() -> None:
    """It is used without a login of the client's own."""
    assert [source.key for source in make_row({}, MirroredDockerClient).sources] == ["hub"]
    assert len(make_row({}).sources) == 7


def test_table() -> None:
    outcomes = {("hub", DIRECT): GOOD, ("hub", COLD): GOOD, ("hub", WARM): FAILED, ("basic", COLD): GOOD}
    row = make_row(outcomes)
    text = render([row], ["a note"])
    assert "| skopeo copy | 1.2 | + **X** |  |  |  |  | + |" in text
    assert r"- **X**: skopeo copy 1.2: Docker Hub, warm: a \| b" in text
    assert len(list(describe([row]))) == 1


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_passes() -> None:
    script = Path(__file__).with_name("enter")
    result = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_document_has_every_client() -> None:
    text = DOCUMENT.read_text()
    for client in CLIENTS:
        assert f"\n| {client.TITLE} | " in text
    for absent in ABSENT_CLIENTS:
        assert f"\n- {absent.title}: {absent.reason}\n" in text
    assert RED not in text.partition("<!-- last run: begin -->")[2]
