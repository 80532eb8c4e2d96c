"""The command `dockerproxy`: list, remove and verify hosted and cached images through the control socket of the daemon.

Exit status: 0 success; 1 completed, and found a problem (`check`, `import`, `gc`); 2 wrong usage; 3 the daemon is not
running; 4 no such image or repository; 5 permission denied; 6 the daemon is busy with another of these commands; 7 the
command failed, or the daemon stopped; 130 interrupted.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from urllib.parse import urlencode

from dockerproxy import __version__
from dockerproxy.control_client import (
    DISCONNECTED,
    FAILED,
    INTERRUPTED,
    NOT_OURS,
    PROBLEMS,
    USAGE,
    CommandError,
    ControlClient,
    Event,
)
from dockerproxy.durations import parse_duration
from dockerproxy.terminal import (
    Terminal,
    format_age,
    format_ago,
    format_count,
    format_size,
    format_window,
    print_line,
    print_table,
)

_HIDDEN_DIRECTORY_HINT = (
    "the daemon cannot read it: it runs as another user, and its service hides /home, /root and /tmp"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    options = _build_parser().parse_args(arguments)
    terminal = Terminal(as_json=getattr(options, "json", False))
    client = ControlClient(getattr(options, "socket", None))
    try:
        status = _run(client, options, terminal)
        sys.stdout.flush()
    except CommandError as error:
        terminal.clear_progress()
        _print_error(error, terminal.as_json)
        return error.status
    except KeyboardInterrupt:
        terminal.clear_progress()
        print_line("dockerproxy: interrupted; changes made so far are kept", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output closed the pipe. Replace stdout, because Python flushes it at exit and would print
        # the error again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def _run(client: ControlClient, options: argparse.Namespace, terminal: Terminal) -> int:
    try:
        status: int = options.run(client, options, terminal)
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError):
        # The daemon's answer is not what this version of the command expects.
        raise CommandError(FAILED, NOT_OURS) from None
    return status


def _print_error(error: CommandError, as_json: bool) -> None:
    if as_json:
        print_line(json.dumps({"error": {"message": error.message, "suggestions": list(error.suggestions)}}))
    print_line(f"dockerproxy: {error.message}", file=sys.stderr)
    if error.suggestions:
        print_line(f"Did you mean {' or '.join(error.suggestions)}? Nothing was changed.", file=sys.stderr)


def _build_parser() -> argparse.ArgumentParser:
    common_options = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common_options.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    common_options.add_argument(
        "--socket", metavar="PATH", help="the control socket of the daemon, if it is not the default one"
    )
    parser = argparse.ArgumentParser(
        "dockerproxy", description="List, remove and verify images in docker-registry-proxy.", parents=[common_options],
        epilog=(__doc__ or "").partition("\n\n")[2],
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add_command(name: str, run: Callable[..., int], text: str) -> argparse.ArgumentParser:
        subparser = commands.add_parser(name, help=text, description=text, parents=[common_options])
        subparser.set_defaults(run=run)
        return subparser

    def add_store_options(subparser: argparse.ArgumentParser) -> None:
        group = subparser.add_mutually_exclusive_group()
        group.add_argument("--hosted", dest="where", action="store_const", const="hosted", help="hosted images only")
        group.add_argument("--cached", dest="where", action="store_const", const="cached", help="cached images only")

    ls = add_command("ls", list_, "list repositories, or the tags and manifests of one")
    ls.add_argument("name", nargs="?", metavar="NAME", help="REPO, or HOST/REPO for a cached repository")
    add_store_options(ls)
    rm = add_command("rm", remove, "remove images, or all images of a repository; gc frees the space of hosted ones")
    rm.add_argument("names", nargs="+", metavar="NAME", help="REPO:TAG, REPO@DIGEST or REPO; HOST/REPO… if cached")
    rm.add_argument("--force", action="store_true", help="also remove what the index of a tag needs")
    add_store_options(rm)
    gc = add_command("gc", collect, "delete hosted blobs that no manifest needs")
    gc.add_argument("--dry-run", action="store_true", help="only report what would be deleted")
    gc.add_argument("--delete-untagged", action="store_true", help="also delete manifests that no tag leads to")
    gc.add_argument(
        "--grace", type=_duration, metavar="TIME", help="keep everything used within TIME (default 1h, minimum 2m)"
    )
    import_command = add_command("import", import_, "import the storage directory of another registry (registry:2)")
    import_command.add_argument(
        "directory", metavar="DIR", help="the storage directory; the daemon must be able to read it"
    )
    import_command.add_argument("--force", action="store_true", help="overwrite tags that exist in both")
    check_command = add_command("check", check, "verify the digest of every blob and move damaged ones to damaged/")
    check_command.add_argument("--cached", action="store_true", help="verify cached blobs instead of hosted ones")
    add_command("status", status, "show disk usage, running operations, refused logins and the CA's fingerprint")
    add_command("budget", budget, "show how many pulls registries still allow, and until when they refuse more")
    add_command("debug", debug, "show what each process is doing: downloads, connections, waiting work, locks")
    return parser


def _duration(text: str) -> float:
    try:
        return parse_duration(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 30m or 1h") from None


# the commands


def list_(client: ControlClient, options: argparse.Namespace, terminal: Terminal) -> int:
    query = {name: value for name, value in (("name", options.name), ("where", options.where)) if value}
    rows, result = _gather(client.stream_events("GET", f"/v1/repositories?{urlencode(query)}"), terminal)
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


def collect(client: ControlClient, options: argparse.Namespace, terminal: Terminal) -> int:
    body = {
        "dry_run": options.dry_run,
        "delete_untagged": options.delete_untagged,
        "list": options.dry_run or terminal.as_json,
    }
    if options.grace is not None:
        body["grace"] = options.grace
    removed, result = _gather(client.stream_events("POST", "/v1/collect", body), terminal)
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
        findings, result = _gather(client.stream_events("POST", "/v1/import", body), terminal)
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
    findings, result = _gather(client.stream_events("POST", "/v1/check", {"cached": options.cached}), terminal)
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
    return PROBLEMS if findings else 0


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


def _format_objects(result: Event, name: str) -> str:
    return f"{format_count(result[name], 'blob')} ({format_size(result[f'{name}_bytes'])})"


def _gather(events: Iterator[Event], terminal: Terminal) -> tuple[list[Event], Event]:
    """Return the items that the daemon reports, and its result. Show its progress meanwhile."""
    items: list[Event] = []
    for event in events:
        match event.pop("event"):
            case "progress":
                terminal.show_progress(event["phase"], event["done"], event["total"])
            case "result":
                terminal.clear_progress()
                return items, event
            case "error":
                raise CommandError(FAILED, event["message"])
            case _:
                items.append(event)
    raise CommandError(FAILED, DISCONNECTED)


if __name__ == "__main__":
    sys.exit(main())
