"""The commands `ls` and `rm`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode

from dockerproxy.commands.events import gather
from dockerproxy.control_client import USAGE, CommandError, ControlClient, Event
from dockerproxy.terminal import Terminal, format_ago, format_count, format_size, print_line, print_table

_GLOB = frozenset("*?[")
_PLATFORMS_SHOWN = 2  # without --platforms
_DIGEST_SHOWN = len("sha256:") + 12  # characters without --digests, as in docker

# The largest, latest and most pulled come first.
_SORT_KEYS: dict[str, Callable[[Event], Any]] = {
    "name": lambda row: row["name"],
    "size": lambda row: -row["size"],
    "used": lambda row: -(row["last_used"] or 0),
    "pulls": lambda row: -(row["pulls"] or 0),
}


def list_(client: ControlClient, options: argparse.Namespace, terminal: Terminal) -> int:
    """List repositories, or the tags and manifests of one."""
    if options.quiet and terminal.as_json:
        raise CommandError(USAGE, "--quiet and --json cannot be used together")
    is_glob = options.name is not None and not _GLOB.isdisjoint(options.name)
    if options.name and not is_glob:
        return _list_manifests(client, options, terminal)
    if options.digests:
        raise CommandError(USAGE, "--digests needs the NAME of one repository")
    query = _query(match=options.name, where=options.where)
    rows, result = gather(client.stream_events("GET", f"/v1/repositories?{query}"), terminal)
    shown = _chosen(rows, options)
    size = sum(row["size"] for row in rows)
    if terminal.as_json:
        print_line(json.dumps({**result, "count": len(rows), "size": size, "repositories": shown}))
    elif options.quiet:
        for row in shown:
            print_line(row["name"])
    else:
        columns = ["REPOSITORY", "KIND", "TAGS", "PLATFORMS", "SIZE", "PULLS", "LAST USED"]
        print_table(columns, [_repository_row(row, options) for row in shown])
        print_line(f"{format_count(len(rows), 'repository')}, {format_size(size)}{_limit_note(rows, shown)}")
    return 0


def _list_manifests(client: ControlClient, options: argparse.Namespace, terminal: Terminal) -> int:
    if options.sort == "pulls":
        raise CommandError(USAGE, "the pulls of a tag are not counted; --sort pulls is for a list of repositories")
    query = _query(name=options.name, where=options.where)
    rows, result = gather(client.stream_events("GET", f"/v1/repositories?{query}"), terminal)
    name = result["name"]
    for row in rows:
        row["name"] = f"{name}@{row['digest']}" if row["tag"] is None else f"{name}:{row['tag']}"
    shown = _chosen(rows, options)
    if terminal.as_json:
        print_line(json.dumps({**result, "manifests": shown}))
    elif options.quiet:
        for row in shown:
            print_line(row["name"])
    else:
        print_line(f"{name} ({result['where']})")
        print_table(("TAG", "DIGEST", "PLATFORMS", "SIZE", "LAST USED"), [_manifest_row(row, options) for row in shown])
        tags = sum(row["tag"] is not None for row in rows)
        manifests = len({row["digest"] for row in rows})
        print_line(f"{format_count(tags, 'tag')}, {format_count(manifests, 'manifest')}{_limit_note(rows, shown)}")
    return 0


def _query(**arguments: str | None) -> str:
    return urlencode({name: value for name, value in arguments.items() if value}, errors="surrogateescape")


def _chosen(rows: list[Event], options: argparse.Namespace) -> list[Event]:
    """Return the rows that are shown, in the order that the user asked for; by default the daemon's."""
    if options.sort is not None:
        rows = sorted(rows, key=_SORT_KEYS[options.sort])
    return (rows[::-1] if options.reverse else rows)[: options.limit]


def _limit_note(rows: list[Event], shown: list[Event]) -> str:
    return "" if len(shown) == len(rows) else f"; {len(shown)} shown"


def _repository_row(row: Event, options: argparse.Namespace) -> tuple[str, ...]:
    return (
        row["name"],
        row["where"],
        str(row["tags"]),
        _format_platforms(row["platforms"], options),
        format_size(row["size"]),
        "-" if row["pulls"] is None else str(row["pulls"]),
        format_ago(row["last_used"]),
    )


def _manifest_row(row: Event, options: argparse.Namespace) -> tuple[str, ...]:
    return (
        row["tag"] or row["needed_by"] or "-",
        row["digest"] if options.digests else row["digest"][:_DIGEST_SHOWN],
        _format_platforms(row["platforms"], options),
        format_size(row["size"]),
        format_ago(row["last_used"]),
    )


def _format_platforms(platforms: list[str], options: argparse.Namespace) -> str:
    shown = platforms if options.platforms else platforms[:_PLATFORMS_SHOWN]
    more = len(platforms) - len(shown)
    return ", ".join([*shown, *([f"{more} more"] if more else [])]) or "-"


def remove(client: ControlClient, options: argparse.Namespace, terminal: Terminal) -> int:
    """Remove images, or repositories with all their images."""
    body = {"names": options.names} | ({"where": options.where} if options.where else {})
    if options.force:
        body["force"] = True
    result = client.call("POST", "/v1/remove", body)
    if terminal.as_json:
        print_line(json.dumps(result))
        return 0
    for entry in result["removed"]:
        summary = f"{format_count(entry['tags'], 'tag')}, {format_count(entry['manifests'], 'manifest')}"
        if entry["where"] == "cached":
            summary += f", {format_count(entry['blobs'], 'blob')} ({format_size(entry['bytes'])})"
        print_line(f"removed {entry['name']} ({entry['where']}): {summary}")
    if any(entry["where"] == "hosted" for entry in result["removed"]):
        print_line("Run `dockerproxy gc --delete-untagged` to free the space.")
    return 0
