"""The runs of garbage collection as a process of a node knows them. Requests count on condemned entries here.

`gc_runs` describes the protocol. While no run is published, this costs a comparison.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from attrs import define, field, frozen
from twisted.internet.task import LoopingCall, deferLater
from twisted.logger import Logger

from dockerproxy.bounded_dict import BoundedDict
from dockerproxy.bucket.gc_runs import (
    MAX_CONDEMNED,
    RESCUED,
    CondemnedSet,
    Times,
    condemned_key,
    decision_key,
    end_key,
    gone_key,
    list_runs,
)
from dockerproxy.bucket.s3 import S3Bucket
from dockerproxy.bucket.store_errors import retry_after
from dockerproxy.concurrency import SingleFlight, in_thread
from dockerproxy.errors import RegistryError, StoreUnavailable

_MAX_RESCUED = 10_000  # entries that are known to be rescued; others cost a request
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0  # seconds between two looks for `gone`

log = Logger()


@frozen
class Published:
    """The entries that the run `number` has condemned. If none is published, the number may be that of an ended one."""

    number: int = 0
    _condemned: CondemnedSet | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing is condemned."""
        return self._condemned is None

    def __contains__(self, entry: str) -> bool:
        return self._condemned is not None and entry in self._condemned


@define(eq=False)
class GCView:
    """The last run as this process has seen it: in `current`, which is at most `Times.look` old."""

    _reactor: Any
    _bucket: S3Bucket
    times: Times
    current: Published = field(factory=Published, init=False)
    _fetches: SingleFlight[int, CondemnedSet | None] = field(factory=SingleFlight, init=False)
    _rescued: BoundedDict[tuple[int, str], bool] = field(init=False)

    @_rescued.default
    def _make_rescued(self) -> BoundedDict[tuple[int, str], bool]:
        return BoundedDict(_MAX_RESCUED)

    def start(self) -> None:
        """Look at the runs from now on."""
        call = LoopingCall(self._look_again)
        call.clock = self._reactor
        call.start(self.times.look)

    async def _look_again(self) -> None:
        try:
            await self.look()
        except RegistryError as error:
            log.debug("the runs of gc cannot be listed: {reason}", reason=error.message)

    async def look(self) -> Published:
        """List the runs, after this call began, and return the condemned entries."""
        runs = await list_runs(self._bucket)
        if not runs:
            return Published()
        last = runs[-1]
        published = Published(last.number)
        if last.is_published and not last.is_ended:
            if self.current.number == last.number and not self.current.is_empty:
                published = self.current
            else:
                fetch = partial(self._fetch, last.number)
                published = Published(last.number, await self._fetches.do(last.number, fetch))
        # The answer to the earlier one of two looks at once may come later. `current` may be old at any time.
        if published.number >= self.current.number:
            self.current = published
        return published

    async def _fetch(self, number: int) -> CondemnedSet | None:
        content = await self._bucket.get(condemned_key(number), MAX_CONDEMNED)
        return None if content is None else await in_thread(self._reactor, CondemnedSet.parse, content)

    async def count_on(self, entries: Iterable[str], published: Published) -> bool:
        """Rescue those of `entries` that are condemned. Return False if one is being deleted at this moment.

        After True each of them is as it was: there, or not.
        """
        for entry in entries:
            if entry in published and not await self._rescue(published.number, entry):
                if await self._bucket.size(gone_key(published.number, entry)) is None:
                    return False
        return True

    async def settle(self, entries: Iterable[str], published: Published, done: set[tuple[int, str]]) -> bool:
        """Rescue those of `entries` that are condemned, or else wait until they are gone.

        Return whether one of them was gone and is not in `done`, so that the caller writes it again. It is in `done`
        afterwards, with the number of the run. Raise `StoreUnavailable` if the wait takes too long.
        """
        run, is_changed = published.number, False
        for entry in entries:
            if entry in published and (run, entry) not in done and not await self._rescue(run, entry):
                await self._wait_gone(run, entry)
                done.add((run, entry))
                is_changed = True
        return is_changed

    async def _rescue(self, run: int, entry: str) -> bool:
        if (run, entry) in self._rescued:
            return True
        if await self._bucket.create(decision_key(run, entry), RESCUED) != RESCUED:
            return False
        self._rescued[run, entry] = True
        return True

    async def _wait_gone(self, run: int, entry: str) -> None:
        deadline, pause = self._reactor.seconds() + self.times.patience, _FIRST_PAUSE
        while await self._bucket.size(gone_key(run, entry)) is None:
            if await self._bucket.size(end_key(run)) is not None:
                return
            if await self._is_forsaken(run, entry):
                await self._bucket.put(gone_key(run, entry), b"")
                return
            if self._reactor.seconds() >= deadline:
                raise StoreUnavailable(
                    f"gc is deleting {entry} for more than {self.times.patience:g} s; try again",
                    headers=retry_after(),
                )
            await deferLater(self._reactor, pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _is_forsaken(self, run: int, entry: str) -> bool:
        """Return whether the collector that has decided to delete the entry must have died."""
        key = decision_key(run, entry)
        async for listed in self._bucket.list_keys(key, limit=1):
            return listed.key == key and listed.age > self.times.delete
        return False
