"""The command `budget`."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from dockerproxy.control_client import ControlClient
from dockerproxy.terminal import Terminal, format_ago, format_window, print_line


def budget(client: ControlClient, options: argparse.Namespace, terminal: Terminal) -> int:
    result = client.call("GET", "/v1/budget", None)
    if terminal.as_json:
        print_line(json.dumps(result))
        return 0
    for limit in result["limits"]:
        print_line(f"{limit['registry']}: {_format_rate_limit(limit)}")
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
    return "; ".join(parts) or "refuses no more pulls"
