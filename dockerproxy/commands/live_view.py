"""The state that the events of `/v1/live` describe. Pure; `admin.live` documents the events."""

from __future__ import annotations

from typing import Any

from dockerproxy.control_client import Event

SORTS = ("rate", "size", "clients", "name")
"""The orders of the downloads; the largest are first."""


class LiveView:
    """The state as of the last event. `is_complete` is true from the first event on."""

    def __init__(self) -> None:
        self.is_complete = False
        self.overview: Event | None = None
        self.cache: Event = {}
        self.traffic: Event = {"served": 0, "downloaded": 0}
        self._transfers: dict[str, Event] = {}
        self._up: dict[str, bool] = {}

    def apply(self, event: Event) -> None:
        """Apply an event. An empty one shows that the connection lives."""
        if event.get("first"):
            self._transfers, self._up = {}, {}
            self.is_complete = True
        self.cache, self.traffic = event.get("cache", self.cache), event.get("traffic", self.traffic)
        for transfer in event.get("transfers", ()):
            self._transfers[transfer["id"]] = self._transfers.get(transfer["id"], {}) | transfer
        for identifier in event.get("ended", ()):
            self._transfers.pop(identifier, None)
        self._up |= {registry["name"]: registry["up"] for registry in event.get("registries", ())}

    def set_overview(self, overview: Event) -> None:
        """Take over the numbers of the registries, which events do not have."""
        self.overview = overview

    def transfers(self, sort: str) -> list[Event]:
        """Return the downloads in the order of `sort`, one of `SORTS`."""
        return sorted(self._transfers.values(), key=lambda transfer: (_sort_key(transfer, sort), transfer["name"]))

    def registries(self) -> list[Event]:
        """Return the registries of the overview, with their state of this moment."""
        rows = [] if self.overview is None else self.overview["registries"]
        return [{**row, "up": self._up.get(row["name"], row["up"])} for row in rows]

    def snapshot(self) -> Event:
        """Return the state as a JSON value."""
        return {
            "traffic": self.traffic,
            "cache": self.cache,
            "transfers": self.transfers(SORTS[0]),
            "registries": [{"name": name, "up": up} for name, up in sorted(self._up.items())],
        }


def _sort_key(transfer: Event, sort: str) -> Any:
    match sort:
        case "rate":
            return -(transfer["rate"] or 0)
        case "size":
            return -(transfer["size"] or 0)
        case "clients":
            return -transfer["readers"]
        case _:
            return 0
