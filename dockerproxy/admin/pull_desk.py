"""The way to the pulls for the administrator (`admin.pulls`), which are loaded if something is pinned, or by a request.

The rate limits of registries and the pins are known without them:

    GET  /v1/budget
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twisted.application.service import Service

from dockerproxy.admin.control import ControlHandler
from dockerproxy.admin.ndjson import JSON_FIELDS, NDJSONResponse
from dockerproxy.cache.image_budget import PullBudget
from dockerproxy.cache.pins import Pins
from dockerproxy.cache.rate_limits import stored_limits
from dockerproxy.concurrency import FirstUse, in_thread, spawn
from dockerproxy.http.request import Request
from dockerproxy.registry.principal import Principal
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.layout import Layout
from dockerproxy.store.records import Records

if TYPE_CHECKING:
    from dockerproxy.admin.pulls import PullService

PULL_REQUESTS = (
    ("POST", "/v1/pull"), ("GET", "/v1/pulls"), ("POST", "/v1/pulls/cancel"), ("POST", "/v1/unpin"),
    ("GET", "/v1/pins"), ("POST", "/v1/pins/refresh"),
)  # fmt: skip
"""The requests that `PullService` handles, by method and path."""


class PullDesk(Service):
    """Belongs to the main process. `load` builds the pulls, given this; see `FirstUse`. `pin_file` is PIN_FILE.

    `layout` and `records` are those of the cache. `clock` returns POSIX time.
    """

    def __init__(
        self,
        reactor: Any,
        load: Callable[[PullDesk], PullService],
        budget: PullBudget,
        pins: Pins,
        layout: Layout,
        records: Records,
        clock: Callable[[], float],
        pin_file: Path | None,
    ) -> None:
        self._reactor = reactor
        self._budget = budget
        self._pins = pins
        self._blobs = Blobs(layout, durable=False)
        self._records = records
        self._clock = clock
        self.pin_file = pin_file
        self.pulls: FirstUse[PullService] = FirstUse(reactor, lambda: load(self))

    def startService(self) -> None:
        """Read PIN_FILE, and fetch what was pinned and has not been fetched yet."""
        super().startService()  # type: ignore[no-untyped-call]
        self._reactor.callWhenRunning(self._fetch_pins_soon)

    def stopService(self) -> Any:
        """End all pulls; what they have downloaded stays."""
        if self.pulls.loaded is not None:
            self.pulls.loaded.cancel_all()
        return super().stopService()  # type: ignore[no-untyped-call]

    def reconfigure(self, reserve: int, pin_file: Path | None) -> None:
        """Apply RATE_RESERVE, and PIN_FILE or changed content of it."""
        self._budget.reserve = reserve
        self.pin_file = pin_file
        self._fetch_pins_soon()

    def _fetch_pins_soon(self) -> None:
        if self.pin_file is not None or len(self._pins):
            spawn(self._fetch_pins(), "fetching pinned images")

    async def _fetch_pins(self) -> None:
        pulls = await self.pulls.get()
        if self.running:
            await pulls.fetch_new_pins()

    def is_pinned(self, key: str, name: str | None = None) -> bool:
        """Return whether the tag or digest `name` of the repository `key`, or anything of it, is pinned."""
        return self._pins.is_pinned(key, name)

    def pinned_references(self, key: str) -> Sequence[str]:
        """Return the tags and digests of the repository `key` that are pinned. May be called in any thread."""
        return self._pins.references(key)

    def count_pins(self) -> tuple[int, int, int]:
        """Return how many pins are here as a whole, how many are not, and the bytes of all. Blocks."""
        pins = list(self._pins)
        complete = sum(pin.digest is not None and all(map(self._blobs.exists, pin.contents)) for pin in pins)
        return complete, len(pins) - complete, self._pins.bytes

    async def budget(self, *, repositories: bool = True) -> dict[str, Any]:
        """Return the limits of registries, and their uses; with the names of `repositories`, or without."""
        limits = await in_thread(self._reactor, stored_limits, self._records, self._clock())
        return {"reserve": self._budget.reserve / 100, "limits": self._budget.rows(limits, repositories=repositories)}

    # requests

    @property
    def handlers(self) -> Mapping[tuple[str, str], ControlHandler]:
        """The handlers of the control socket by method and path."""
        return {**dict.fromkeys(PULL_REQUESTS, self._handle), ("GET", "/v1/budget"): self._handle_budget}

    async def _handle(self, request: Request, response: NDJSONResponse, principal: Principal) -> None:
        pulls = await self.pulls.get()
        await pulls.handlers[request.method, request.path](request, response, principal)

    async def _handle_budget(self, request: Request, response: NDJSONResponse, principal: Principal) -> None:
        request.respond(200, JSON_FIELDS, json.dumps(await self.budget()).encode())
