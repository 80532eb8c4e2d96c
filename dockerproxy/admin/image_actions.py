"""The actions of administrators on the page, in the main process: the same as by the command `dockerproxy`.

Each may be repeated: a form that is sent twice does no harm.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from attrs import frozen
from twisted.logger import Logger

from dockerproxy.admin.deletion import Deleter
from dockerproxy.admin.operations import Event, OperationError, Operations
from dockerproxy.admin.resolver import CACHED, HOSTED, ImageResolver, InvalidArgument, NotFound
from dockerproxy.concurrency import FirstUse, in_thread, spawn
from dockerproxy.errors import BadRequest, Denied, InsufficientStorage, NameUnknown
from dockerproxy.registry.principal import Principal
from dockerproxy.store.disk_access import DiskAccess

if TYPE_CHECKING:
    from dockerproxy.admin.pulls import PullService

log = Logger()


@frozen
class ImageActions:
    """Does the actions of administrators."""

    _reactor: Any
    _resolver: ImageResolver
    _deleter: Deleter
    _operations: Operations
    _registry_disk: DiskAccess
    _hosted_root: str
    """The directory of the hosted registry, or the address of the bucket that it is in."""
    _pulls: FirstUse[PullService]

    async def act(self, principal: Principal, action: str, name: str, where: str) -> str:
        """Do `action` with the image `name` of the store `where`. Return the code of its result; see `page.site`.

        Raise `RegistryError`.
        """
        match action:
            case "remove":
                return await self._remove(principal, name, where)
            case "gc":
                return self._collect(principal)
            case "pin" | "unpin" | "refresh" if where == CACHED:
                return await self._pin(principal, action, name)
        raise BadRequest(f"{action[:20]!r} is not possible for this image")

    async def _pin(self, principal: Principal, action: str, name: str) -> str:
        pulls = await self._pulls.get()
        if action == "pin":
            await pulls.pin(principal, name)
            return "pinned"
        if action == "refresh":
            await pulls.refresh(principal, name)
            return "asked"
        try:
            await pulls.unpin(principal, name)
        except NameUnknown:
            pass  # it was unpinned already
        return "unpinned"

    async def _remove(self, principal: Principal, name: str, where: str) -> str:
        if where not in (HOSTED, CACHED):
            raise BadRequest("an image is hosted or cached")
        try:
            ref = await self._in_store(where, self._resolver.snapshot().resolve, name, where)
        except NotFound:
            return "gone"
        except InvalidArgument as error:
            raise BadRequest(str(error)) from None
        if ref.tag is None and ref.digest is None:
            raise BadRequest("choose a tag or a digest to remove")
        reason = await self._deleter.reason_to_keep(ref)
        if reason is not None:
            raise Denied(f"{reason}. Nothing was removed.")
        try:
            await self._deleter.delete(principal, ref)
        except OSError as error:
            raise InsufficientStorage(f"{ref} was not removed: {error.strerror}") from error
        return "removed"

    async def _in_store(self, where: str, function: Callable[..., Any], *args: object) -> Any:
        """Return the result of `function`. The cache does not wait for the disk of the hosted registry."""
        if where == CACHED:
            return await in_thread(self._reactor, function, *args)
        return await self._registry_disk.run(function, *args)

    def _collect(self, principal: Principal) -> str:
        running = self._operations.current
        if running is not None and running["name"] != "gc":
            raise Denied(f"{running['name']} of {running['user']} is running; collect garbage when it has ended")
        if running is None:
            spawn(self._run(self._operations.run(principal, "gc", {"root": self._hosted_root}, _ignore)), "running gc")
        return "collecting"

    async def _run(self, operation: Awaitable[Event]) -> None:
        try:
            await operation
        except OperationError as error:
            log.error("gc was not completed: {reason}", reason=error.message)


async def _ignore(event: Event) -> None:
    pass
