"""`dockerproxy`, the command: what is hosted and cached, shown and cleared up in the running daemon.

Exit status: 0 done; 1 done, and something wrong was found (`check`, `import`, `gc`); 2 used wrongly; 3 the daemon does
not run; 4 there is no such thing; 5 not permitted; 6 the daemon is busy with another of these; 7 the daemon could not
do it, or ended; 130 interrupted.
"""

from __future__ import annotations

import argparse
import grp
import http.client
import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from urllib.parse import urlencode

from dockerproxy import __version__
from dockerproxy.screen import Screen, age, ago, count, size, table

WRONG, USAGE, NOT_RUNNING, NOT_FOUND, NOT_PERMITTED, BUSY, FAILED, INTERRUPTED = 1, 2, 3, 4, 5, 6, 7, 130

_UNSEEN = "the daemon does not see what you see: it is a user of its own, and its service hides /home, /root and /tmp"
_ENDED = "the daemon ended in the midst of it"
_STATUS = {400: USAGE, 404: NOT_FOUND, 409: BUSY}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

Event = dict[str, Any]


class Trouble(Exception):
    """Why a command cannot be done: the exit status, a sentence, and names that may have been meant."""

    def __init__(self, status: int, message: str, suggestions: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.status, self.message, self.suggestions = status, message, tuple(suggestions)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit status."""
    options = _parser().parse_args(arguments)
    screen = Screen(as_json=getattr(options, "json", False))
    try:
        status: int = options.run(Daemon(getattr(options, "socket", None)), options, screen)
        sys.stdout.flush()
    except Trouble as trouble:
        screen.clear()
        _complain(trouble, screen.as_json)
        return trouble.status
    except KeyboardInterrupt:
        screen.clear()
        print("dockerproxy: interrupted; what was done by then is done", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has enough. Python would complain about it once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def _complain(trouble: Trouble, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"error": {"message": trouble.message, "suggestions": list(trouble.suggestions)}}))
    print(f"dockerproxy: {trouble.message}", file=sys.stderr)
    if trouble.suggestions:
        print(f"Is {' or '.join(trouble.suggestions)} meant? Nothing was changed.", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    common.add_argument("--socket", metavar="PATH", help="the daemon's socket, where it is not in its usual place")
    parser = argparse.ArgumentParser(
        "dockerproxy", description="Show and clear up what docker-registry-proxy hosts and caches.", parents=[common],
        epilog=(__doc__ or "").partition("\n\n")[2],
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable[..., int], text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text, parents=[common])
        made.set_defaults(run=run)
        return made

    def with_shelf(made: argparse.ArgumentParser) -> None:
        shelf = made.add_mutually_exclusive_group()
        shelf.add_argument("--hosted", dest="where", action="store_const", const="hosted", help="what is pushed here")
        shelf.add_argument("--cached", dest="where", action="store_const", const="cached", help="what is cached")

    ls = command("ls", list_, "list repositories or, of one, its tags and manifests")
    ls.add_argument("name", nargs="?", metavar="NAME", help="REPO, or HOST/REPO for what is cached")
    with_shelf(ls)
    rm = command("rm", remove, "remove an image, or all images of a repository; gc frees the space of hosted ones")
    rm.add_argument("names", nargs="+", metavar="NAME", help="REPO:TAG, REPO@DIGEST or REPO; HOST/REPO… if cached")
    with_shelf(rm)
    gc = command("gc", collect, "free the space of what is hosted and no tag leads to any more")
    gc.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    gc.add_argument("--delete-untagged", action="store_true", help="remove manifests that no tag leads to, as well")
    gc.add_argument("--grace", type=_duration, metavar="TIME", help="spare what was used since (1h; at least 2m)")
    take = command("import", import_, "take over the directory of another registry (registry:2)")
    take.add_argument("directory", metavar="DIR", help="its storage directory, readable by the daemon")
    take.add_argument("--force", action="store_true", help="let tags mean what they mean there")
    verify = command("check", check, "verify every content by its digest; set aside what is damaged")
    verify.add_argument("--cached", action="store_true", help="of what is cached, instead of what is hosted")
    command("status", status, "say how full it is and what is going on")
    return parser


def _duration(text: str) -> int:
    found = re.fullmatch(r"([0-9]{1,6})([smhd]?)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 30m or 1h")
    return int(found[1]) * _SECONDS[found[2] or "s"]


# the commands


def list_(daemon: Daemon, options: argparse.Namespace, screen: Screen) -> int:
    query = {name: value for name, value in (("name", options.name), ("where", options.where)) if value}
    rows, result = _gather(daemon.lines("GET", f"/v1/repositories?{urlencode(query)}"), screen)
    if screen.as_json:
        print(json.dumps({**result, "manifests" if options.name else "repositories": rows}))
    elif options.name:
        print(f"{result['name']} ({result['where']})")
        table(("TAG", "DIGEST", "SIZE", "LAST USED"), [_manifest(row) for row in rows])
    else:
        table(("REPOSITORY", "", "TAGS", "MANIFESTS", "SIZE", "LAST USED"), [_repository(row) for row in rows])
    return 0


def _repository(row: Event) -> tuple[str, ...]:
    counts = str(row["tags"]), str(row["manifests"])
    return (row["name"], row["where"], *counts, size(row["size"]), ago(row["last_used"]))


def _manifest(row: Event) -> tuple[str, ...]:
    return (row["tag"] or "-", row["digest"], size(row["size"]), ago(row["last_used"]))


def remove(daemon: Daemon, options: argparse.Namespace, screen: Screen) -> int:
    body = {"names": options.names} | ({"where": options.where} if options.where else {})
    result = daemon.ask("POST", "/v1/remove", body)
    if screen.as_json:
        print(json.dumps(result))
        return 0
    for gone in result["removed"]:
        what = f"{count(gone['tags'], 'tag')}, {count(gone['manifests'], 'manifest')}"
        if gone["where"] == "cached":
            what += f", {count(gone['blobs'], 'content')} ({size(gone['bytes'])})"
        print(f"removed {gone['name']} ({gone['where']}): {what}")
    if any(gone["where"] == "hosted" for gone in result["removed"]):
        print("`dockerproxy gc --delete-untagged` frees the space.")
    return 0


def collect(daemon: Daemon, options: argparse.Namespace, screen: Screen) -> int:
    body = {
        "dry_run": options.dry_run,
        "delete_untagged": options.delete_untagged,
        "list": options.dry_run or screen.as_json,
    }
    if options.grace is not None:
        body["grace"] = options.grace
    removed, result = _gather(daemon.lines("POST", "/v1/collect", body), screen)
    if screen.as_json:
        print(json.dumps({**result, "removed": removed}))
        return WRONG if result["problems"] else 0
    if options.dry_run:
        for thing in removed:
            print(" ".join(filter(None, (thing["kind"], thing["repository"], thing["digest"]))))
    print(
        f"{'would remove' if options.dry_run else 'removed'} {count(result['manifests'], 'manifest')}, "
        f"{count(result['links'], 'link')} and {count(result['blobs'], 'blob')} ({size(result['bytes'])}); "
        f"{count(result['needed'], 'content')} in {count(result['repositories'], 'repository')} needed"
    )
    if result["recent_manifests"] or result["recent"]:
        manifests = count(result["recent_manifests"], "untagged manifest")
        print(f"spared, as used within the grace period: {manifests} and {_contents(result, 'recent')}")
    if result["foreign"]:
        print(f"spared, as another user's files: {_contents(result, 'foreign')}")
    for problem in result["problems"]:
        print(problem)
    return WRONG if result["problems"] else 0


def import_(daemon: Daemon, options: argparse.Namespace, screen: Screen) -> int:
    directory = os.path.abspath(options.directory)
    body = {"directory": directory, "force": options.force}
    try:
        findings, result = _gather(daemon.lines("POST", "/v1/import", body), screen)
    except Trouble as trouble:
        if trouble.status == USAGE and _holds_registry(directory):
            trouble.message += f" ({_UNSEEN})"
        raise
    if screen.as_json:
        print(json.dumps({**result, "findings": findings}))
        return WRONG if findings else 0
    for finding in findings:
        print(finding["what"])
    print(
        f"{count(result['repositories'], 'repository')}: {result['hardlinked']} contents hard-linked, "
        f"{result['copied']} copied ({size(result['bytes'])}), {result['present']} here already; "
        f"{count(result['manifests'], 'manifest')} and {count(result['tags'], 'tag')} are new"
    )
    if result["conflicts"]:
        print("--force lets tags mean what they mean there")
    return WRONG if findings else 0


def _holds_registry(directory: str) -> bool:
    try:
        return all(os.listdir(f"{directory}/docker/registry/v2/{part}") for part in ("blobs", "repositories"))
    except OSError:
        return False


def check(daemon: Daemon, options: argparse.Namespace, screen: Screen) -> int:
    findings, result = _gather(daemon.lines("POST", "/v1/check", {"cached": options.cached}), screen)
    if screen.as_json:
        print(json.dumps({**result, "findings": findings}))
        return WRONG if findings else 0
    for finding in findings:
        print(finding["what"])
    print(
        f"{count(result['blobs'], 'content')} ({size(result['bytes'])}), {count(result['links'], 'link')} and "
        f"{count(result['tags'], 'tag')} in {count(result['repositories'], 'repository')}: "
        + (f"{len(findings)} findings, {result['damaged']} set aside" if findings else "all sound")
    )
    return WRONG if findings else 0


def status(daemon: Daemon, options: argparse.Namespace, screen: Screen) -> int:
    found = daemon.ask("GET", "/v1/status", None)
    if screen.as_json:
        print(json.dumps(found))
        return 0
    cache, operation = found["cache"], found["operation"]
    print(f"running since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(found['started']))}")
    for where, place in found["shelves"].items():
        free = "" if place["free"] is None else f", {size(place['free'])} free"
        full = f", {size(cache['bytes'])} of {size(cache['limit'])} used" if where == "cached" else ""
        print(f"{where} in {place['directory']}{full}{free}")
    print("idle" if operation is None else f"at {operation['name']} for {age(operation['since'])}")
    return 0


def _contents(result: Event, name: str) -> str:
    return f"{count(result[name], 'content')} ({size(result[f'{name}_bytes'])})"


def _gather(events: Iterator[Event], screen: Screen) -> tuple[list[Event], Event]:
    """Return what the daemon came upon and its result, showing progress meanwhile."""
    found: list[Event] = []
    for event in events:
        match event.pop("event"):
            case "progress":
                screen.progress(event["phase"], event["done"], event["total"])
            case "result":
                screen.clear()
                return found, event
            case "error":
                raise Trouble(FAILED, event["message"])
            case _:
                found.append(event)
    raise Trouble(FAILED, _ENDED)


# the daemon


class _Connection(http.client.HTTPConnection):
    """HTTP on a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self._path)


