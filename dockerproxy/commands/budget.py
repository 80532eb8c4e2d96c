"""The command `budget`."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from typing import Any

from dockerproxy.control_client import ControlClient
from dockerproxy.terminal import Terminal, format_ago, format_count, format_window, print_line


def budget(client: ControlClient, options: argparse.Namespace, terminal: Terminal) -> int:
    result = client.call("GET", "/v1/budget", None)
    if terminal.as_json:
        print_line(json.dumps(result))
        return 0
    for limit in result["limits"]:
        login = f" (login {limit['login']})" if limit["login"] else ""
        print_line(f"{limit['registry']}{login}: {_format_rate_limit(limit)}")
        for line in _format_use(limit):
            print_line(f"  {line}")
    if not result["limits"]:
        print_line("no registry has named a limit of pulls yet")
    return 0


def _format_rate_limit(limit: dict[str, Any]) -> str:
    parts = []
    if limit["remaining"] is not None:
        of_all = "" if limit["limit"] is None else f" of {limit['limit']}"
        window = "" if limit["window"] is None else f" in {format_window(limit['window'])}"
        source = "" if limit["source"] is None else f" for {limit['source']}"
        parts.append(f"{limit['remaining']}{of_all} pulls left{window}{source}, {format_ago(limit['seen'])}")
    if limit["refused_until"] > time.time():
        parts.append(f"refuses more until {time.strftime('%H:%M:%S', time.localtime(limit['refused_until']))}")
    elif limit["turns"] is not None:
        parts.append(f"more by {time.strftime('%H:%M:%S', time.localtime(limit['turns']))}")
    return "; ".join(parts) or "refuses no more pulls"


def _format_use(limit: dict[str, Any]) -> Iterator[str]:
    """Yield how fast the pulls go, what is kept for clients, and which repositories took them."""
    if limit["gone_in"] is not None:
        yield f"{format_count(limit['last_hour'], 'pull')} in the last hour: gone in {_format_span(limit['gone_in'])}"
    if limit["reserved"]:
        yield f"`dockerproxy pull` leaves {limit['reserved']} to clients"
    if limit["top"]:
        names = ", ".join(f"{row['repository']} {row['pulls']}" for row in limit["top"])
        yield f"used by {names}"


def _format_span(seconds: float) -> str:
    for noun, length in (("day", 86400), ("hour", 3600)):
        if seconds >= 2 * length:
            return format_count(round(seconds / length), noun)
    return format_count(max(1, round(seconds / 60)), "minute")
