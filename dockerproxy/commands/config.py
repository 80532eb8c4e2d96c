"""The commands `config` and `reload`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from dockerproxy.control_client import PROBLEMS, ControlClient
from dockerproxy.terminal import Terminal, format_list, print_line, print_table


def config(client: ControlClient, options: argparse.Namespace, terminal: Terminal) -> int:
    """Show the settings in force and where each comes from, or check a file."""
    if options.check is not None:
        return _check(options.check, terminal)
    result = client.call("GET", "/v1/config", None)
    if terminal.as_json:
        print_line(json.dumps(result))
        return 0
    print_table(
        ("SETTING", "VALUE", "FROM"), [(row["name"], _value(row["value"]), _source(row)) for row in result["settings"]]
    )
    for row in result["settings"]:
        if row["pending"] is not None:
            print_line(f"{row['name']} is {row['pending'] or 'not set'} now; restart the daemon to apply it")
    for warning in result["warnings"]:
        print_line(warning)
    return 0


def _value(text: str) -> str:
    return text if text.strip() else repr(text) if text else "-"


def _source(row: dict[str, Any]) -> str:
    match row["source"]:
        case "default":
            return "default"
        case "file":
            return str(row["place"])
        case kind:
            return str(kind) if row["place"] == row["name"] else f"{kind} ({row['place']})"


def _check(path: str, terminal: Terminal) -> int:
    from dockerproxy.config_check import check_env_file

    refused, warnings = check_env_file(path)
    if terminal.as_json:
        print_line(json.dumps({"usable": refused is None, "refused": refused, "warnings": list(warnings)}))
    else:
        for warning in warnings:
            print_line(warning)
        print_line(f"{path} can be used" if refused is None else f"{path} cannot be used: {refused}")
    return 0 if refused is None else PROBLEMS


def reload(client: ControlClient, options: argparse.Namespace, terminal: Terminal) -> int:
    """Make the daemon read its settings again, and print the result."""
    result = client.call("POST", "/v1/reload", {})
    failed = result["refused"] is not None or bool(result["problems"])
    if terminal.as_json:
        print_line(json.dumps(result))
        return PROBLEMS if failed else 0
    for warning in result["warnings"]:
        print_line(warning)
    for problem in result["problems"]:
        print_line(problem)
    if result["needing_restart"]:
        print_line(f"a restart is needed to apply {format_list(result['needing_restart'])}")
    if result["refused"] is None:
        print_line(f"reloaded: {result['status']}")
    else:
        print_line(f"not reloaded, the settings are unchanged: {result['refused']}")
    return PROBLEMS if failed else 0
