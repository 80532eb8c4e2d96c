"""The command `status`."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

from dockerproxy.control_client import PROBLEMS, ControlClient
from dockerproxy.terminal import (
    Terminal,
    format_age,
    format_ago,
    format_count,
    format_seconds,
    format_size,
    print_line,
    print_table,
)

_DAY = 86400
_BAD = "bad"


def status(client: ControlClient, options: argparse.Namespace, terminal: Terminal) -> int:
    """Show the state of the daemon. The exit status is 1 if something is bad."""
    facts = client.call("GET", "/v1/status", None)
    overview = client.call("GET", "/v1/overview?range=24h", None)
    report = client.call("GET", "/v1/doctor?quick=1", None)
    disk_fails = any("error" in store for store in facts["shelves"].values())
    level = PROBLEMS if disk_fails or report["level"] == _BAD else 0
    if terminal.as_json:
        print_line(json.dumps({**facts, "overview": overview, "doctor": report}))
        return level
    for line in _format_daemon(facts):
        print_line(line)
    print_line(_format_traffic(overview["day"]))
    print_table(
        ("REGISTRY", "STATE", "REQUESTS", "SERVED", "FROM CACHE", "P95", "BUDGET"),
        [registry_row(row) for row in overview["registries"]],
    )
    for line in (
        *_format_fleet(facts["fleet"]),
        *_format_stores(facts),
        *_format_ca(facts["ca"]),
        _format_operation(facts["operation"]),
    ):
        print_line(line)
    print_refused_logins(facts["refused_logins"])
    findings = [finding for finding in report["findings"] if finding["level"] != "ok"]
    for finding in findings:
        print_line(f"{finding['level']}: {finding['sentence']}")
    if findings:
        print_line("`dockerproxy doctor` looks closer, and says what to do")
    return level


def _format_daemon(facts: dict[str, Any]) -> Iterator[str]:
    processes = facts["processes"]
    serving = sum(process["state"] == "serving" for process in processes)
    absent = "" if serving == len(processes) else f", {serving} of them serving"
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(facts["started"]))
    yield (
        f"docker-registry-proxy {facts['version']}, running for {format_age(facts['started'])} (since {started}), "
        f"{format_count(len(processes), 'process')}{absent}"
    )
    if facts["ports"]:
        yield f"listening on {', '.join(f'''{port['address']} ({port['setting']})''' for port in facts['ports'])}"


def _format_traffic(day: dict[str, Any]) -> str:
    ratio = "" if day["ratio"] is None else f" ({100 * day['ratio']:.0f} %)"
    return (
        f"in 24 h: {format_count(day['requests'], 'request')}, {format_size(day['served'])} served, "
        f"{format_size(day['saved'])} of it from the cache{ratio}, {format_count(day['errors'], 'error')}"
    )


def registry_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Return the cells of a registry: name, state, requests, bytes, part from the cache, time and budget."""
    return (
        row["name"],
        row["problem"] or ("-" if row["up"] is None else "ok" if row["up"] else "does not answer"),
        str(row["requests"]),
        format_size(row["served"]),
        "-" if row["ratio"] is None else f"{100 * row['ratio']:.0f} %",
        "-" if row["p95"] is None else format_seconds(row["p95"]),
        _format_budget(row["budget"]),
    )


def _format_budget(limit: dict[str, Any] | None) -> str:
    if limit is None:
        return "-"
    if limit["refused_until"] > time.time():
        return f"none until {time.strftime('%H:%M:%S', time.localtime(limit['refused_until']))}"
    if limit["remaining"] is None:
        return "-"
    return f"{limit['remaining']}" + ("" if limit["limit"] is None else f" of {limit['limit']}")


def _format_fleet(members: dict[str, str]) -> Iterator[str]:
    """Yield the members of FLEET, by name, with the state of each: ``me``, ``up``, or why it is down."""
    if not members:
        return
    down = {name: state for name, state in members.items() if state not in ("me", "up")}
    me = next((name for name, state in members.items() if state == "me"), "not among them")
    yield f"fleet: {format_count(len(members), 'member')}, {len(down)} of them down; this daemon is {me}"
    for name, reason in down.items():
        yield f"member {name} is down: {reason}"


def _format_stores(facts: dict[str, Any]) -> Iterator[str]:
    cache = facts["cache"]
    for kind, store in facts["shelves"].items():
        free = "" if store["free"] is None else f", {format_size(store['free'])} free"
        usage = f", {format_size(cache['bytes'])} of {format_size(cache['limit'])} used" if kind == "cached" else ""
        file_system = f" on {store['file_system']}" if store["file_system"] else ""
        error = f": {store['error']}" if "error" in store else ""
        yield f"{kind} in {store['directory']}{file_system}{error}{usage}{free}"


def _format_ca(ca: dict[str, Any]) -> Iterator[str]:
    left = ca["expires"] - time.time()
    end = time.strftime("%Y-%m-%d", time.localtime(ca["expires"]))
    verb = f"ends {end} (in {format_count(int(left // _DAY), 'day')})" if left > 0 else f"ended {end}"
    yield f"the CA certificate {verb}"
    yield f"SHA-256 of the CA certificate: {ca['sha256']}"


def _format_operation(operation: dict[str, Any] | None) -> str:
    if operation is None:
        return "idle"
    return f"{operation['name']} of {operation['user']} running for {format_age(operation['since'])}"


def print_refused_logins(logins: Sequence[dict[str, Any]]) -> None:
    """Print a line for each login that a registry has refused."""
    for login in logins:
        print_line(
            f"login for {login['registry']} ({login['setting']}) refused since {format_ago(login['since'])}: "
            f"{login['reason']}"
        )