class Daemon:
    """The daemon behind the socket at `path`, or at the first of the usual places where there is one."""

    def __init__(self, path: str | None) -> None:
        self._paths = [path] if path else list(_usual_places())

    def ask(self, method: str, target: str, body: Any) -> Event:
        """Return the one JSON object that the daemon answers with. Raise `Trouble`."""
        try:
            answer: Event = json.loads(self._request(method, target, body).read())
        except (OSError, http.client.HTTPException, ValueError):
            raise Trouble(FAILED, _ENDED) from None
        return answer

    def lines(self, method: str, target: str, body: Any = None) -> Iterator[Event]:
        """Yield the JSON objects that the daemon answers with, as they come. Raise `Trouble`."""
        response = self._request(method, target, body)
        try:
            for line in response:
                yield json.loads(line)
        except (OSError, http.client.HTTPException, ValueError):
            raise Trouble(FAILED, _ENDED) from None

    def _request(self, method: str, target: str, body: Any) -> http.client.HTTPResponse:
        connection = self._connect()
        try:
            connection.request(method, target, None if body is None else json.dumps(body))
            response = connection.getresponse()
            if response.status == 200:
                return response
            error = json.loads(response.read())["error"]
        except OSError:  # http.client.RemoteDisconnected is one, too
            raise Trouble(FAILED, _ENDED) from None
        except (http.client.HTTPException, ValueError, KeyError, TypeError):
            raise Trouble(FAILED, "what answers on the socket is not docker-registry-proxy") from None
        raise Trouble(_STATUS.get(response.status, FAILED), error["message"], error.get("suggestions", ()))

    def _connect(self) -> _Connection:
        for path in self._paths:
            connection = _Connection(path)
            try:
                connection.connect()
            except FileNotFoundError:
                continue
            except PermissionError:
                raise Trouble(NOT_PERMITTED, _permission(path)) from None
            except ConnectionRefusedError:
                raise Trouble(NOT_RUNNING, f"docker-registry-proxy does not run: nobody listens on {path}") from None
            except OSError as error:
                raise Trouble(NOT_RUNNING, f"{path} is no socket of docker-registry-proxy: {error}") from None
            return connection
        raise Trouble(NOT_RUNNING, f"docker-registry-proxy does not run: there is no {' or '.join(self._paths)}")


def _usual_places() -> Iterator[str]:
    """Yield where the daemon's socket may be: as its own environment says, of the Debian package, of `make run`."""
    environment = os.environ
    places = [
        environment.get("RUNTIME_DIR") or environment.get("RUNTIME_DIRECTORY", "").partition(":")[0],
        os.path.join(environment["STATE_DIR"], "run") if environment.get("STATE_DIR") else "",
        "/run/docker-registry-proxy",
        "var/run",
    ]
    for place in filter(None, places):
        yield os.path.join(place, "control.sock")


def _permission(path: str) -> str:
    try:
        group = grp.getgrgid(os.stat(os.path.dirname(path)).st_gid).gr_name
    except (OSError, KeyError):
        return f"you are not permitted to use {path}: be root, or in the group of the daemon"
    return f"you are not permitted to use {path}: be root, or in the group {group}"


if __name__ == "__main__":
    sys.exit(main())
