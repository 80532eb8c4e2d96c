"""The commands `status`, `budget` and `debug`."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

from dockerproxy.control_client import ControlClient
from dockerproxy.terminal import Terminal, format_age, format_ago, format_size, format_window, print_line


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
    _print_refused_logins(result["refused_logins"])
    return 0


def _print_refused_logins(logins: Sequence[dict[str, Any]]) -> None:
    for login in logins:
        print_line(
            f"login for {login['registry']} ({login['setting']}) refused since {format_ago(login['since'])}: "
            f"{login['reason']}"
        )


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
    _print_refused_logins(result["refused_logins"])
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
