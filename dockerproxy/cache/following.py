"""A download that another process makes, read along by the flight of this one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from twisted.internet.task import deferLater

from dockerproxy.cache.ingests import Ingests
from dockerproxy.errors import UpstreamBroken
from dockerproxy.store.ingest import Followed, Ingest

if TYPE_CHECKING:
    from dockerproxy.cache.flights import Flight

_LOOK_EVERY = 0.01  # seconds between two looks at the file


async def follow(reactor: Any, flight: Flight, ingests: Ingests, followed: Followed) -> Ingest | None:
    """Let the readers of `flight` have what comes, to the end of it.

    Return the right to go on where the other process has died, None where it published the blob or gave it up. Raise
    `UpstreamBroken` where it took back what readers have a part of.
    """
    ingest = None
    try:
        while followed.is_present and (ingest := followed.taken_over()) is None:
            _look(flight, ingests, followed)
            await deferLater(reactor, _LOOK_EVERY)
        _look(flight, ingests, followed)
    except BaseException:
        if ingest is not None:
            ingest.release()
        raise
    finally:
        if ingest is None:
            followed.close()
    return ingest


def _look(flight: Flight, ingests: Ingests, followed: Followed) -> None:
    if not flight.opened and (announced := ingests.announced(flight.digest)) is not None:
        flight.open(announced)
    size = followed.size
    if size < flight.written:
        # What readers have of it was never hashed.
        raise UpstreamBroken(f"another process took back what it had received of {flight.digest}")
    if size > flight.written:
        flight.grow(size)
