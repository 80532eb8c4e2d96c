"""Pulls of images for the administrator, and pinned images: `dockerproxy pull`, `pin`, `unpin` and `pins`.

    POST /v1/pull          {"images", "platforms"?, "pin"?, "refresh"?, "dry_run"?, "detach"?, "referrers"?}  lines
    GET  /v1/pulls
    POST /v1/pulls/cancel  {"images"}
    POST /v1/unpin         {"images"}
    GET  /v1/pins
    POST /v1/pins/refresh  {"all"?}                                                                           lines

The lines of a pull are ``{"event": "plan", …}`` with its cost, ``{"event": "image", …}`` whenever the state of
an image changes, and the result. The daemon goes on if the command ends. A command that asks for the same image joins.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from attrs import frozen
from twisted.internet.defer import CancelledError, Deferred, DeferredList, DeferredLock
from twisted.logger import Logger

from dockerproxy.admin.arguments import FLAG, MAX_BODY, NAMES, SECONDS, Argument, parse_body
from dockerproxy.admin.ndjson import JSON_FIELDS, NDJSONResponse
from dockerproxy.cache.image_pull import Estimate, ImagePull, ImagePuller, PullRequest, PullState, describe_failure
from dockerproxy.cache.pin_file import PinFile, parse_platforms
from dockerproxy.cache.pins import Pin, Pins
from dockerproxy.concurrency import current_client, in_thread, spawn
from dockerproxy.config_files import read_config_file
from dockerproxy.errors import (
    Denied,
    NameInvalid,
    NameUnknown,
    RegistryError,
    ServiceOverloaded,
    UpstreamRefused,
)
from dockerproxy.http.request import Request
from dockerproxy.oci.docker_hub import registry_label
from dockerproxy.oci.image_names import ImageName
from dockerproxy.registry.audit import AuditLog
from dockerproxy.registry.principal import Principal
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.disk_errors import disk_error
from dockerproxy.store.layout import Layout

MAX_PULLS = 2000
"""Images that are being pulled at the same time, or wait."""

MIN_REFRESH = 60.0
"""The shortest time between two questions about a pinned tag, in seconds."""

_PLATFORMS = Argument(lambda value: value == [] or NAMES.accepts(value), "a list of platforms")
PULL = {
    "images": NAMES, "platforms": _PLATFORMS, "pin": FLAG, "refresh": SECONDS, "dry_run": FLAG, "detach": FLAG,
    "referrers": FLAG,
}  # fmt: skip
UNPIN = {"images": NAMES}
CANCEL = {"images": NAMES}
REFRESH = {"all": FLAG}
"""The arguments of each request."""

_REPORT_INTERVAL = 0.25  # seconds between two looks at what has changed
_ALIVE_INTERVAL = 60.0  # seconds without a change after which the command hears again that pulls wait

log = Logger()


@frozen
class _Order:
    """An image that a command asks for, and its pull; a `problem` if there can be none."""

    name: str
    pull: ImagePull | None = None
    problem: str = ""


class PullService:
    """Runs pulls, and keeps pins in the main process. `clock` returns POSIX time.

    `layout` is that of the cache, and `pin_file` returns PIN_FILE.
    """

    def __init__(
        self,
        reactor: Any,
        puller: ImagePuller,
        pins: Pins,
        layout: Layout,
        audit: AuditLog,
        clock: Callable[[], float],
        pin_file: Callable[[], Path | None],
    ) -> None:
        self._reactor = reactor
        self._puller = puller
        self._audit = audit
        self._pins = pins
        self._blobs = Blobs(layout, durable=False)
        self._clock = clock
        self._pin_file = pin_file
        self._problems: tuple[str, ...] = ()  # of PIN_FILE
        self._pin_file_lock = DeferredLock()
        self._active: dict[PullRequest, ImagePull] = {}
        self._running: dict[PullRequest, Deferred[None]] = {}
        self._waiters: set[Deferred[None]] = set()  # for the end of any pull

    def cancel_all(self) -> None:
        """End all pulls; what they have downloaded stays."""
        for deferred in list(self._running.values()):
            deferred.cancel()

    # pins

    async def pin(
        self, principal: Principal, name: str, platforms: Sequence[str] = (), refresh: float | None = None
    ) -> dict[str, Any]:
        """Pin an image. It is fetched in the background. Return its row.

        Raise `NameInvalid`, `NameUnknown` if its registry is not cached here, or `Denied` if there is no room.
        """
        image = ImageName.parse(name)
        self._puller.prepare(PullRequest(image))
        pin = await self._add_pin(principal, image, parse_platforms(list(platforms)), refresh, True)
        self._begin(self._puller.prepare(_request_of(pin)))
        return self._pin_row(pin, None)

    async def _add_pin(
        self, principal: Principal, image: ImageName, platforms: tuple[str, ...], refresh: float | None, referrers: bool
    ) -> Pin:
        changes: dict[str, Any] = {"platforms": platforms} if platforms else {}
        if refresh is not None:
            changes["refresh"] = max(refresh, MIN_REFRESH)
        pin = await self._pins.set(image, by_command=True, referrers=referrers, **changes)
        log.info("{principal} pinned {image}", principal=str(principal), image=str(image))
        self._audit.record(principal, "pin", str(image))
        return pin

    async def unpin(self, principal: Principal, name: str) -> None:
        """Let the image leave the cache again. Raise `NameInvalid`, `NameUnknown`, or `Denied` if PIN_FILE has it."""
        image = self._unpinnable(name)
        await self._pins.remove(image)
        log.info("{principal} unpinned {image}", principal=str(principal), image=str(image))
        self._audit.record(principal, "unpin", str(image))

    async def refresh(self, principal: Principal, name: str) -> None:
        """Ask the registry for an image now, and fetch in the background what is new.

        Raise `NameInvalid`, `NameUnknown` if its registry is not cached here, or `ServiceOverloaded`.
        """
        image = ImageName.parse(name)
        pin = self._pins.get(image)
        self._begin(self._puller.prepare(PullRequest(image) if pin is None else _request_of(pin)))
        self._audit.record(principal, "refresh", str(image))

    def _unpinnable(self, name: str) -> ImageName:
        """Return the pinned image `name`. Raise as `unpin` does."""
        pin = self._pins.get(ImageName.parse(name))
        if pin is None:
            raise NameUnknown(f"{ImageName.parse(name)} is not pinned")
        if pin.in_file:
            raise Denied(f"{pin.image} is in {self._pin_file()}; remove its line there")
        return pin.image

    def pins(self) -> list[dict[str, Any]]:
        """Return the rows of all pins, without their missing parts."""
        return [self._pin_row(pin, None) for pin in sorted(self._pins, key=lambda pin: str(pin.image))]

    def _pin_row(self, pin: Pin, missing: int | None) -> dict[str, Any]:
        return {
            "image": str(pin.image),
            "platforms": list(pin.platforms),
            "refresh": pin.refresh,
            "referrers": pin.referrers,
            "source": "file" if pin.in_file else "command",
            "since": pin.since,
            "refreshed": pin.refreshed,
            "digest": None if pin.digest is None else str(pin.digest),
            "bytes": sum(pin.contents.values()),
            "contents": len(pin.contents),
            "missing": missing,
            "error": pin.error,
        }

    def _images_with_missing(self) -> set[ImageName]:
        """Return the pinned images of which something is not here, such as after `rm`. Blocks."""
        return {pin.image for pin in self._pins if not all(map(self._blobs.exists, pin.contents))}

    def _rows_with_missing(self) -> list[dict[str, Any]]:
        rows = []
        for pin in sorted(self._pins, key=lambda pin: str(pin.image)):
            rows.append(self._pin_row(pin, sum(not self._blobs.exists(digest) for digest in pin.contents)))
        return rows

    async def _read_pin_file(self) -> None:
        """Add the images of PIN_FILE, and remove those that it no longer has. An unreadable file changes nothing."""
        async with self._pin_file_lock:  # or what another one read before would be applied after it
            await self._apply_pin_file(self._pin_file())

    async def _apply_pin_file(self, path: Path | None) -> None:
        listed: dict[ImageName, tuple[str, ...]] = {}
        problems: tuple[str, ...] = ()
        if path is not None:
            try:
                content, _ = await in_thread(self._reactor, read_config_file, path)
            except OSError as error:
                self._problems = (f"PIN_FILE: {path} cannot be read: {error.strerror}; its pins stay",)
                log.error("{problem}", problem=self._problems[0])
                return
            file = PinFile.parse(content)
            listed = {line.image: line.platforms for line in file.lines}
            problems = tuple(f"PIN_FILE: {path}, {problem}" for problem in file.problems)
        self._problems = problems
        for problem in problems:
            log.error("{problem}; the other lines count", problem=problem)
        for pin in self._pins:
            if pin.in_file and pin.image not in listed:
                try:
                    await self._leave_file(pin)
                except RegistryError as error:
                    log.error("{image} stays pinned: {reason}", image=str(pin.image), reason=error.message)
        for image, platforms in listed.items():
            changes: dict[str, Any] = {"platforms": platforms} if platforms else {}
            try:
                await self._pins.set(image, in_file=True, **changes)
            except RegistryError as error:
                problem = f"PIN_FILE: {error.message}"
                if problem not in self._problems:  # a full disk is the same for all of them
                    self._problems += (problem,)
                    log.error("{problem}", problem=problem)

    async def _leave_file(self, pin: Pin) -> None:
        if pin.by_command:
            await self._pins.set(pin.image, in_file=False)
        else:
            await self._pins.remove(pin.image)
            log.info("{image} is no longer pinned, because PIN_FILE does not have it", image=str(pin.image))

    async def fetch_new_pins(self) -> None:
        """Read PIN_FILE, and fetch what was pinned and has not been fetched yet."""
        await self._read_pin_file()
        for order in await self._orders_of([pin for pin in self._pins if not pin.contents]):
            if order.pull is not None and self._begin_or_fail(order.pull).state is PullState.FAILED:
                log.error("{image} is not pulled: {problem}", image=order.name, problem=order.pull.message)

    async def _orders_of(self, pins: Iterable[Pin]) -> list[_Order]:
        """Return the pulls of `pins`. Note the problem of a pin that cannot be pulled, such as that of REGISTRIES."""
        orders = []
        for pin in pins:
            order = self._order(str(pin.image), _request_of(pin))
            if order.problem and order.problem != pin.error:
                log.error("{image} is not pulled: {problem}", image=order.name, problem=order.problem)
                with suppress(RegistryError):  # the log has it
                    await self._pins.update(pin.image, error=order.problem)
            orders.append(order)
        return orders

    # pulls

    def _order(self, name: str, request: PullRequest) -> _Order:
        try:
            return _Order(name, self._active.get(request) or self._puller.prepare(request))
        except RegistryError as error:
            return _Order(name, problem=error.message)

    def _begin(self, pull: ImagePull) -> ImagePull:
        """Start a pull, unless the same one is running. Return the one that runs. Raise `ServiceOverloaded`."""
        other = self._active.get(pull.request)
        if other is not None or pull.is_over:
            return other or pull
        if len(self._active) >= MAX_PULLS:
            message = f"{len(self._active)} images are being pulled or wait, the most that may; try again later"
            raise ServiceOverloaded(message, headers=[("Retry-After", "60")])
        self._active[pull.request] = pull
        self._running[pull.request] = running = spawn(self._run(pull), f"pulling {pull.request.image}")
        running.addBoth(lambda _: self._end(pull))
        return pull

    def _begin_or_fail(self, pull: ImagePull) -> ImagePull:
        """Start a pull like `_begin`. If there is no room for it, it has failed."""
        try:
            return self._begin(pull)
        except ServiceOverloaded as error:
            pull.message, pull.state = error.message, PullState.FAILED
            return pull

    def _end(self, pull: ImagePull) -> None:
        del self._active[pull.request]
        self._running.pop(pull.request, None)
        for waiter in list(self._waiters):
            self._wake(waiter)

    async def _run(self, pull: ImagePull) -> None:
        current_client.set("")
        try:
            await self._pull_all(pull)
            pull.state = PullState.DONE
        except RegistryError as error:
            await self._fail(pull, error)
        except OSError as error:
            await self._fail(pull, disk_error("CACHE_DIR", error))
        except CancelledError:
            pull.message = pull.message or "the daemon stops; pull it again to go on"
        finally:
            if not pull.is_over:
                pull.message = pull.message or "it failed because of an internal error; see the daemon's log"
                pull.state = PullState.FAILED

    async def _pull_all(self, pull: ImagePull) -> None:
        if pull.digest is None:
            await self._puller.resolve_in_turn(pull)
        await self._puller.fetch_manifests(pull)
        await self._keep_contents(pull)
        await self._puller.fetch_blobs(pull)
        if pull.request.referrers and not pull.is_stale:
            await self._puller.fetch_referrers(pull)
            await self._keep_contents(pull)
            await self._puller.fetch_blobs(pull)
        pin = self._pin_of(pull)
        if pin is not None:
            # Without a complete answer, what was kept stays, and the registry is asked again soon.
            contents = {**pin.contents, **pull.contents} if pull.message else dict(pull.contents)
            refreshed = pin.refreshed if pull.is_stale else self._clock()
            await self._pins.update(
                pin.image, contents=contents, digest=pull.digest, refreshed=refreshed, error=pull.message[:1000]
            )

    def _pin_of(self, pull: ImagePull) -> Pin | None:
        """Return the pin that a pull is for. Another pull of the same image, such as for one platform, changes none."""
        pin = self._pins.get(pull.request.image)
        return pin if pin is not None and _request_of(pin) == pull.request else None

    async def _keep_contents(self, pull: ImagePull) -> None:
        """Keep what a pull for a pin is about to download, and what was kept before."""
        pin = self._pin_of(pull)
        if pin is not None:
            await self._pins.update(pin.image, contents={**pin.contents, **pull.contents})

    async def _fail(self, pull: ImagePull, error: RegistryError) -> None:
        pull.message, pull.state = describe_failure(pull, error), PullState.FAILED
        pin = self._pin_of(pull)
        if pin is None:
            return
        with suppress(RegistryError):
            if not pin.contents and not pin.in_file and isinstance(error, Denied | UpstreamRefused | NameInvalid):
                await self._pins.remove(pin.image)  # the command has said why, and it will not succeed later
            else:
                await self._pins.update(pin.image, error=pull.message[:1000])

    # requests

    @property
    def handlers(self) -> Mapping[tuple[str, str], Callable[[Request, NDJSONResponse, Principal], Awaitable[None]]]:
        """The handlers of the control socket."""
        return {
            ("POST", "/v1/pull"): self._handle_pull,
            ("GET", "/v1/pulls"): self._handle_pulls,
            ("POST", "/v1/pulls/cancel"): self._handle_cancel,
            ("POST", "/v1/unpin"): self._handle_unpin,
            ("GET", "/v1/pins"): self._handle_pins,
            ("POST", "/v1/pins/refresh"): self._handle_refresh,
        }

    async def _handle_pulls(self, request: Request, response: NDJSONResponse, principal: Principal) -> None:
        rows = [self._puller.row(pull) for pull in self._active.values()]
        request.respond(200, JSON_FIELDS, json.dumps({"pulls": rows}).encode())

    async def _handle_cancel(self, request: Request, response: NDJSONResponse, principal: Principal) -> None:
        arguments = parse_body(await request.read_all(MAX_BODY), CANCEL, "images")
        # Look for all first, so that a wrong one changes nothing.
        pulls = {image: self._pulls_of(image) for image in map(ImageName.parse, arguments["images"])}
        for image, running in pulls.items():
            for pull in running:
                pull.message = f"{principal} cancelled it; pull it again to go on"
                self._running[pull.request].cancel()
            log.info("{principal} cancelled the pull of {image}", principal=str(principal), image=str(image))
        request.respond(200, JSON_FIELDS, json.dumps({"cancelled": list(map(str, pulls))}).encode())

    def _pulls_of(self, image: ImageName) -> list[ImagePull]:
        """Return the pulls of `image` that run or wait. Raise `NameUnknown` if there are none."""
        pulls = [pull for request, pull in self._active.items() if request.image == image]
        if not pulls:
            raise NameUnknown(f"{image} is not being pulled")
        return pulls

    async def _handle_pins(self, request: Request, response: NDJSONResponse, principal: Principal) -> None:
        pin_file = self._pin_file()
        document = {
            "pins": await in_thread(self._reactor, self._rows_with_missing),
            "file": None if pin_file is None else str(pin_file),
            "problems": list(self._problems),
            "bytes": self._pins.bytes,
            "limit": self._pins.limit,
        }
        request.respond(200, JSON_FIELDS, json.dumps(document).encode())

    async def _handle_unpin(self, request: Request, response: NDJSONResponse, principal: Principal) -> None:
        arguments = parse_body(await request.read_all(MAX_BODY), UNPIN, "images")
        images = {
            self._unpinnable(name): name for name in arguments["images"]
        }  # first, so that a wrong one changes nothing
        for name in images.values():
            await self.unpin(principal, name)
        unpinned = list(map(str, images))
        request.respond(200, JSON_FIELDS, json.dumps({"unpinned": unpinned}).encode())

    async def _handle_refresh(self, request: Request, response: NDJSONResponse, principal: Principal) -> None:
        arguments = parse_body(await request.read_all(MAX_BODY), REFRESH)
        await self._read_pin_file()
        every, now = arguments.get("all", False), self._clock()
        missing = await in_thread(self._reactor, self._images_with_missing)
        due = [pin for pin in self._pins if every or pin.is_due(now) or pin.image in missing]
        for problem in self._problems:
            response.send("problem", message=problem)
        await self._pull(await self._orders_of(due), response)

    async def _handle_pull(self, request: Request, response: NDJSONResponse, principal: Principal) -> None:
        arguments = parse_body(await request.read_all(MAX_BODY), PULL, "images")
        platforms = parse_platforms(arguments.get("platforms", []))
        pin = arguments.get("pin", False)
        is_pinned = arguments.get("pin", False) and not arguments.get("dry_run", False)
        orders = []
        for name in dict.fromkeys(arguments["images"]):
            try:
                image = ImageName.parse(name)
                wanted = PullRequest(image, platforms, arguments.get("referrers", pin))
                self._puller.prepare(wanted)
                if is_pinned:
                    wanted = _request_of(
                        await self._add_pin(principal, image, platforms, arguments.get("refresh"), wanted.referrers)
                    )
                orders.append(self._order(str(image), wanted))
            except RegistryError as error:
                orders.append(_Order(name, problem=error.message))
        await self._pull(
            orders, response, dry_run=arguments.get("dry_run", False), detach=arguments.get("detach", False)
        )

    async def _pull(
        self, orders: Sequence[_Order], response: NDJSONResponse, *, dry_run: bool = False, detach: bool = False
    ) -> None:
        """Report the cost of the pulls, start them, and report their progress until they have ended."""
        for order in orders:
            if order.problem:
                response.send("image", **_failed_row(order))
        pulls = [order.pull for order in orders if order.pull is not None]
        await self._resolve([pull for pull in pulls if pull.digest is None and not pull.is_over], dry_run=dry_run)
        response.send("plan", **await self._plan(pulls, dry_run=dry_run))
        await response.drain()
        if not dry_run:
            pulls = [self._begin_or_fail(pull) for pull in pulls]
        if not dry_run and not detach:
            async for rows in self._changes(pulls):
                for row in rows:
                    response.send("image", **row)
                await response.drain()
        if dry_run or detach:
            for pull in pulls:
                response.send("image", **self._puller.row(pull))
        failed = sum(bool(order.problem) for order in orders) + sum(pull.state is PullState.FAILED for pull in pulls)
        response.finish(
            images=len(orders),
            done=sum(pull.state is PullState.DONE for pull in pulls),
            failed=failed,
            bytes=sum(sum(pull.contents.values()) for pull in pulls if pull.state is PullState.DONE),
        )

    async def _resolve(self, pulls: Sequence[ImagePull], *, dry_run: bool) -> None:
        await DeferredList([Deferred.fromCoroutine(self._try_resolve(pull, dry_run=dry_run)) for pull in pulls])

    async def _try_resolve(self, pull: ImagePull, *, dry_run: bool) -> None:
        try:
            await self._puller.resolve(pull)
        except RegistryError as error:
            if dry_run:  # it changes no pin
                pull.message, pull.state = describe_failure(pull, error), PullState.FAILED
            elif error.status != 429:  # the pull waits, and asks again
                await self._fail(pull, error)

    async def _plan(self, pulls: Sequence[ImagePull], *, dry_run: bool) -> dict[str, Any]:
        size = unknown = 0
        registries: dict[str, dict[str, Any]] = {}
        for pull in pulls:
            if pull.is_over or pull.digest is None:
                continue
            try:
                estimate = await self._puller.estimate(pull)
            except RegistryError as error:  # the pull will say why, if there is one
                if dry_run:
                    pull.message, pull.state = describe_failure(pull, error), PullState.FAILED
                    continue
                estimate = Estimate(0, None)
            size += estimate.size or 0
            unknown += estimate.size is None
            if self._puller.counts(pull):
                row = registries.setdefault(registry_label(pull.registry), {"pulls": 0})
                row.update(self._puller.budget_row(pull), pulls=row["pulls"] + estimate.pulls)
        return {"images": len(pulls), "pulls": list(registries.values()), "bytes": size, "unknown": unknown}

    async def _changes(self, pulls: Sequence[ImagePull]) -> AsyncIterator[list[dict[str, Any]]]:
        """Yield the rows that have changed, until all pulls have ended."""
        last: dict[int, dict[str, Any]] = {}
        reported_at = self._reactor.seconds()
        while True:
            is_end = all(pull.is_over for pull in pulls)
            rows = {number: self._puller.row(pull) for number, pull in enumerate(pulls)}
            changed = [row for number, row in rows.items() if last.get(number) != row]
            if not changed and self._reactor.seconds() - reported_at >= _ALIVE_INTERVAL:
                changed = [rows[number] for number, pull in enumerate(pulls) if not pull.is_over]
            last = rows
            if changed:
                reported_at = self._reactor.seconds()
                yield changed
            if is_end:
                return
            await self._wait()

    async def _wait(self) -> None:
        """Wait until a pull has ended, or for _REPORT_INTERVAL."""
        waiter: Deferred[None] = Deferred()
        self._waiters.add(waiter)
        timer = self._reactor.callLater(_REPORT_INTERVAL, self._wake, waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)
            if timer.active():
                timer.cancel()

    def _wake(self, waiter: Deferred[None]) -> None:
        self._waiters.discard(waiter)
        waiter.callback(None)


def _request_of(pin: Pin) -> PullRequest:
    return PullRequest(pin.image, pin.platforms, pin.referrers)


def _failed_row(order: _Order) -> dict[str, Any]:
    return {
        "image": order.name, "state": PullState.FAILED.value, "digest": None, "done": 0, "total": None,
        "message": order.problem, "until": None,
    }  # fmt: skip
