"""The commands `gc`, `import` and `check`."""

from __future__ import annotations

import argparse
import json
import os

from dockerproxy.commands.events import gather
from dockerproxy.control_client import PROBLEMS, USAGE, CommandError, ControlClient, Event
from dockerproxy.terminal import Terminal, format_count, format_size, print_line

_HIDDEN_DIRECTORY_HINT = (
    "the daemon cannot read it: it runs as another user, and its service hides /home, /root and /tmp"
)


def collect(client: ControlClient, options: argparse.Namespace, terminal: Terminal) -> int:
    body = {
        "dry_run": options.dry_run,
        "delete_untagged": options.delete_untagged,
        "list": options.dry_run or terminal.as_json,
    }
    if options.grace is not None:
        body["grace"] = options.grace
    removed, result = gather(client.stream_events("POST", "/v1/collect", body), terminal)
    if terminal.as_json:
        print_line(json.dumps({**result, "removed": removed}))
        return PROBLEMS if result["problems"] else 0
    if options.dry_run:
        for item in removed:
            print_line(" ".join(filter(None, (item["kind"], item["repository"], item["digest"]))))
    print_line(
        f"{'would delete' if options.dry_run else 'deleted'} {format_count(result['manifests'], 'manifest')}, "
        f"{format_count(result['links'], 'link')} and {format_count(result['blobs'], 'blob')} "
        f"({format_size(result['bytes'])}); "
        f"kept {format_count(result['needed'], 'blob')} in {format_count(result['repositories'], 'repository')}"
    )
    if result["uploads"]:
        verb = "would delete" if options.dry_run else "deleted"
        print(f"{verb} {format_count(result['uploads'], 'unfinished upload')}, given up before the grace period")
    if result["recent_manifests"] or result["recent"]:
        manifests = format_count(result["recent_manifests"], "untagged manifest")
        print_line(f"kept, because used within the grace period: {manifests} and {_format_objects(result, 'recent')}")
    if result["foreign"]:
        print_line(f"kept, because the file belongs to another user: {_format_objects(result, 'foreign')}")
    for problem in result["problems"]:
        print_line(problem)
    return PROBLEMS if result["problems"] else 0


def import_(client: ControlClient, options: argparse.Namespace, terminal: Terminal) -> int:
    directory = os.path.abspath(options.directory)
    body = {"directory": directory, "force": options.force}
    try:
        findings, result = gather(client.stream_events("POST", "/v1/import", body), terminal)
    except CommandError as error:
        if error.status == USAGE and _is_registry_directory(directory):
            error.message += f" ({_HIDDEN_DIRECTORY_HINT})"
        raise
    if terminal.as_json:
        print_line(json.dumps({**result, "findings": findings}))
        return PROBLEMS if findings else 0
    for finding in findings:
        print_line(finding["what"])
    print_line(
        f"{format_count(result['repositories'], 'repository')}: "
        f"{format_count(result['hardlinked'], 'blob')} hard-linked, "
        f"{result['copied']} copied ({format_size(result['bytes'])}), {result['present']} already present; "
        f"{format_count(result['manifests'], 'manifest')} and {format_count(result['tags'], 'tag')} added"
    )
    if result["conflicts"]:
        print_line("use --force to overwrite existing tags")
    return PROBLEMS if findings else 0


def _is_registry_directory(directory: str) -> bool:
    try:
        return all(os.listdir(f"{directory}/docker/registry/v2/{part}") for part in ("blobs", "repositories"))
    except OSError:
        return False


def check(client: ControlClient, options: argparse.Namespace, terminal: Terminal) -> int:
    findings, result = gather(client.stream_events("POST", "/v1/check", {"cached": options.cached}), terminal)
    if terminal.as_json:
        print_line(json.dumps({**result, "findings": findings}))
        return PROBLEMS if findings else 0
    for finding in findings:
        print_line(finding["what"])
    print_line(
        f"checked {format_count(result['blobs'], 'blob')} ({format_size(result['bytes'])}), "
        f"{format_count(result['links'], 'link')} and {format_count(result['tags'], 'tag')} "
        f"in {format_count(result['repositories'], 'repository')}: "
        + (
            f"{format_count(len(findings), 'problem')}, {format_count(result['damaged'], 'blob')} moved to damaged/"
            if findings
            else "no problems"
        )
    )
    if result.get("unlinked"):
        print_line(f"{format_count(result['unlinked'], 'blob')} of no repository, for `dockerproxy gc` to delete")
    return PROBLEMS if findings else 0


def _format_objects(result: Event, name: str) -> str:
    return f"{format_count(result[name], 'blob')} ({format_size(result[f'{name}_bytes'])})"
