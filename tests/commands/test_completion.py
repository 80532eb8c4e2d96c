"""Completion in real shells: commands, options, and the names that the daemon knows."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands.conftest import ControlSocketStub

pytestmark = pytest.mark.slow  # because it starts shells

ROOT = Path(__file__).parents[2]
COMPLETIONS = ROOT / "completions"

# As bash does: the words of the line, the number of the last one, and the position of the cursor.
BASH = """
source "$COMPLETIONS/bash/dockerproxy"
complete -p dockerproxy
COMP_LINE=$1 COMP_POINT=${#1} COMP_TYPE=9
read -ra COMP_WORDS <<<"${1//:/ : }"
[[ $1 != *' ' ]] || COMP_WORDS+=('')
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
_dockerproxy dockerproxy "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""
ZSH = """
fpath=("$COMPLETIONS/zsh" $fpath)
autoload -Uz _dockerproxy
compadd() { shift; print -rl -- "$@" }
_files() { print files }
BUFFER=$1 CURSOR=${#1}
words=(${(z)1})
_dockerproxy
"""
FISH = """
source "$COMPLETIONS/fish/dockerproxy.fish"
complete --do-complete "$argv[1]"
"""

Complete = Callable[[str], list[str]]


@pytest.fixture(params=["bash", "zsh", "fish"])
def shell(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed (`make test` installs it if root runs it)")
    return name


@pytest.fixture
def complete(shell: str, tmp_path: Path) -> Complete:
    """Return a function that returns the words that the shell proposes at the end of a line."""
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin/dockerproxy"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m dockerproxy.cli "$@"\n')
    command.chmod(0o755)
    environment = {
        "PATH": f"{command.parent}:/usr/bin:/bin", "HOME": str(tmp_path), "COMPLETIONS": str(COMPLETIONS),
        "PYTHONPATH": str(ROOT), "RUNTIME_DIR": str(tmp_path), "LC_ALL": "C.UTF-8",
    }  # fmt: skip
    script = {"bash": BASH, "zsh": ZSH, "fish": FISH}[shell]
    arguments = {"bash": ["bash", "--norc", "-c", script, "bash"], "zsh": ["zsh", "-f", "-c", script, "zsh"]}

    def complete(line: str) -> list[str]:
        completed = subprocess.run(
            [*arguments.get(shell, ["fish", "--no-config", "-c", script]), line],
            env=environment, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert completed.stderr == "", completed.stderr
        lines = [text.partition("\t")[0].strip() for text in completed.stdout.splitlines()]
        if shell == "bash":
            registered, *lines = lines
            assert registered.endswith("-F _dockerproxy dockerproxy")
        return [text for text in lines if text]

    return complete


NAMES = ["docker.io/library/nginx", "nginx", "nginx-extra"]


@pytest.fixture
def names(daemon: ControlSocketStub) -> None:
    daemon.answers["GET /v1/names"] = {"names": NAMES}


def test_commands(complete: Complete, names: None) -> None:
    assert {"ls", "rm", "status", "reload", "config"} <= set(complete("dockerproxy "))
    assert complete("dockerproxy relo") == ["reload"]


def test_options(complete: Complete, names: None) -> None:
    proposed = complete("dockerproxy ls --")
    assert {"--sort", "--limit", "--platforms", "--cached"} <= set(proposed)
    assert sorted(complete("dockerproxy ls --sort ")) == ["name", "pulls", "size", "used"]


@pytest.mark.parametrize("command", ["ls", "rm --force", "rm other"])
def test_names(complete: Complete, names: None, daemon: ControlSocketStub, command: str) -> None:
    assert sorted(complete(f"dockerproxy {command} ngi")) == ["nginx", "nginx-extra"]
    assert daemon.requests[0] == ("GET /v1/names?prefix=ngi", None)


def test_the_store_that_was_chosen_counts(complete: Complete, names: None, daemon: ControlSocketStub) -> None:
    complete("dockerproxy ls --cached ngi")
    assert daemon.requests[0] == ("GET /v1/names?prefix=ngi&where=cached", None)


def test_tags(complete: Complete, daemon: ControlSocketStub, shell: str) -> None:
    daemon.answers["GET /v1/names"] = {"names": ["nginx:1.28", "nginx:1.29"]}
    proposed = sorted(complete("dockerproxy rm nginx:1."))
    # A colon separates words in bash, which replaces the part after it.
    assert proposed == (["1.28", "1.29"] if shell == "bash" else ["nginx:1.28", "nginx:1.29"])
    assert daemon.requests[0] == ("GET /v1/names?prefix=nginx%3A1.", None)


def test_names_that_mean_something_to_a_shell_are_left_out(complete: Complete, daemon: ControlSocketStub) -> None:
    evil = ["nginx$(touch x)", "nginx`id`", "nginx\x1b[2J", "nginx x", "nginx;id", "nginx\nid", "-nginx", ""]
    daemon.answers["GET /v1/names"] = {"names": [*evil, "nginx-v1"]}
    assert complete("dockerproxy rm nginx") == ["nginx-v1"]


@pytest.mark.parametrize("answer", [{}, {"names": 7}, {"names": [7]}, [1], (500, {"error": "x"})], ids=str)
def test_an_unexpected_answer_proposes_nothing(complete: Complete, daemon: ControlSocketStub, answer: object) -> None:
    daemon.answers["GET /v1/names"] = answer
    assert complete("dockerproxy rm nginx") in ([], ["files"])


def test_the_socket_that_was_given_is_asked(
    complete: Complete, names: None, daemon: ControlSocketStub, tmp_path: Path
) -> None:
    daemon.path.rename(tmp_path / "other.sock")
    assert complete(f"dockerproxy --socket {tmp_path}/other.sock rm nginx-") == ["nginx-extra"]
    daemon.path = tmp_path / "other.sock"


def test_without_a_daemon(complete: Complete, daemon: ControlSocketStub) -> None:
    daemon.path.unlink()
    assert complete("dockerproxy rm ngi") in ([], ["files"])
    assert "reload" in complete("dockerproxy ")


def test_the_package_has_the_completions() -> None:
    install = (ROOT / "debian/docker-registry-proxy.install").read_text()
    for name, folder in [
        ("bash/dockerproxy", "usr/share/bash-completion/completions"),
        ("zsh/_dockerproxy", "usr/share/zsh/vendor-completions"),
        ("fish/dockerproxy.fish", "usr/share/fish/vendor_completions.d"),
    ]:
        assert (COMPLETIONS / name).exists()
        assert f"completions/{name} {folder}\n" in install
