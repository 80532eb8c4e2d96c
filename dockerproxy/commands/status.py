"""The command `status`."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

from dockerproxy.control_client import ControlClient
from dockerproxy.terminal import Terminal, format_age, format_ago, format_size, print_line


def status(client: ControlClient, options: argparse.Namespace, terminal: Terminal) -> int:
    result = client.call("GET", "/v1/status", None)
    if terminal.as_json:
        print_line(json.dumps(result))
        return 0
    cache, operation = result["cache"], result["operation"]
    print_line(f"running since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(result['started']))}")
    for kind, store in result["shelves"].items():
        free = "" if store["free"] is None else f", {format_size(store['free'])} free"
        usage = f", {format_size(cache['bytes'])} of {format_size(cache['limit'])} used" if kind == "cached" else ""
        problem = f" on {store['file_system']}" if store["file_system"] else ""
        problem += f": {store['error']}" if "error" in store else ""
        print_line(f"{kind} in {store['directory']}{problem}{usage}{free}")
    print_line(f"SHA-256 of the CA certificate: {result['ca']['sha256']}")
    if operation is None:
        print_line("idle")
    else:
        print_line(f"{operation['name']} of {operation['user']} running for {format_age(operation['since'])}")
    print_refused_logins(result["refused_logins"])
    return 0


def print_refused_logins(logins: Sequence[dict[str, Any]]) -> None:
    """Print a line for each login that a registry has refused."""
    for login in logins:
        print_line(
            f"login for {login['registry']} ({login['setting']}) refused since {format_ago(login['since'])}: "
            f"{login['reason']}"
        )
