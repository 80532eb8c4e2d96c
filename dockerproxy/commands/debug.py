"""The command `debug`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from dockerproxy.commands.status import print_refused_logins
from dockerproxy.control_client import ControlClient
from dockerproxy.terminal import Terminal, format_size, print_line


def debug(client: ControlClient, options: argparse.Namespace, terminal: Terminal) -> int:
    result = client.call("GET", "/v1/debug", None)
    if terminal.as_json:
        print_line(json.dumps(result))
        return 0
    for process in result["processes"]:
        for line in _format_process(process):
            print_line(line)
    if result["bounds"]:
        print_line("all processes")
    for bound in result["bounds"]:
        print_line(_format_bound(bound))
    for key, waiting in result["locks"].items():
        print_line(f"lock {key} held, {waiting} waiting")
    print_refused_logins(result["refused_logins"])
    return 0


def _format_process(process: dict[str, Any]) -> Iterator[str]:
    name = f"worker {process['number']}" if process["number"] else "main process"
    yield f"{name} ({process['state']}, process ID {process['pid'] or 'none'})"
    if "error" in process:
        yield f"  no report: {process['error']}"
    if "clients" not in process:
        return
    clients = ", ".join(f"{count} {setting}" for setting, count in process["clients"].items())
    upstream = process["upstream connections"]
    yield f"  clients: {clients}; tunnels: {process['tunnels']}"
    yield f"  upstream connections: {upstream['open']}, {upstream['idle']} of them idle"
    if "queued messages" in process:
        yield f"  messages: {process['queued messages']} waiting, {process['dropped hints']} hints dropped"
    yield from map(_format_bound, process["bounds"])
    for download in process["downloads"]:
        size = "?" if download["size"] is None else format_size(download["size"])
        yield (
            f"  download {download['registry']} {download['digest']}: {download['state']},"
            f" {format_size(download['written'])} of {size}, {download['waiting']} waiting"
        )


def _format_bound(bound: dict[str, Any]) -> str:
    clients = "".join(f", {client or 'the daemon'}: {count}" for client, count in bound["clients"].items())
    refused = f", {bound['refused']} refused" if bound["refused"] else ""
    share = f"{bound['share']} for one client"
    return f"  {bound['name']}: {bound['used']} of {bound['limit']}, {share}{refused}{clients}"
