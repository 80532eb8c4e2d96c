"""The commands `ls` and `rm`."""

from __future__ import annotations

import argparse
import json
from urllib.parse import urlencode

from dockerproxy.commands.events import gather
from dockerproxy.control_client import ControlClient, Event
from dockerproxy.terminal import Terminal, format_ago, format_count, format_size, print_line, print_table


def list_(client: ControlClient, options: argparse.Namespace, terminal: Terminal) -> int:
    query = {name: value for name, value in (("name", options.name), ("where", options.where)) if value}
    rows, result = gather(client.stream_events("GET", f"/v1/repositories?{urlencode(query)}"), terminal)
    if terminal.as_json:
        print_line(json.dumps({**result, "manifests" if options.name else "repositories": rows}))
    elif options.name:
        print_line(f"{result['name']} ({result['where']})")
        print_table(("TAG", "DIGEST", "SIZE", "LAST USED"), [_manifest_row(row) for row in rows])
    else:
        print_table(
            ("REPOSITORY", "", "TAGS", "MANIFESTS", "SIZE", "LAST USED"), [_repository_row(row) for row in rows]
        )
    return 0


def _repository_row(row: Event) -> tuple[str, ...]:
    counts = str(row["tags"]), str(row["manifests"])
    return (row["name"], row["where"], *counts, format_size(row["size"]), format_ago(row["last_used"]))


def _manifest_row(row: Event) -> tuple[str, ...]:
    return (
        row["tag"] or row["needed_by"] or "-",
        row["digest"],
        format_size(row["size"]),
        format_ago(row["last_used"]),
    )


def remove(client: ControlClient, options: argparse.Namespace, terminal: Terminal) -> int:
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
