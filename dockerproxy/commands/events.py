"""The events of a command that the daemon streams."""

from __future__ import annotations

from collections.abc import Iterator

from dockerproxy.control_client import DISCONNECTED, FAILED, CommandError, Event
from dockerproxy.terminal import Terminal


def gather(events: Iterator[Event], terminal: Terminal) -> tuple[list[Event], Event]:
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
