"""The commands `pull`, `pin`, `unpin` and `pins`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from dockerproxy.control_client import (
    DISCONNECTED,
    FAILED,
    INTERRUPTED,
    PROBLEMS,
    USAGE,
    CommandError,
    ControlClient,
    Event,
)
from dockerproxy.terminal import (
    Terminal,
    format_ago,
    format_count,
    format_size,
    format_window,
    print_line,
    print_table,
    printable,
)

_MAX_IMAGES = 500  # of one command, because the daemon takes requests of 64 KiB
_DRY = "would be pulled"
_GOES_ON = "interrupted, and the daemon goes on; `dockerproxy pull --cancel IMAGE` ends the pull of an image"
_BAR_NAME = 48  # characters of an image's name beside its bar


def pull(client: ControlClient, options: argparse.Namespace, terminal: Terminal) -> int:
    """Have images pulled into the cache, or no longer."""
    if options.cancel:
        return _cancel(client, options, terminal)
    return _pull(client, options, terminal, is_pin=options.pin)


def _cancel(client: ControlClient, options: argparse.Namespace, terminal: Terminal) -> int:
    result = client.call("POST", "/v1/pulls/cancel", {"images": _named_images(options)[0]})
    if terminal.as_json:
        print_line(json.dumps(result))
        return 0
    for image in result["cancelled"]:
        print_line(f"the pull of {image} was cancelled")
    return 0


def pin(client: ControlClient, options: argparse.Namespace, terminal: Terminal) -> int:
    """Have images pulled into the cache, where they stay."""
    return _pull(client, options, terminal, is_pin=True)


def _pull(client: ControlClient, options: argparse.Namespace, terminal: Terminal, *, is_pin: bool) -> int:
    images, problems = _named_images(options)
    body: dict[str, Any] = {"images": images, "pin": is_pin}
    if options.platform:
        body["platforms"] = options.platform
    for name in ("dry_run", "detach", "referrers", "refresh"):
        value = getattr(options, name, None)
        if value:
            body[name] = value
    status = _follow(client.stream_events("POST", "/v1/pull", body), terminal, _is_without_end(options))
    return PROBLEMS if problems else status


def _named_images(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Return what `_images` does, at least one and not too many. Print what is wrong with the file."""
    images, problems = _images(options)
    for problem in problems:
        print_line(f"dockerproxy: {problem}", file=sys.stderr)
    if not images:
        raise CommandError(USAGE, "no image is named; give names, or a file with --from-file")
    if len(images) > _MAX_IMAGES:
        raise CommandError(USAGE, f"{len(images)} images are too many for one command, which takes {_MAX_IMAGES}")
    return images, problems


def _is_without_end(options: argparse.Namespace) -> str:
    """Return what the summary calls images that are not here yet, because the command does not wait."""
    if getattr(options, "dry_run", False):
        return _DRY
    return "are being pulled" if getattr(options, "detach", False) else ""


