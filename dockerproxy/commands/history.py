"""The commands `why` and `history`."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any
from urllib.parse import urlencode

from dockerproxy.commands.events import gather
from dockerproxy.control_client import ControlClient
from dockerproxy.terminal import Terminal, format_ago, format_count, format_size, print_line, print_table

_DIGEST_LENGTH = 19  # characters of a digest that are shown

Document = dict[str, Any]


def why(client: ControlClient, options: argparse.Namespace, terminal: Terminal) -> int:
    query = {"name": options.name} | ({"platform": options.platform} if options.platform else {})
    result = client.call("GET", f"/v1/why?{urlencode(query)}", None)
    if terminal.as_json:
        print_line(json.dumps(result))
        return 0
    print_line(f"{result['name']} ({result['where'] if result['known'] else 'nothing of it is here'})")
    print_line("")
    print_line("Now:")
    for line in _now(result):
        print_line(f"  {line}")
    if result["contents"]:
        print_line("")
        print_table(
            ("CONTENT", "DIGEST", "PLATFORM", "SIZE", "STATE"), [_content_row(one) for one in result["contents"]]
        )
    print_line("")
    pulls = result["pulls"]
    counted = f"{format_count(pulls['pulls'], 'pull')} by {format_count(pulls['hosts'], 'host')}"
    print_line(f"{counted} in {pulls['days']} days")
    if result["happened"]:
        print_rows(list(reversed(result["happened"])))
    return 0


def history(client: ControlClient, options: argparse.Namespace, terminal: Terminal) -> int:
    query = {"name": options.name, "since": options.since, "client": options.client}
    query = {name: value for name, value in query.items() if value is not None}
    rows, result = gather(client.stream_events("GET", f"/v1/history?{urlencode(query)}"), terminal)
    rows.reverse()
    if terminal.as_json:
        print_line(json.dumps({**result, "pulls": rows}))
        return 0
    if not result["kept"]:
        print_line("no history is kept (PULL_HISTORY=off)")
    elif not rows:
        print_line("no such pulls")
    else:
        print_rows(rows, with_repository=True)
    if result["more"]:
        print_line(f"these are the newest {len(rows)}; --since shows more")
    return 0


def print_rows(rows: list[Document], *, with_repository: bool = False) -> None:
    """Print rows of the history as a table."""
    header = ("WHEN", "CLIENT", "IMAGE" if with_repository else "CONTENT", "RESULT", "REASON")
    print_table(header, [_history_row(row, with_repository) for row in rows])


def _now(result: Document) -> list[str]:
    lines = []
    if not result["tags"] and not result["contents"] and result["readers"] is not None:
        registry = result["name"].partition("/")[0]
        lines.append(f"no tag of it is known here: {registry} is asked by GET, which counts as a pull")
    for tag in result["tags"]:
        asked = "" if tag.get("asked") is None else f" (asked {format_ago(tag['asked'])})"
        fresh = "" if tag.get("fresh_until") is None else f" until {_clock_time(tag['fresh_until'])}"
        lines.append(f"tag {tag['tag']}{asked}: {tag['sentence']}{fresh}")
    if result["refused_until"] is not None:
        lines.append(f"its registry refuses pulls until {_clock_time(result['refused_until'])}")
    if result["readers"] is not None:
        at = "" if result["readers"]["at"] is None else f", {format_ago(result['readers']['at'])}"
        lines.append(f"readable by {result['readers']['sentence']}{at}")
    return lines or ["nothing of it is here"]


def _content_row(content: Document) -> tuple[str, ...]:
    size = "-" if content["size"] is None else format_size(content["size"])
    digest = content["digest"][:_DIGEST_LENGTH]
    return content["kind"], digest, content["platform"] or "-", size, content["sentence"]


def _history_row(row: Document, with_repository: bool) -> tuple[str, ...]:
    reference = row["reference"]
    if row["kind"] == "blob":
        what = f"{format_count(row['blobs'], 'blob')}, {format_size(row['bytes'])}"
        image = f"{row['repository']}: {what}"
    else:
        is_digest = ":" in reference
        shown = reference[:_DIGEST_LENGTH] if is_digest else reference
        what, image = shown, f"{row['repository']}{'@' if is_digest else ':'}{shown}"
    who = row["client"] if row["user"] is None else f"{row['user']} at {row['client']}"
    became = row["verdict"] if row["status"] < 400 else str(row["status"])
    count = f" ({row['requests']} times)" if row["requests"] > 1 and row["kind"] != "blob" else ""
    return (
        row["time"].replace("T", " ").rstrip("Z"),
        who,
        (image if with_repository else what) + count,
        became,
        row["explanation"],
    )


def _clock_time(timestamp: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(timestamp))
