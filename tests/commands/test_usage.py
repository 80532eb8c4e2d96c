"""Options that cannot be used together, and values that no command takes: wrong usage, before the daemon is asked."""

from __future__ import annotations

import argparse
from itertools import combinations

import pytest

from dockerproxy import cli
from tests.commands.conftest import ControlSocketStub, Run

REFUSED = {
    "ls": {
        ("--cached", "--hosted"), ("--platforms", "--quiet"), ("--digests", "--quiet"),
    },
    "rm": {("--cached", "--hosted")},
    "pull": {
        ("--cancel", "--pin"), ("--cancel", "--dry-run"), ("--cancel", "--detach"), ("--cancel", "--platform"),
        ("--cancel", "--referrers"), ("--detach", "--dry-run"),
    },
    "pins": {("--missing", "--refresh"), ("--all", "--missing")},
}  # fmt: skip
"""The pairs of options that a command refuses. The second one of `pins` lacks --refresh."""

NEEDED = {("pins", "--all"): "--refresh"}
VALUES = {"N": "1", "TIME": "1h", "P[,P]": "linux/amd64", "OS/ARCH": "linux/amd64", "FILE": "list.txt", "ADDRESS": "a"}


def commands() -> dict[str, argparse.ArgumentParser]:
    (subparsers,) = [
        action for action in cli._build_parser()._actions if isinstance(action, argparse._SubParsersAction)
    ]
    return dict(subparsers.choices)


def words(action: argparse.Action) -> list[str]:
    flag = action.option_strings[-1]
    if action.nargs == 0:
        return [flag]
    return [flag, next(iter(action.choices)) if action.choices else VALUES[str(action.metavar)]]


def is_refused(parser: argparse.ArgumentParser, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> bool:
    try:
        parser.parse_args(arguments)
    except SystemExit as error:
        assert error.code == 2
        return True
    finally:
        capsys.readouterr()
    return False


@pytest.mark.parametrize("command", sorted(commands()))
def test_every_pair_of_options_works_or_is_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody asks for something that is silently left out. A new option has to be listed here."""
    parser = commands()[command]
    options = {
        action.option_strings[-1]: action
        for action in parser._actions
        if action.option_strings and action.dest not in ("help", "socket", "json")
    }
    needs_name = any(not action.option_strings and action.nargs in (None, "+") for action in parser._actions)
    refused = set()
    for names in combinations(sorted(options), 2):
        arguments = [word for name in names for word in words(options[name])] + ["nginx"] * needs_name
        if is_refused(parser, arguments, capsys):
            refused.add(names)
    assert refused == REFUSED.get(command, set())
    for name, action in options.items():
        alone = words(action) + ["nginx"] * needs_name
        assert is_refused(parser, alone, capsys) == ((command, name) in NEEDED)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("pull", "nginx", "--cancel", "--pin"), "--cancel and --pin cannot be used together"),
        (("pull", "nginx", "--cancel", "--dry-run"), "--cancel and --dry-run cannot be used together"),
        (("pull", "--dry-run", "--detach", "nginx"), "--dry-run and --detach cannot be used together"),
        (("pins", "--all"), "--all needs --refresh"),
        (("ls", "-q", "--json"), "--quiet and --json cannot be used together"),
        (("--json", "ls", "-q"), "--quiet and --json cannot be used together"),
        (("pull", ""), "argument IMAGE: it is empty"),
        (("rm", ""), "argument NAME: it is empty"),
        (("ls", ""), "argument NAME: it is empty"),
        (("import", ""), "argument DIR: it is empty"),
        (("pull", "nginx", "--platform", ""), "'' is not a platform such as linux/amd64"),
        (("pull", "nginx", "--platform", "linux/amd64,"), "'' is not a platform such as linux/amd64"),
        (("pull", "nginx", "--platform", "amd64"), "'amd64' is not a platform such as linux/amd64"),
        (("pull", "nginx", "--platform", "linux/arm/v7/x"), "'linux/arm/v7/x' is not a platform"),
        (("pull", "nginx", "--platform", "linux//"), "'linux//' is not a platform"),
        (("pull", "nginx", "--platform", "all,linux/amd64"), "all includes every other platform"),
        (("why", "nginx", "--platform", "arm64"), "'arm64' is not a platform"),
    ],
)
def test_wrong_usage_is_one_sentence(
    daemon: ControlSocketStub, run: Run, arguments: tuple[str, ...], sentence: str
) -> None:
    status, _, errors = run(*arguments)
    assert status == 2
    assert sentence in errors
    assert "Traceback" not in errors and daemon.requests == []