def _images(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Return the images that the command line and its file name, each once, and what is wrong with the file."""
    images = dict.fromkeys(options.images)
    if options.from_file is None:
        return [*images], []
    # Loaded only if there is a file.
    from dockerproxy.commands.image_lists import MAX_SIZE, YAMLMissing, read_images

    name = options.from_file
    try:
        if name == "-":
            if sys.stdin is None:
                raise CommandError(USAGE, "the standard input is closed")
            text = sys.stdin.buffer.read(MAX_SIZE + 1).decode("utf-8-sig")
        else:
            with open(name, "rb") as file:
                text = file.read(MAX_SIZE + 1).decode("utf-8-sig")
    except OSError as error:
        raise CommandError(USAGE, f"{name} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise CommandError(USAGE, f"{name} is not UTF-8 text") from None
    if len(text) > MAX_SIZE:
        raise CommandError(USAGE, f"{name} has more than {MAX_SIZE >> 20} MiB, so it is no list of images")
    label = "standard input" if name == "-" else name
    try:
        listed = read_images(label, text, {**_dotenv(name), **os.environ})
    except YAMLMissing:
        raise CommandError(
            FAILED, f"{label} is YAML, and PyYAML is not here to read it: install python3-yaml"
        ) from None
    return [*images, *(image for image in listed.images if image not in images)], [*listed.problems]


def _dotenv(name: str) -> dict[str, str]:
    """Return the variables of the file `.env` beside a compose file, which docker compose reads, too.

    If a stranger wrote the compose file, its `.env` has to be the stranger's too. A link to a file that only the user
    can read would put secrets into the names of images, which registries are sent.
    """
    path = os.path.join(os.path.dirname(name), ".env") if name != "-" else ""
    # A stranger may have written both files, or put a FIFO there.
    from dockerproxy.config_files import read_config_file

    try:
        content, status = read_config_file(path)
        owner = os.stat(name).st_uid
        lines = content.decode("utf-8-sig").splitlines()
    except (OSError, ValueError):
        return {}
    if owner not in (0, os.geteuid(), status.st_uid):
        return {}
    pairs = (line.strip().removeprefix("export ").partition("=") for line in lines if not line.lstrip().startswith("#"))
    return {key.strip(): value.strip().strip("\"'") for key, separator, value in pairs if separator}


def _follow(events: Iterator[Event], terminal: Terminal, without_end: str = "") -> int:
    """Show the daemon's reports until it has finished. Return the exit status."""
    display: _Lines | _Bars
    if terminal.as_json:
        return _pass_on(events)
    display = _Bars() if sys.stdout.isatty() and not without_end else _Lines()
    goes_on = False
    try:
        for event in events:
            match event.pop("event"):
                case "plan":
                    goes_on = without_end != _DRY
                    for line in _format_plan(event):
                        display.say(line)
                case "image":
                    display.show(event)
                case "problem":
                    display.say(event["message"])
                case "result":
                    display.close()
                    return _finish(event, without_end)
                case "error":
                    raise CommandError(FAILED, event["message"])
    except KeyboardInterrupt:
        if goes_on:
            raise CommandError(INTERRUPTED, _GOES_ON) from None
        raise
    finally:
        display.close()
    raise CommandError(FAILED, DISCONNECTED)


def _pass_on(events: Iterator[Event]) -> int:
    """Print each event as a line of JSON."""
    for event in events:
        print(json.dumps(event), flush=True)
        if event["event"] == "result":
            return PROBLEMS if event["failed"] else 0
        if event["event"] == "error":
            return FAILED
    raise CommandError(FAILED, DISCONNECTED)


def _format_plan(plan: Event) -> Iterator[str]:
    size = f"{format_size(plan['bytes'])} to download"
    if plan["unknown"]:
        size += f", and {format_count(plan['unknown'], 'image')} of unknown size"
    yield f"{format_count(plan['images'], 'image')}: {size}"
    for row in plan["pulls"]:
        left = "an unknown number" if row["remaining"] is None else str(row["remaining"])
        of_all = "" if row["limit"] is None else f" of {row['limit']}"
        kept = f", {row['reserve']} of them kept for clients" if row["reserve"] else ""
        yield f"{row['registry']}: up to {format_count(row['pulls'], 'pull')} that count; {left}{of_all} are left{kept}"


def _finish(result: Event, without_end: str) -> int:
    if without_end:
        print_line(f"{format_count(result['images'] - result['failed'], 'image')} {without_end}")
    else:
        images = format_count(result["images"], "image")
        print_line(f"{result['done']} of {images} in the cache ({format_size(result['bytes'])})")
    return PROBLEMS if result["failed"] else 0


def _describe(row: Event) -> str:
    text = row["state"]
    if row["state"] == "downloading":
        text += f" {format_size(row['done'])} of {format_size(row['total'] or 0)}"
    elif row["state"] == "done":
        text += f", {format_size(row['total'] or 0)}"
    return f"{text}: {row['message']}" if row["message"] else text


class _Lines:
    """Prints a line for each change of an image's state."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[str, str]] = {}

    def say(self, text: str) -> None:
        print_line(text)
        sys.stdout.flush()

    def show(self, row: Event) -> None:
        state = row["state"], row["message"]
        if self._last.get(row["image"]) != state:
            self._last[row["image"]] = state
            self.say(f"{row['image']}: {_describe(row)}")

    def close(self) -> None:
        """There is nothing to close."""


class _Bars:
    """Shows a bar for each image. `rich` is loaded only for this."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        # Texts of strangers must not be read as markup.
        name, note = (TextColumn(f"{{task.fields[{field}]}}", markup=False) for field in ("image", "note"))
        self._progress = Progress(name, BarColumn(), DownloadColumn(), TransferSpeedColumn(), note)
        self._tasks: dict[str, Any] = {}
        self._progress.start()
        self._is_open = True

    def say(self, text: str) -> None:
        self._progress.console.print(printable(text), markup=False, highlight=False, emoji=False)

    def show(self, row: Event) -> None:
        name = row["image"]
        if name not in self._tasks:
            shown = printable(name if len(name) <= _BAR_NAME else f"…{name[1 - _BAR_NAME :]}")
            self._tasks[name] = self._progress.add_task("", total=None, image=shown, note="")
        note = row["state"] + (f": {row['message']}" if row["message"] else "")
        self._progress.update(
            self._tasks[name], completed=row["done"], total=row["total"], note=printable(note), refresh=False
        )

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._progress.stop()


def unpin(client: ControlClient, options: argparse.Namespace, terminal: Terminal) -> int:
    """Let images leave the cache again."""
    result = client.call("POST", "/v1/unpin", {"images": options.images})
    if terminal.as_json:
        print_line(json.dumps(result))
        return 0
    for image in result["unpinned"]:
        print_line(f"{image} is no longer pinned")
    return 0


def pins(client: ControlClient, options: argparse.Namespace, terminal: Terminal) -> int:
    """List the pinned images, or ask their registries again."""
    if options.refresh:
        return _follow(client.stream_events("POST", "/v1/pins/refresh", {"all": options.all}), terminal)
    result = client.call("GET", "/v1/pins", None)
    rows = [row for row in result["pins"] if not options.missing or _is_missing(row)]
    problems: Sequence[str] = result["problems"]
    if terminal.as_json:
        print_line(json.dumps({**result, "pins": rows}))
        return PROBLEMS if options.missing and (rows or problems) else 0
    print_table(("IMAGE", "PLATFORMS", "SIZE", "REFRESHED", "FROM", ""), [_pin_row(row) for row in rows])
    print_line(
        f"{format_count(len(rows), 'image')}; pins take {format_size(result['bytes'])} of the"
        f" {format_size(result['limit'])} that they may have"
    )
    for problem in problems:
        print_line(problem)
    return PROBLEMS if options.missing and (rows or problems) else 0


def _is_missing(row: Event) -> bool:
    return bool(row["missing"]) or row["digest"] is None or bool(row["error"])


def _pin_row(row: Event) -> tuple[str, ...]:
    notes = []
    if row["digest"] is None:
        notes.append("not pulled yet")
    elif row["missing"]:
        notes.append(f"{row['missing']} of {format_count(row['contents'], 'part')} missing")
    if row["error"]:
        notes.append(row["error"])
    platforms = ",".join(row["platforms"]) or "default"
    refreshed = f"{format_ago(row['refreshed'])}, every {format_window(row['refresh'])}"
    return row["image"], platforms, format_size(row["bytes"]), refreshed, row["source"], "; ".join(notes)
