"""The command `dockerproxy`: list, remove and verify hosted and cached images through the control socket of the daemon.

Exit status: 0 success; 1 completed, and found a problem (`check`, `import`, `gc`); 2 wrong usage; 3 the daemon is not
running; 4 no such image or repository; 5 permission denied; 6 the daemon is busy with another of these commands; 7 the
command failed, or the daemon stopped; 130 interrupted.
"""

from __future__ import annotations

import argparse
import grp
import http.client
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from urllib.parse import urlencode

from dockerproxy import __version__
from dockerproxy.durations import parse_duration
from dockerproxy.terminal import Terminal, format_age, format_ago, format_count, format_size, print_table

PROBLEMS, USAGE, NOT_RUNNING, NOT_FOUND, NOT_PERMITTED, BUSY, FAILED, INTERRUPTED = 1, 2, 3, 4, 5, 6, 7, 130

_HIDDEN_DIRECTORY_HINT = (
    "the daemon cannot read it: it runs as another user, and its service hides /home, /root and /tmp"
)
_DISCONNECTED = "the daemon closed the connection before it finished"
_EXIT_STATUS_BY_HTTP = {400: USAGE, 404: NOT_FOUND, 409: BUSY}

Event = dict[str, Any]


class CommandError(Exception):
    """A command failed. `status` is the exit status, `message` a sentence, `suggestions` are similar names."""

    def __init__(self, status: int, message: str, suggestions: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.status, self.message, self.suggestions = status, message, tuple(suggestions)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = _build_parser().parse_args(arguments)
    terminal = Terminal(as_json=getattr(options, "json", False))
    try:
        status: int = options.run(ControlClient(getattr(options, "socket", None)), options, terminal)
        sys.stdout.flush()
    except CommandError as error:
        terminal.clear_progress()
        _print_error(error, terminal.as_json)
        return error.status
    except KeyboardInterrupt:
        terminal.clear_progress()
        print("dockerproxy: interrupted; changes made so far are kept", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output closed the pipe. Replace stdout, because Python flushes it at exit and would print
        # the error again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def _print_error(error: CommandError, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"error": {"message": error.message, "suggestions": list(error.suggestions)}}))
    print(f"dockerproxy: {error.message}", file=sys.stderr)
    if error.suggestions:
        print(f"Did you mean {' or '.join(error.suggestions)}? Nothing was changed.", file=sys.stderr)


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
    add_command("status", status, "show disk usage, running operations and the CA's fingerprint")
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
        print(json.dumps({**result, "manifests" if options.name else "repositories": rows}))
    elif options.name:
        print(f"{result['name']} ({result['where']})")
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
    return (row["tag"] or "-", row["digest"], format_size(row["size"]), format_ago(row["last_used"]))


def remove(client: ControlClient, options: argparse.Namespace, terminal: Terminal) -> int:
    body = {"names": options.names} | ({"where": options.where} if options.where else {})
    result = client.call("POST", "/v1/remove", body)
    if terminal.as_json:
        print(json.dumps(result))
        return 0
    for entry in result["removed"]:
        summary = f"{format_count(entry['tags'], 'tag')}, {format_count(entry['manifests'], 'manifest')}"
        if entry["where"] == "cached":
            summary += f", {format_count(entry['blobs'], 'blob')} ({format_size(entry['bytes'])})"
        print(f"removed {entry['name']} ({entry['where']}): {summary}")
    if any(entry["where"] == "hosted" for entry in result["removed"]):
        print("Run `dockerproxy gc --delete-untagged` to free the space.")
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
        print(json.dumps({**result, "removed": removed}))
        return PROBLEMS if result["problems"] else 0
    if options.dry_run:
        for item in removed:
            print(" ".join(filter(None, (item["kind"], item["repository"], item["digest"]))))
    print(
        f"{'would delete' if options.dry_run else 'deleted'} {format_count(result['manifests'], 'manifest')}, "
        f"{format_count(result['links'], 'link')} and {format_count(result['blobs'], 'blob')} "
        f"({format_size(result['bytes'])}); "
        f"kept {format_count(result['needed'], 'blob')} in {format_count(result['repositories'], 'repository')}"
    )
    if result["recent_manifests"] or result["recent"]:
        manifests = format_count(result["recent_manifests"], "untagged manifest")
        print(f"kept, because used within the grace period: {manifests} and {_format_objects(result, 'recent')}")
    if result["foreign"]:
        print(f"kept, because the file belongs to another user: {_format_objects(result, 'foreign')}")
    for problem in result["problems"]:
        print(problem)
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
        print(json.dumps({**result, "findings": findings}))
        return PROBLEMS if findings else 0
    for finding in findings:
        print(finding["what"])
    print(
        f"{format_count(result['repositories'], 'repository')}: "
        f"{format_count(result['hardlinked'], 'blob')} hard-linked, "
        f"{result['copied']} copied ({format_size(result['bytes'])}), {result['present']} already present; "
        f"{format_count(result['manifests'], 'manifest')} and {format_count(result['tags'], 'tag')} added"
    )
    if result["conflicts"]:
        print("use --force to overwrite existing tags")
    return PROBLEMS if findings else 0


def _is_registry_directory(directory: str) -> bool:
    try:
        return all(os.listdir(f"{directory}/docker/registry/v2/{part}") for part in ("blobs", "repositories"))
    except OSError:
        return False


def check(client: ControlClient, options: argparse.Namespace, terminal: Terminal) -> int:
    findings, result = _gather(client.stream_events("POST", "/v1/check", {"cached": options.cached}), terminal)
    if terminal.as_json:
        print(json.dumps({**result, "findings": findings}))
        return PROBLEMS if findings else 0
    for finding in findings:
        print(finding["what"])
    print(
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
        print(json.dumps(result))
        return 0
    cache, operation = result["cache"], result["operation"]
    print(f"running since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(result['started']))}")
    for kind, store in result["shelves"].items():
        free = "" if store["free"] is None else f", {format_size(store['free'])} free"
        usage = f", {format_size(cache['bytes'])} of {format_size(cache['limit'])} used" if kind == "cached" else ""
        print(f"{kind} in {store['directory']}{usage}{free}")
    print(f"SHA-256 of the CA certificate: {result['ca']['sha256']}")
    print("idle" if operation is None else f"{operation['name']} running for {format_age(operation['since'])}")
    return 0


def debug(client: ControlClient, options: argparse.Namespace, terminal: Terminal) -> int:
    result = client.call("GET", "/v1/debug", None)
    if terminal.as_json:
        print(json.dumps(result))
        return 0
    for process in result["processes"]:
        for line in _format_process(process):
            print(line)
    for key, waiting in result["locks"].items():
        print(f"lock {key} held, {waiting} waiting")
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
    raise CommandError(FAILED, _DISCONNECTED)


# the daemon


class _UnixHTTPConnection(http.client.HTTPConnection):
    """An HTTP connection over a UNIX socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self._path)


class ControlClient:
    """Client of the daemon's control API, at the socket `path` or at the first default path that exists."""

    def __init__(self, path: str | None) -> None:
        self._paths = [path] if path else list(_default_socket_paths())

    def call(self, method: str, target: str, body: Any) -> Event:
        """Send a request and return the JSON object of the response. Raise `CommandError`."""
        try:
            result: Event = json.loads(self._request(method, target, body).read())
        except (OSError, http.client.HTTPException, ValueError):
            raise CommandError(FAILED, _DISCONNECTED) from None
        return result

    def stream_events(self, method: str, target: str, body: Any = None) -> Iterator[Event]:
        """Send a request and yield the JSON objects of the response as they arrive. Raise `CommandError`."""
        response = self._request(method, target, body)
        try:
            for line in response:
                yield json.loads(line)
        except (OSError, http.client.HTTPException, ValueError):
            raise CommandError(FAILED, _DISCONNECTED) from None

    def _request(self, method: str, target: str, body: Any) -> http.client.HTTPResponse:
        connection = self._connect()
        try:
            connection.request(method, target, None if body is None else json.dumps(body))
            response = connection.getresponse()
            if response.status == 200:
                return response
            error = json.loads(response.read())["error"]
        except OSError:  # including http.client.RemoteDisconnected
            raise CommandError(FAILED, _DISCONNECTED) from None
        except (http.client.HTTPException, ValueError, KeyError, TypeError):
            raise CommandError(FAILED, "the process on the control socket is not docker-registry-proxy") from None
        raise CommandError(
            _EXIT_STATUS_BY_HTTP.get(response.status, FAILED), error["message"], error.get("suggestions", ())
        )

    def _connect(self) -> _UnixHTTPConnection:
        for path in self._paths:
            connection = _UnixHTTPConnection(path)
            try:
                connection.connect()
            except FileNotFoundError:
                continue
            except PermissionError:
                raise CommandError(NOT_PERMITTED, _permission_message(path)) from None
            except ConnectionRefusedError:
                raise CommandError(
                    NOT_RUNNING, f"docker-registry-proxy is not running: no process listens on {path}"
                ) from None
            except OSError as error:
                raise CommandError(
                    NOT_RUNNING, f"{path} is not a control socket of docker-registry-proxy: {error}"
                ) from None
            return connection
        raise CommandError(NOT_RUNNING, f"docker-registry-proxy is not running: {' and '.join(self._paths)} not found")


def _default_socket_paths() -> Iterator[str]:
    """Yield the default paths of the control socket.

    They are those of the environment variables, of the Debian package, and of `make run`.
    """
    environment = os.environ
    directories = [
        environment.get("RUNTIME_DIR") or environment.get("RUNTIME_DIRECTORY", "").partition(":")[0],
        os.path.join(environment["STATE_DIR"], "run") if environment.get("STATE_DIR") else "",
        "/run/docker-registry-proxy",
        "var/run",
    ]
    for directory in filter(None, directories):
        yield os.path.join(directory, "control.sock")


def _permission_message(path: str) -> str:
    try:
        group = grp.getgrgid(os.stat(os.path.dirname(path)).st_gid).gr_name
    except (OSError, KeyError):
        return f"permission denied for {path}: run this as root, or join the daemon's group"
    return f"permission denied for {path}: run this as root, or join the group {group}"


if __name__ == "__main__":
    sys.exit(main())
