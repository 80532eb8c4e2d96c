"""What is written down beside the content: facts that cost another question where they are lost, and never an answer.

So a disk that takes no more (or a file system that became read-only) is complained about here, and nobody fails for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from twisted.logger import Logger

from dockerproxy.concurrency import in_thread
from dockerproxy.store.records import Records

log = Logger()


def try_put(records: Records, value: Mapping[str, Any], *key: str) -> None:
    """Keep `value`, if the disk takes it."""
    try:
        records.put(value, *key)
    except OSError as error:
        log.warn("{kind} of {name} is not remembered: {reason}", kind=key[0], name=key[1], reason=error.strerror)


def try_remove(records: Records, *key: str) -> None:
    """Remove what is kept, if the disk lets it go."""
    try:
        records.remove(*key)
    except OSError as error:
        log.warn("{kind} of {name} is not forgotten: {reason}", kind=key[0], name=key[1], reason=error.strerror)


async def try_link(reactor: Any, write: Callable[..., None], repository: str, *arguments: Any) -> None:
    """Call `write`, which makes a link of `repository`, in a thread; go on where the disk does not take it."""
    try:
        await in_thread(reactor, write, repository, *arguments)
    except OSError as error:
        log.warn("{repository} is not linked to its content: {reason}", repository=repository, reason=error.strerror)
