"""The command `dockerproxy`: list, remove and verify hosted and cached images through the control socket of the daemon.

Exit status: 0 success; 1 completed, and found a problem (`check`, `import`, `gc`, `config --check`, `reload`); 2 wrong
usage; 3 the daemon is not running; 4 no such image or repository; 5 permission denied; 6 the daemon is busy with
another of these commands; 7 the command failed, or the daemon stopped; 130 interrupted.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NoReturn

from dockerproxy import __version__
from dockerproxy.control_client import FAILED, INTERRUPTED, NOT_OURS, CommandError, ControlClient
from dockerproxy.durations import parse_duration
from dockerproxy.terminal import Terminal, print_line, printable

_MAX_NAME = 1000  # characters of a name with a host, a tag and a digest

Command = Callable[[ControlClient, argparse.Namespace, Terminal], int]
"""The body of a command: it returns the exit status, or raises `CommandError`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by `>&-`
            setattr(sys, name, open(os.devnull, "w"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    parser = _build_parser()
    if "_ARGCOMPLETE" in os.environ:  # the shell asks for words (completions/)
        import argcomplete

        argcomplete.autocomplete(parser, always_complete_options=False)
    options = parser.parse_args(arguments)
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
        _discard_output()
        return 0
    except OSError as error:  # such as a full disk
        _discard_output()
        print_line(f"dockerproxy: {error.filename or 'the output'}: {error.strerror}", file=sys.stderr)
        return FAILED
    return status


def _discard_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(client: ControlClient, options: argparse.Namespace, terminal: Terminal) -> int:
    command = _load(options.run)
    try:
        return command(client, options, terminal)
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError):
        # The daemon's answer is not what this version of the command expects.
        raise CommandError(FAILED, NOT_OURS) from None


def _load(place: str) -> Command:
    """Return the command at `place`, ``MODULE:FUNCTION`` in `dockerproxy.commands`. Only that module is imported."""
    module, _, function = place.partition(":")
    command: Command = getattr(import_module(f"dockerproxy.commands.{module}"), function)
    return command


def _print_error(error: CommandError, as_json: bool) -> None:
    if as_json:
        print_line(json.dumps({"error": {"message": error.message, "suggestions": list(error.suggestions)}}))
    print_line(f"dockerproxy: {error.message}", file=sys.stderr)
    if error.suggestions:
        print_line(f"Did you mean {' or '.join(error.suggestions)}? Nothing was changed.", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    """Shows arguments and does not obey them: one may come from a list that a stranger wrote.

    The shell completes names by the daemon's lists.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._apart: list[tuple[str, str]] = []
        self._needs: list[tuple[str, str]] = []

    def refuse_together(self, option: str, *others: str) -> None:
        """Refuse `option` beside any of `others`, because it would ignore them."""
        self._apart += [(option, other) for other in others]

    def require_beside(self, option: str, other: str) -> None:
        """Refuse `option` without `other`."""
        self._needs.append((option, other))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        parsed, rest = super().parse_known_args(args, namespace)
        chosen = {name for name, value in vars(parsed).items() if value}
        for option, other in self._apart:
            if {option, other} <= chosen:
                self.error(f"{_flag(option)} and {_flag(other)} cannot be used together")
        for option, other in self._needs:
            if option in chosen and other not in chosen:
                self.error(f"{_flag(option)} needs {_flag(other)}")
        return parsed, rest

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        action = super().add_argument(*names, **options)
        if action.type is _name:
            action.completer = _complete_names  # type: ignore[attr-defined]  # for argcomplete
        return action

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def _build_parser() -> argparse.ArgumentParser:
    common_options = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    common_options.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    common_options.add_argument(
        "--socket", metavar="PATH", help="the control socket of the daemon, if it is not the default one"
    )
    parser = _Parser(
        "dockerproxy", description="List, remove and verify images in docker-registry-proxy.", parents=[common_options],
        epilog=(__doc__ or "").partition("\n\n")[2],
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add_command(name: str, run: str, text: str) -> _Parser:
        subparser = commands.add_parser(name, help=text, description=text, parents=[common_options])
        subparser.set_defaults(run=run)
        return subparser

    def add_store_options(subparser: argparse.ArgumentParser) -> None:
        group = subparser.add_mutually_exclusive_group()
        group.add_argument("--hosted", dest="where", action="store_const", const="hosted", help="hosted images only")
        group.add_argument("--cached", dest="where", action="store_const", const="cached", help="cached images only")

    def add_image_options(subparser: argparse.ArgumentParser) -> None:
        subparser.add_argument("images", nargs="*", metavar="IMAGE", type=_name, help="its name, such as nginx:1.29")
        subparser.add_argument(
            "--from-file", metavar="FILE",
            help="also those in a list, compose file, Kubernetes manifest or Dockerfile; - is the standard input",
        )  # fmt: skip
        subparser.add_argument(
            "--platform", type=_platforms, metavar="P[,P]",
            help="such as linux/amd64,linux/arm64, or all (default: those pulled here before, or this machine's)",
        )  # fmt: skip
        subparser.add_argument(
            "--referrers", action="store_true", help="pull signatures and SBOMs, too; pins always include them"
        )
        subparser.add_argument("--detach", action="store_true", help="do not wait for the end")

    ls = add_command("ls", "images:list_", "list repositories, or the tags and manifests of one")
    ls.add_argument(
        "name", nargs="?", metavar="NAME", type=_name,
        help="REPO, or HOST/REPO for a cached repository; a pattern such as 'ghcr.io/*' lists repositories",
    )  # fmt: skip
    add_store_options(ls)
    ls.add_argument("--sort", choices=("name", "size", "used", "pulls"), help="largest, latest or most pulled first")
    ls.add_argument("--reverse", action="store_true", help="reverse the order")
    ls.add_argument("--limit", type=_positive, metavar="N", help="show the first N only")
    ls.add_argument("--platforms", action="store_true", help="show all platforms of each image")
    ls.add_argument("--digests", action="store_true", help="show whole digests")
    ls.add_argument("-q", "--quiet", action="store_true", help="print names only, for scripts")
    ls.refuse_together("quiet", "platforms", "digests")
    rm = add_command(
        "rm", "images:remove", "remove images, or all images of a repository; gc frees the space of hosted ones"
    )
    rm.add_argument(
        "names", nargs="+", metavar="NAME", type=_name, help="REPO:TAG, REPO@DIGEST or REPO; HOST/REPO… if cached"
    )
    rm.add_argument("--force", action="store_true", help="also remove pinned images, and what the index of a tag needs")
    add_store_options(rm)
    gc = add_command("gc", "maintenance:collect", "delete hosted blobs that no manifest needs")
    gc.add_argument("--dry-run", action="store_true", help="only report what would be deleted")
    gc.add_argument("--delete-untagged", action="store_true", help="also delete manifests that no tag leads to")
    gc.add_argument(
        "--grace", type=_duration, metavar="TIME", help="keep everything used within TIME (default 1h, minimum 2m)"
    )
    import_command = add_command(
        "import", "maintenance:import_", "import the storage directory of another registry (registry:2)"
    )
    import_command.add_argument(
        "directory", metavar="DIR", type=_path, help="the storage directory; the daemon must be able to read it"
    )
    import_command.add_argument("--force", action="store_true", help="overwrite tags that exist in both")
    check_command = add_command(
        "check", "maintenance:check", "verify the digest of every blob and move damaged ones to damaged/"
    )
    check_command.add_argument("--cached", action="store_true", help="verify cached blobs instead of hosted ones")
    why = add_command(
        "why", "history:why", "explain what would happen to a pull now, and what happened to the last ones"
    )
    why.add_argument("name", metavar="NAME", type=_name, help="REPO:TAG, REPO@DIGEST or REPO")
    why.add_argument("--platform", metavar="OS/ARCH", type=_platform, help="show the contents for one platform only")
    history = add_command(
        "history", "history:history", "list pulls, with the client, the image and the outcome of each"
    )
    history.add_argument("name", nargs="?", metavar="NAME", type=_name, help="REPO:TAG, REPO@DIGEST or REPO")
    history.add_argument("--since", type=_duration, metavar="TIME", help="all pulls within TIME, such as 1h or 7d")
    history.add_argument("--client", metavar="ADDRESS", help="the pulls of one client only")
    add_command("status", "status:status", "show the state of the daemon; the exit status is 1 if something is bad")
    add_command(
        "budget", "budget:budget", "show how many pulls the registries still allow, and how long they refuse more"
    )
    top = add_command(
        "top", "top:top", "show downloads and traffic, updated once a second: q quits, s changes the order"
    )
    top.add_argument("-n", "--count", type=_positive, metavar="N", help="end after N seconds")
    config = add_command("config", "config:config", "show the settings in force and where each of them comes from")
    config.add_argument(
        "--check", metavar="FILE", help="check a file with settings, and the files that it names, instead"
    )
    add_command("reload", "config:reload", "make the daemon read its settings again, and print the result")
    pull = add_command("pull", "pull:pull", "pull images into the cache, before clients ask for them")
    add_image_options(pull)
    pull.add_argument("--pin", action="store_true", help="keep them in the cache from now on")
    pull.add_argument("--dry-run", action="store_true", help="only say how many pulls and bytes it would take")
    pull.add_argument("--cancel", action="store_true", help="end the pulls of these images that are running or wait")
    pull.refuse_together("cancel", "pin", "dry_run", "detach", "platform", "referrers")
    pull.refuse_together("dry_run", "detach")
    pin = add_command("pin", "pull:pin", "pull images into the cache, and keep them there")
    add_image_options(pin)
    pin.add_argument(
        "--refresh", type=_duration, metavar="TIME", help="ask after TIME whether the tag has moved (default 6h)"
    )
    unpin = add_command("unpin", "pull:unpin", "unpin images, so that the cache may remove them again")
    unpin.add_argument("images", nargs="+", metavar="IMAGE", type=_name, help="its name, such as nginx:1.29")
    pins = add_command("pins", "pull:pins", "list pinned images; with --missing, exit 1 if one of them is incomplete")
    pins.add_argument("--missing", action="store_true", help="list only incomplete images")
    pins.add_argument(
        "--refresh", action="store_true", help="ask the registries whether tags have moved, if it is time to ask"
    )
    pins.add_argument("--all", action="store_true", help="with --refresh: ask for all of them now")
    pins.refuse_together("refresh", "missing")
    pins.require_beside("all", "refresh")
    add_command("doctor", "doctor:diagnose", "check this server and its registries: what is wrong, and what to do")
    add_command("page", "page:page", "print a link that signs a browser in to the page as administrator")
    add_command("debug", "debug:debug", "show what each process is doing: downloads, connections, waiting work, locks")
    return parser


def _complete_names(prefix: str, parsed_args: argparse.Namespace, **_: object) -> list[str]:
    from dockerproxy.commands.completion import complete_names

    return complete_names(getattr(parsed_args, "socket", None), prefix, getattr(parsed_args, "where", None))


def _name(text: str) -> str:
    if not text:  # a variable of a script that is not set
        raise argparse.ArgumentTypeError("it is empty")
    if len(text) > _MAX_NAME:
        raise argparse.ArgumentTypeError(f"it has {len(text)} characters, and no name has more than {_MAX_NAME}")
    return text


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text[:18]) < 10**9):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number from 1 to 999999999")
    return int(text)


def _path(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return text


def _platform(text: str) -> str:
    # The daemon knows which platforms there are; this finds what it would not understand.
    if not all(text.split("/")) or not 2 <= len(text.split("/")) <= 3:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a platform such as linux/amd64 or linux/arm/v7")
    return text


def _platforms(text: str) -> list[str]:
    platforms = text.split(",")
    if "all" in platforms:
        if len(platforms) > 1:
            raise argparse.ArgumentTypeError("all includes every other platform, so name it alone")
        return platforms
    return [_platform(platform) for platform in platforms]


def _duration(text: str) -> float:
    try:
        return parse_duration(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a time such as 30m or 1h") from None


if __name__ == "__main__":
    sys.exit(main())
